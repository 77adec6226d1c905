"""Who may import whom, as CONTRIBUTING.md has it, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "kd_lrp_plugin"
LEVELS = {
    0: ("registry", "checks", "progress"),
    1: (
        *("config", "rules", "losses", "students", "efficiency", "phantom", "data"),
        *("processes", "runs", "spaces", "statistics", "splits", "fingerprints"),
    ),
    2: (
        *("propagation", "relevance", "evaluation", "localisation", "report"),
        *("comparison", "verdict", "leaks", "provenance", "tables", "findings"),
    ),
    3: ("scores", "selection", "ranking", "search", "quality", "attribution"),
    4: ("recipes", "question", "hook", "torchdistill"),
    5: (
        *("experiment", "meter", "sections", "checking", "results", "training"),
        *(
            "plan",
            "tally",
            "study",
            "subjects",
            "explaining",
            "pictures",
            "outputs",
            "contents",
            "page",
        ),
        *("console", "evidence", "cli"),
    ),
}
LEVEL = {module: level for level, modules in LEVELS.items() for module in modules}
WITHIN_A_LEVEL = {
    ("checks", "registry"),
    *(("data", other) for other in ("phantom", "splits")),
    ("spaces", "students"),
    ("relevance", "propagation"),
    ("sections", "experiment"),
    *(("checking", other) for other in ("experiment", "meter", "sections")),
    ("selection", "scores"),
    ("ranking", "selection"),
    *(("search", other) for other in ("selection", "ranking")),
    ("hook", "question"),
    *(("torchdistill", other) for other in ("recipes", "hook")),
    ("results", "experiment"),
    *(("training", other) for other in ("experiment", "meter", "checking", "results")),
    ("comparison", "report"),
    ("leaks", "verdict"),
    ("tally", "plan"),
    *(
        ("study", other)
        for other in ("plan", "tally", "experiment", "checking", "training", "results")
    ),
    ("subjects", "results"),
    ("explaining", "subjects"),
    ("outputs", "pictures"),
    *(("contents", other) for other in ("results", "outputs", "pictures")),
    *(("page", other) for other in ("contents", "outputs", "pictures")),
    *(("cli", other) for other in ("console", "experiment", "training", "checking", "results")),
    ("cli", "evidence"),
    *(("evidence", o) for o in ("console", "plan", "tally", "study", "explaining", "page")),
}
CORE = [module for module, level in LEVEL.items() if level < 4]


def imports(module: str) -> set[str]:
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def own(module: str) -> set[str]:
    names = {name.split(".")[1] for name in imports(module) if name.startswith("kd_lrp_plugin.")}
    return names & set(LEVEL)


def test_every_module_has_a_level():
    assert {file.stem for file in PACKAGE.glob("*.py")} - {"__init__"} == set(LEVEL)


def test_modules_import_only_what_lies_below():
    wrong = {
        (module, other)
        for module in LEVEL
        for other in own(module)
        if LEVEL[other] >= LEVEL[module] and (module, other) not in WITHIN_A_LEVEL
    }
    assert wrong == set()


def test_losses_know_nothing_of_relevance_and_the_report_nothing_of_the_package():
    assert not own("losses") & {"rules", "relevance", "propagation"}
    assert own("report") == set()


def test_only_the_rim_and_the_driver_import_torchdistill():
    users = {m for m in LEVEL if any(n.split(".")[0] == "torchdistill" for n in imports(m))}
    assert users == {"torchdistill", "recipes", "hook", "experiment", "sections", "training"}


def test_the_core_leaves_torchdistill_alone():
    code = "import sys, kd_lrp_plugin\n"
    code += "".join(f"import kd_lrp_plugin.{module}\n" for module in CORE)
    code += "assert not [m for m in sys.modules if m.split('.')[0] == 'torchdistill']"
    subprocess.run([sys.executable, "-c", code], check=True)
