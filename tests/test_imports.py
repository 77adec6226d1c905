"""The core leaves torchdistill alone; all other arrows are in pyproject's import contract."""

import subprocess
import sys

CORE = (
    "utils",
    "plots",
    "relevance",
    "losses",
    "models",
    "metrics",
    "data",
    "attribution",
    "selection",
)


def test_the_core_leaves_torchdistill_alone():
    code = f"""
import importlib, pkgutil, sys
import kd_lrp_plugin
for name in {CORE}:
    module = importlib.import_module(f"kd_lrp_plugin.{{name}}")
    for found in pkgutil.walk_packages(getattr(module, "__path__", ()), f"{{module.__name__}}."):
        importlib.import_module(found.name)
assert "kd_lrp_plugin.relevance.recording" in sys.modules
assert not [m for m in sys.modules if m.split(".")[0] == "torchdistill"]
"""
    subprocess.run([sys.executable, "-c", code], check=True)
