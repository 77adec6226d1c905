"""The core leaves torchdistill alone; all other arrows are in pyproject's import contract."""

from pathlib import Path

import preloaded
import pytest

ROOT = Path(__file__).resolve().parent.parent

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


def test_the_core_leaves_torchdistill_alone(tmp_path):
    script = tmp_path / "core.py"
    script.write_text(f"""
import importlib, pkgutil, sys
import kd_lrp_plugin
for name in {CORE}:
    module = importlib.import_module(f"kd_lrp_plugin.{{name}}")
    for found in pkgutil.walk_packages(getattr(module, "__path__", ()), f"{{module.__name__}}."):
        importlib.import_module(found.name)
assert "kd_lrp_plugin.relevance.recording" in sys.modules
assert not [m for m in sys.modules if m.split(".")[0] == "torchdistill"]
""")
    ran = preloaded.run(script)
    assert ran.returncode == 0, ran.stderr


def test_every_package_is_installed():
    tomllib = pytest.importorskip("tomllib")
    found = {file.parent.relative_to(ROOT) for file in ROOT.glob("kd_lrp_plugin/**/__init__.py")}
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert named == sorted({*(".".join(p.parts) for p in found), "kd_lrp_plugin.configs"})
