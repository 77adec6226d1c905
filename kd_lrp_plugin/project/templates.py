"""The text of the files of a project."""

import json
from collections.abc import Mapping, Sequence
from string import Template

from kd_lrp_plugin.plots import tables
from kd_lrp_plugin.plots.text import plain_text
from kd_lrp_plugin.project.choices import CANDIDATES, Choices, Models
from kd_lrp_plugin.project.listing import KINDS, Listing

TEACHER_FILE = "runs/teacher/best.pt"
COMMANDS = {
    "teacher": "kd-lrp distill teacher.yaml --out runs/teacher",
    "select": "kd-lrp select select.yaml",
    "student": "kd-lrp distill student.yaml --out runs/student",
    "evaluate": "kd-lrp evaluate runs/teacher runs/student",
    "explain": "kd-lrp explain runs/student",
    "study": "kd-lrp study study.yaml",
    "report": "kd-lrp report runs/teacher runs/student runs/studies/study --data-check checked "
    "--selection runs/select.json --out page.html",
}
_DOES = {
    "teacher": "trains the teacher",
    "select": "ranks untrained students, by a score and by their size; another student by `kd-lrp "
    "distill select.yaml` or `--student`",
    "student": "trains the student, taught by the teacher",
    "evaluate": "tests both: by class, calibration, agreement, cost",
    "explain": "maps of both, side by side, and what they are worth",
    "study": "compares labels alone, soft labels and the method, with three seeds each",
    "report": "makes one page of it all",
}

_DATA = Template("""\
# What all configs here begin with: the images, their loaders and the optimizer.

dependencies: [kd_lrp_plugin.torchdistill]

# Seen from this folder, in which the commands run. The table says which image is in which split.
root: &root $root
manifest: &manifest checked/clean_split.csv
classes: &classes $classes
num_classes: &num_classes $n

image_size: &image_size $image_size
batch_size: &batch_size $batch_size
num_workers: &num_workers $workers

datasets:
$datasets
train:
  log_freq: 20
  num_epochs: &num_epochs $epochs
  train_data_loader:
    dataset_id: *train_set
    sampler:
      class_or_func: !import_get {key: torch.utils.data.RandomSampler}
    kwargs: {batch_size: *batch_size, num_workers: *num_workers, drop_last: True}
  val_data_loader:
    dataset_id: *val_set
    sampler: &in_order
      class_or_func: !import_get {key: torch.utils.data.SequentialSampler}
    kwargs: &val_kwargs {batch_size: *batch_size, num_workers: *num_workers}
  optimizer:
    key: Adam
    kwargs: {lr: 0.001}
  scheduler:
    key: OneCycleLR
    kwargs: {max_lr: 0.001, total_steps: *num_epochs}
  criterion:
    key: DisWOTPlusLoss
    kwargs:
      # Against imbalance: n / (classes * images of the class); null weighs all classes alike.
      class_weights: $class_weights

test:
  test_data_loader:
    dataset_id: *test_set
    sampler: *in_order
    kwargs: *val_kwargs
""")
_DATASET = Template("""\
  &${kind}_set project/$kind:$anchor !import_call
    key: kd_lrp_plugin.torchdistill.folder_images
    init:
      kwargs:
        root: *root
        manifest: *manifest
        split: $split
        part: $part
        holdout: $holdout
        classes: *classes
        image_size: *image_size
        augment: $augment
        bits: $bits
""")
_CLASS_WEIGHTS = """\
!import_call
        key: kd_lrp_plugin.torchdistill.class_weights
        init: {kwargs: {dataset: *train_images}}"""
_TEACHER = Template("""\
# Question: how good is the teacher on these images, from labels alone?
# Run: ${command}

_base_: data.yaml

models:
  model:
    key: timm_model
    kwargs:
      name: $name
      num_classes: *num_classes
      weights: $weights
      pretrained: $pretrained
    src_ckpt:

train:
  model:
    forward_proc: forward_batch_only
  criterion:
    kwargs: {alpha: 1, beta: 0, gamma: 0, delta: 0}
""")
_TAUGHT = Template("""\
# Question: what does the student learn from labels and soft labels?
# Run: ${command}

_base_: data.yaml

models:
  teacher_model: &teacher
    key: timm_model
    kwargs: {name: $teacher, num_classes: *num_classes}
    src_ckpt: $file
    _made_by: $made_by
  student_model:
    key: timm_model
    kwargs:
      name: $name
      num_classes: *num_classes
      weights: $weights
      pretrained: $pretrained
    src_ckpt:

train:
  teacher:
    requires_grad: False
    forward_proc: forward_batch_only
  student:
    forward_proc: forward_batch_only
  criterion:
    kwargs:
      alpha: 0.5  # cross entropy
      beta: 0.5  # KL divergence
      gamma: 0  # semantic: relevance maps
      delta: 0  # relation: features of the images of a batch
      temperature: 4.0
""")
_STUDENT = Template("""\
# Question: does the student learn more if it looks where its teacher looks?
# Run: ${command}

_base_: kd.yaml

train:
$fading  teacher:
    forward_proc: !import_call
      key: kd_lrp_plugin.torchdistill.recorder
      init:
        kwargs: {layers: $teacher_layers, method: gradient_activation}
  student:
    forward_proc: !import_call
      key: kd_lrp_plugin.torchdistill.recorder
      init:
        kwargs: {layers: $student_layers, method: gradient_activation}
  criterion:
    kwargs:
$terms""")
_FADING = """\
  pre_epoch_process: !import_call
    key: kd_lrp_plugin.torchdistill.weight_schedule
    init: {kwargs: {terms: {semantic: {until: 0.7}}}}
"""
_TERMS = {
    "lrp_relative_l2": """\
      alpha: 0.015
      beta: 0.015
      gamma: 0.97
      semantic: {key: LRPRelativeL2Loss, kwargs: {target: contrast, signed: True}}
""",
    "lrp_cosine": """\
      alpha: 0.4
      beta: 0.4
      gamma: 0.1
      delta: 0.1
      semantic: {key: LRPSemanticCosineLoss, kwargs: {target: label}}
      relation: {key: RelationCosineLoss, kwargs: {}}
""",
}
_SELECT = Template("""\
# Question: which untrained student does a score choose for this teacher?
# Run: ${command}

_base_: $base

models:
  student_model: !replace
    key: diswot_student
    kwargs:
      num_classes: *num_classes
      candidates: $candidates
      teacher: *teacher
      data: *train_images
      score: diswot
      budget: [params=$budget]
      batch_size: $batch_size
      seeds: [0, 1, 2]
      record: runs/select.json
""")
_STUDY = Template("""\
# Question: what do soft labels and relevance add to labels, on these images?
# Run: ${command}

question: What do soft labels and relevance add to labels, on these images?
seeds: 3
configurations:
  CE:
    config: teacher.yaml
    set:
      - $name
      - $weights
$taught
compare_to: KD
measures: [test_accuracy, val_accuracy, macro_f1]
""")
_README = Template("""\
# Students for $title

Give the commands in this folder, in this order; nothing has to be edited. A command that was
stopped resumes when it is rerun.

```sh
$commands
```

$times

The times are for this machine ($machine), estimated from one step of training and one batch of
images, measured when this folder was made; whatever else the machine does makes them longer.

## The images

$images, $layout: $count images of $classes classes.

$table

$reasons

What is left out, and why, is in [checked/summary.json](checked/summary.json):

```text
$summary
```

## The files

| file | what it is |
|---|---|
| `data.yaml` | images, classes, loaders and optimizer: what the others begin with |
| `teacher.yaml` | the teacher |
$files
| `select.yaml` | many untrained students, of which a score chooses one |
| `study.yaml` | labels alone, soft labels and the method, three seeds each |
| `checked/` | the leak check, and the table of which image is in which split |

Each can be changed by hand or by `--set`, such as `--set batch_size=64`; `kd-lrp check FILE` looks
it through. The paths in them are seen from this folder. Nothing here is fit for clinical use.
$made""")


def render_configs(choices: Choices, models: Models, root: str) -> dict[str, str]:
    """The YAML files by name, but for the study.

    Args:
        choices: what they say.
        models: as asked; paths as seen from the project.
        root: the images, as seen from the project.
    """
    names = {role: _quote(models.names[role]) for role in models.names}
    begin = {
        role: {
            "weights": _quote(models.weights[role]) if role in models.weights else "null",
            "pretrained": str(models.pretrained),
        }
        for role in names
    }
    taught = "student" if models.method == "kd" else "kd"
    texts = {
        "data.yaml": _render_data(choices, root),
        "teacher.yaml": _TEACHER.substitute(
            command=COMMANDS["teacher"], name=names["teacher"], **begin["teacher"]
        ),
        f"{taught}.yaml": _TAUGHT.substitute(
            command=COMMANDS["student"].replace("student", taught),
            teacher=names["teacher"],
            file=TEACHER_FILE,
            made_by=COMMANDS["teacher"],
            name=names["student"],
            **begin["student"],
        ),
    }
    if models.method != "kd":
        fades = models.method == "lrp_relative_l2" and not models.shortcut
        texts["student.yaml"] = _STUDENT.substitute(
            command=COMMANDS["student"],
            fading=_FADING if fades else "",
            teacher_layers=_quote(choices.layers["teacher"]),
            student_layers=_quote(choices.layers["student"]),
            terms=_TERMS[models.method],
        )
    student, teacher = models.names["student"], models.names["teacher"]
    candidates = dict.fromkeys([student, *(name for name in CANDIDATES if name != teacher)])
    texts["select.yaml"] = _SELECT.substitute(
        command=COMMANDS["select"],
        base=f"{taught}.yaml",
        candidates=_quote(list(candidates)),
        budget=choices.budget,
        batch_size=min(32, choices.images["train"]),
    )
    return texts


def _render_data(choices: Choices, root: str) -> str:
    is_cut = choices.splits["val"] is None
    parts = {"train": "train", "val": "validation", "test": "all"}
    datasets = [
        _DATASET.substitute(
            kind=kind,
            anchor=" &train_images" if kind == "train" else "",
            split=_quote(choices.splits[kind] or choices.splits["train"]),
            part=parts[kind] if is_cut else "all",
            holdout=choices.holdout,
            augment=kind == "train",
            bits="null" if choices.bits is None else choices.bits,
        )
        for kind in KINDS
    ]
    return _DATA.substitute(
        root=_quote(root),
        classes=_quote(choices.classes),
        n=len(choices.classes),
        image_size=choices.image_size,
        batch_size=choices.batch_size,
        workers=choices.workers,
        datasets="".join(datasets),
        class_weights=_CLASS_WEIGHTS if choices.is_weighed else "null",
        epochs=choices.epochs,
    )


def render_study(models: Models, common: Sequence[str] = ()) -> str:
    """study.yaml.

    Args:
        models: as for :func:`render_configs`.
        common: further overrides of the students that are taught.
    """
    weights = _quote(models.weights["student"]) if "student" in models.weights else "null"
    files = {"KD": "student.yaml" if models.method == "kd" else "kd.yaml"}
    if models.method != "kd":
        files[models.method] = "student.yaml"
    taught = [
        f"  {name}: {{config: {file}, set: {_quote(list(common))}}}" for name, file in files.items()
    ]
    if not common:
        taught = [f"  {name}: {{config: {file}}}" for name, file in files.items()]
    return _STUDY.substitute(
        command=COMMANDS["study"],
        name=_quote(f"models.model.kwargs.name={_quote(models.names['student'])}"),
        weights=_quote(f"models.model.kwargs.weights={weights}"),
        taught="\n".join(taught),
    )


def render_readme(
    choices: Choices,
    models: Models,
    listing: Listing,
    about: Mapping[str, str],
    times: Mapping[str, float],
) -> str:
    """README.md.

    Args:
        choices, models: what the files say.
        listing: of the images.
        about: the command that made the project, the machine, and what the leak check says.
        times: seconds of each command.
    """
    rows = [
        {"split": name, **counts, "all images": sum(counts.values())}
        for name, counts in choices.counts.items()
    ]
    words = [
        {
            "command": f"{number}: {name}",
            "what it does": _DOES[name],
            "expected": describe_seconds(times[name]),
        }
        for number, name in enumerate(COMMANDS, 1)
    ]
    kd = "" if models.method == "kd" else "| `kd.yaml` | the student, from soft labels alone |\n"
    return _README.substitute(
        title=plain_text(listing.folder.resolve().name),
        made=f"\nMade by `{plain_text(about['command'])}`.\n" if about["command"] else "",
        commands="\n".join(COMMANDS.values()),
        times=tables.table(words),
        machine=about["machine"],
        images=plain_text(str(listing.folder)),
        layout=listing.layout,
        count=f"{len(listing.images):,}",
        classes=len(choices.classes),
        table=tables.table(rows, list(dict.fromkeys(key for row in rows for key in row))),
        reasons="\n".join(f"- {plain_text(reason)}" for reason in choices.reasons),
        summary=about["summary"],
        files=f"{kd}| `student.yaml` | the student, by {models.method} |",
    )


def describe_seconds(seconds: float) -> str:
    """A time as people say it.

    Example:
        >>> [describe_seconds(s) for s in (3, 44, 200, 9000, 300_000)]
        ['under 10 seconds', '40 seconds', '3 minutes', '2.5 hours', '3.5 days']
    """
    if seconds < 10:
        return "under 10 seconds"
    if seconds < 90:
        return f"{round(seconds, -1):.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    if seconds < 130_000:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 86400:.1f} days"


def _quote(value: object) -> str:
    """A value as JSON, which is YAML whatever is in it."""
    return json.dumps(value, ensure_ascii=False)
