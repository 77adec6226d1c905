"""``python -m kd_lrp_plugin``."""

from kd_lrp_plugin.cli.main import app

if __name__ == "__main__":
    app()
