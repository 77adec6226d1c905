"""``python -m kd_lrp_plugin.cli``, as torchrun needs it."""

from kd_lrp_plugin.cli.main import app

if __name__ == "__main__":
    app()
