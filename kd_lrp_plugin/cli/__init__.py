"""The command line ``kd-lrp``: one file per command."""

from kd_lrp_plugin.cli.main import app

__all__ = ["app"]
