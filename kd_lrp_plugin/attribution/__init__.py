"""Explaining a finished model; importing the package registers every method."""

from kd_lrp_plugin.attribution import lime, score_cam

__all__ = ["lime", "score_cam"]
