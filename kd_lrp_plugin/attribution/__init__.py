"""Explaining a finished model; importing the package registers every method."""

from kd_lrp_plugin.attribution import perturbation

__all__ = ["perturbation"]
