"""What pyproject.toml cannot say: torchdistill_configs is installed as kd_lrp_plugin.configs."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["kd_lrp_plugin*"]), "kd_lrp_plugin.configs"],
    package_dir={"kd_lrp_plugin.configs": "torchdistill_configs"},
)
