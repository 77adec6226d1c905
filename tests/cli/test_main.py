"""The command line is quick until it computes, and completes names that cannot drift."""

import os
import pickle
import resource
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from small_runs import KD
from typer.testing import CliRunner

import kd_lrp_plugin
from kd_lrp_plugin.attribution.methods import ATTRIBUTIONS
from kd_lrp_plugin.cli import completion
from kd_lrp_plugin.cli.main import app
from kd_lrp_plugin.evaluation.export.export import FORMATS
from kd_lrp_plugin.relevance.methods import METHODS
from kd_lrp_plugin.selection.scores.registry import SCORES

COMMANDS = (
    *("distill", "check", "evaluate", "select", "predict", "study", "check-data", "explain"),
    *("report", "configs", "export", "init"),
)
HEAVY = ("torch", "torchvision", "timm", "captum", "numpy", "scipy", "matplotlib", "torchdistill")
TOLD = (
    "import atexit, sys\n"
    "def tell():\n"
    f"    found = [name for name in {HEAVY} if name in sys.modules]\n"
    "    print('heavy:', found, file=sys.stderr)\n"
    "atexit.register(tell)\n"
)


def run(*words: str, **variables: str) -> tuple[subprocess.CompletedProcess, float]:
    """The command in a process that ends by telling what it has imported, and its CPU time."""
    code = f"{TOLD}sys.argv = {['kd-lrp', *words]!r}\nfrom kd_lrp_plugin.cli.main import app\napp()"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = {**os.environ, **variables}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ran, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


class TestLight:
    @pytest.mark.parametrize(
        "words", [["--help"], ["--version"], *([c, "--help"] for c in ("distill", "explain"))]
    )
    def test_help_needs_no_pytorch_and_little_time(self, words):
        ran, seconds = run(*words)
        assert ran.returncode == 0, ran.stderr
        assert "heavy: []" in ran.stderr
        assert seconds < 1.5  # of CPU, which a busy machine does not stretch much; 0.2 measured

    def test_the_help_of_every_command_shows_an_example(self):
        for command in COMMANDS:
            shown = CliRunner().invoke(app, [command, "--help"])
            assert shown.exit_code == 0
            assert f"kd-lrp {command} " in " ".join(shown.output.split())

    @pytest.mark.parametrize("module", ["kd_lrp_plugin", "kd_lrp_plugin.cli"])
    def test_modules_are_commands(self, module):
        ran = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True)
        assert ran.stdout.decode() == f"kd-lrp {kd_lrp_plugin.__version__}\n"

    def test_the_console_script_is_this_app(self):
        found = [e for e in entry_points(group="console_scripts") if e.name == "kd-lrp"]
        assert not found or found[0].value == "kd_lrp_plugin.cli.main:app"


class TestCompletion:
    def test_names_are_those_of_the_registries(self):
        assert set(completion.METHODS) == set(METHODS)
        assert set(completion.ATTRIBUTIONS) == set(ATTRIBUTIONS)
        assert set(completion.SCORES) == set(SCORES)
        assert completion.FORMATS == FORMATS

    @pytest.mark.parametrize(
        ("typed", "offered"),
        [
            ("kd-lrp explain RUN --method lrp_c", ["lrp_composite"]),
            ("kd-lrp explain RUN --method ", list(completion.ATTRIBUTIONS)),
            ("kd-lrp explain RUN --model t", ["teacher"]),
            ("kd-lrp export RUN --format o", ["onnx"]),
            ("kd-lrp configs phantom/kd/", ["phantom/kd/test_resnet_from_resnet10t"]),
            (f"kd-lrp distill {KD} --set image", ["image_size="]),
            (
                f"kd-lrp distill {KD} --set train.teacher.forward_proc.init.kwargs.method=lrp_z",
                ["train.teacher.forward_proc.init.kwargs.method=lrp_zplus"],
            ),
            (
                "kd-lrp select my.yaml --set models.student_model.kwargs.score=nw",
                ["models.student_model.kwargs.score=nwot"],
            ),
        ],
    )
    def test_tab_offers_names_without_pytorch(self, typed, offered):
        words = typed.split(" ")
        ran, seconds = run(
            _KD_LRP_COMPLETE="complete_fish",
            _TYPER_COMPLETE_ARGS=typed,
            _TYPER_COMPLETE_FISH_ACTION="get-args",
            COMP_WORDS=typed,
            COMP_CWORD=str(len(words) - 1),
        )
        found = [line.split("\t")[0] for line in ran.stdout.splitlines()]
        assert sorted(found) == sorted(offered), ran.stderr
        assert "heavy: []" in ran.stderr
        assert seconds < 1.5


class TestLazyNames:
    def test_every_name_is_there_and_is_what_its_module_has(self):
        for name in kd_lrp_plugin.__all__:
            value = getattr(kd_lrp_plugin, name)
            module = getattr(value, "__module__", None)
            if name not in ("LOSSES", "METHODS", "RULES"):
                assert getattr(sys.modules[module], name) is value
                assert pickle.loads(pickle.dumps(value)) is value
        assert set(kd_lrp_plugin.__all__) <= set(dir(kd_lrp_plugin))

    def test_what_type_checkers_read_is_what_is_loaded(self):
        """The imports under TYPE_CHECKING, __all__ and the lazy table name the same things."""
        import ast
        from pathlib import Path

        tree = ast.parse(Path(kd_lrp_plugin.__file__).read_text(encoding="utf-8"))
        (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
        found = {
            alias.name: node.module
            for node in checked.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        lazy = {
            name: f"kd_lrp_plugin.{kd_lrp_plugin._MODULES.get(name, 'losses')}"
            for name in kd_lrp_plugin.__all__
        }
        assert found == lazy

    @pytest.mark.parametrize(
        "code",
        [
            "from kd_lrp_plugin import *; assert semantic_cosine and METHODS",
            pytest.param(
                "from kd_lrp_plugin import record as r; "
                "import kd_lrp_plugin.relevance.recording as m; assert r is m.record",
                marks=pytest.mark.slow,
            ),
            pytest.param(
                "import kd_lrp_plugin as k; assert k.losses.semantic_cosine is k.semantic_cosine",
                marks=pytest.mark.slow,
            ),
            "import kd_lrp_plugin as k, sys; assert k.__version__ and 'torch' not in sys.modules; "
            "assert 'semantic_cosine' in dir(k); assert 'torch' not in sys.modules",
            "import kd_lrp_plugin.torchdistill as t; assert t.recorder",
        ],
    )
    def test_in_a_fresh_process(self, code):
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_an_unknown_name_is_an_attribute_error(self):
        with pytest.raises(AttributeError, match="no attribute 'semantic_cosin'"):
            _ = kd_lrp_plugin.semantic_cosin
        with pytest.raises(ImportError, match="nothing_of_the_kind"):
            exec("from kd_lrp_plugin import nothing_of_the_kind")
