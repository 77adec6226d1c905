"""torchdistill's own methods, one epoch each through our trainer, alone and beside our terms.

What a method needs is here: hooks, auxiliary wrappers, adaptations, frozen parts, trained
teachers, data set wrappers, stages. Each method's loss must be a finite number in training, and
each validation must count every image.
"""

import json
import math
from textwrap import indent
from typing import Any

import pytest
import yaml

from kd_lrp_plugin.config.run_spec import RunSpec
from kd_lrp_plugin.training.trainer import distill

HEAD = """\
dependencies: [kd_lrp_plugin.torchdistill]
datasets:
  phantom/train: !import_call
    key: kd_lrp_plugin.torchdistill.phantom
    init: {kwargs: {split: train, size: 8, image_size: 48}}
  phantom/val: !import_call
    key: kd_lrp_plugin.torchdistill.phantom
    init: {kwargs: {split: val, size: 9, image_size: 48}}  # a last batch of one
models:
  teacher_model: {key: timm_model, kwargs: {name: test_resnet, num_classes: 4}, src_ckpt: }
  student_model: {key: timm_model, kwargs: {name: test_resnet, num_classes: 4}, dst_ckpt: }
train:
"""
LOADERS = """\
num_epochs: 1
train_data_loader:
  dataset_id: phantom/train
  sampler: {class_or_func: !import_get {key: torch.utils.data.RandomSampler}}
  kwargs: {batch_size: 8}
  dataset_wrapper: %s
val_data_loader: &val
  dataset_id: phantom/val
  sampler: {class_or_func: !import_get {key: torch.utils.data.SequentialSampler}}
  kwargs: {batch_size: 8}
optimizer: {key: SGD, kwargs: {lr: 1.0e-12}}  # between random networks some losses are 1e8
"""
TEST = """\
test:
  test_data_loader:
    dataset_id: phantom/val
    sampler: {class_or_func: !import_get {key: torch.utils.data.SequentialSampler}}
    kwargs: {batch_size: 1}
"""
LOGITS = {f"{r}_module_{what}": v for r in ("student", "teacher") for what, v in
          (("path", "."), ("io", "output"))}  # fmt: skip
RECORDER = "!import_call {key: kd_lrp_plugin.torchdistill.recorder, init: {kwargs: %s}}"


def at(path: str) -> dict[str, str]:
    return {"path": path, "io": "output"}


def term(key: str, **kwargs: Any) -> dict[str, Any]:
    return {"criterion": {"key": key, "kwargs": kwargs}, "weight": 1.0}


def wrapped_term(key: str, **kwargs: Any) -> dict[str, Any]:
    """A loss of torch between what SimpleLossWrapper takes from the models."""
    wrapper = {"key": "SimpleLossWrapper", "kwargs": kwargs}
    return {"criterion": {"key": key, "kwargs": {}}, "criterion_wrapper": wrapper, "weight": 1.0}


KD = term("KDLoss", **LOGITS, temperature=4.0, alpha=0.5)
OF_LABELS = {"uses_label": True}
CE = wrapped_term(
    "CrossEntropyLoss",
    input={"is_from_teacher": False, "module_path": ".", "io": "output"},
    target=OF_LABELS,
)


def role(*outputs: str, wrapper: tuple[str, dict] | None = None, **more: Any) -> dict[str, Any]:
    config = {"forward_proc": "forward_batch_only", "requires_grad": True, **more}
    if outputs:
        config["forward_hook"] = {"input": [], "output": list(outputs)}
    if wrapper is not None:
        config["auxiliary_model_wrapper"] = {"key": wrapper[0], "kwargs": wrapper[1]}
    return config


def stage(teacher: dict, student: dict, wrapper: Any = None, **terms: Any) -> dict[str, Any]:
    criterion = {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}}
    return {"teacher": teacher, "student": student, "criterion": criterion, "wrapper": wrapper}


def simple(*terms: str, **kwargs: Any) -> list[dict[str, Any]]:
    """One stage of a loss between logits."""
    own = {key.lower(): term(key, **{**LOGITS, **kwargs}) for key in terms}
    return [stage(role(requires_grad=False), role(), None, ce=CE, **own)]


FROZEN = {"requires_grad": False}
PAIR = {"teacher": at("layer3"), "student": at("layer3"), "weight": 1.0}
OUTPUTS_OF_STAGES = [
    stage(
        role(requires_grad=False, sequential=["conv1", "bn1", "act1", "maxpool", "layer1"]),
        role(
            sequential=["conv1", "bn1", "act1", "maxpool", "layer1", "+regressor"],
            adaptations={
                "regressor": {
                    "key": "Conv2d",
                    "kwargs": {"in_channels": 32, "out_channels": 32, "kernel_size": 1},
                }
            },
            forward_hook={"input": [], "output": ["+regressor"]},
        ),
        hint=wrapped_term(
            "MSELoss",
            input={"is_from_teacher": False, "module_path": "+regressor", "io": "output"},
            target={"is_from_teacher": True, "module_path": "layer1", "io": "output"},
        ),
    ),
    stage(role(requires_grad=False), role(), kd=KD),
]
OUTPUTS_OF_STAGES[0]["teacher"]["forward_hook"] = {"input": [], "output": ["layer1"]}


def linear(kind: str, **more: Any) -> tuple[str, dict]:
    kwargs = {"linear_kwargs": {"in_features": 96, "out_features": 16}, **more}
    return kind, kwargs


CRD_ROLE = {"forward_proc": "forward_batch_supp_dict"}
CRD_WRAPPER = linear("Linear4CRD", input_module_path="model.global_pool", power=2)
CCKD_WRAPPER = linear("Linear4CCKD", input_module=at("model.global_pool"))
SSKD_TEACHER = {"input_module": at("model.global_pool"), "feat_dim": 96}
EMPTY = role(wrapper=("EmptyModule", {}), requires_grad=False)


def sskd(folder: str) -> list[dict[str, Any]]:
    def ss(who: str, freezes: bool) -> tuple[str, dict]:
        file = f"{folder}/{who}.pt"
        kwargs = {**SSKD_TEACHER, "freezes_ss_module": freezes, "ss_module_ckpt": file}
        return "SSWrapper4SSKD", kwargs

    views = {"forward_proc": "forward_batch4sskd"}
    hooks = ("model.global_pool", "model.fc", "ss_module")
    return [
        stage(
            role(*hooks, wrapper=ss("t", False), frozen_modules=["model"], **views),
            EMPTY,
            {"key": "SSKDDatasetWrapper", "kwargs": {}},
            aux=term("AuxSSKDLoss", module_path="ss_module", module_io="output"),
        ),
        stage(
            role(*hooks, wrapper=ss("t", True), **views, **FROZEN),
            role(*hooks, wrapper=ss("s", False), **views),
            {"key": "SSKDDatasetWrapper", "kwargs": {}},
            sskd=term(
                "SSKDLoss",
                student_linear_module_path="model.fc",
                teacher_linear_module_path="model.fc",
                student_ss_module_path="ss_module",
                teacher_ss_module_path="ss_module",
                kl_temp=4.0,
                ss_temp=0.5,
                tf_temp=4.0,
                ss_ratio=0.75,
                tf_ratio=1.0,
                loss_weights=[1.0, 0.9, 10.0, 2.7],
            ),
        ),
    ]


METHODS = {
    "kd": simple("KDLoss", temperature=4.0, alpha=0.5),
    "dist": simple("DISTLoss"),
    "skd": simple("SKDInstanceLoss", "SKDDirectionLoss"),
    "rkd": simple(
        "RKDLoss", **{f"{r}_output_path": "." for r in ("student", "teacher")},
        dist_factor=1.0, angle_factor=2.0, reduction="mean",
    ),
    "at": [
        stage(role("layer3", **FROZEN), role("layer3"), ce=CE,
              at=term("ATLoss", at_pairs={"pair": PAIR}, mode="code")),
    ],
    "sp": [
        stage(role("layer3", **FROZEN), role("layer3"), ce=CE,
              sp=term("SPKDLoss", student_output_path="layer3", teacher_output_path="layer3",
                      reduction="batchmean")),
    ],
    "pkt": [
        stage(role("global_pool", **FROZEN), role("global_pool"), ce=CE,
              pkt=term("PKTLoss", student_module_path="global_pool", student_module_io="output",
                       teacher_module_path="global_pool", teacher_module_io="output")),
    ],
    "fitnet": OUTPUTS_OF_STAGES,
    "vid": [
        stage(
            role("layer2", **FROZEN),
            role(
                "student_model.layer2", "regressor_dict.one",
                wrapper=("VariationalDistributor4VID", {"regressors": {"one": {
                    **at("student_model.layer2"),
                    "kwargs": {"in_channels": 48, "middle_channels": 48,
                                         "out_channels": 48, "eps": 1e-5, "init_pred_var": 5.0},
                }}}),
            ),
            ce=CE,
            vid=term("VIDLoss", feature_pairs={"pair": {
                "teacher": at("layer2"), "student": at("regressor_dict.one"), "weight": 1.0,
            }}, margin=1.0),
        )
    ],
    "cckd": [
        stage(
            role("model.global_pool", "linear", wrapper=CCKD_WRAPPER, frozen_modules=["model"]),
            role("model.global_pool", "linear", wrapper=CCKD_WRAPPER),
            ce=CE,
            cckd=term("CCKDLoss", student_linear_path="linear", teacher_linear_path="linear",
                      kernel_config={"type": "gaussian", "gamma": 0.4, "max_p": 2},
                      reduction="batchmean"),
        )
    ],
    "crd": [
        stage(
            role("model.global_pool", "normalizer", wrapper=CRD_WRAPPER,
                 frozen_modules=["model"]) | CRD_ROLE,
            role("model.global_pool", "normalizer", wrapper=CRD_WRAPPER) | CRD_ROLE
            | {"forward_hook": {"input": ["empty"], "output": ["model.global_pool", "normalizer"]}},
            {"key": "CRDDatasetWrapper",
             "kwargs": {"num_negative_samples": 4, "mode": "exact", "ratio": 1.0}},
            kd=KD,
            crd=term("CRDLoss", teacher_norm_module_path="normalizer",
                     student_norm_module_path="normalizer", student_empty_module_path="empty",
                     input_size=16, output_size=16, num_negative_samples=4, num_samples=16),
        )
    ],
    "at beside relevance": [
        stage(
            role("layer3", **FROZEN, recorder="{layers: auto}"),
            role("layer3", recorder="{layers: auto}"),
            ce=CE,
            at=term("ATLoss", at_pairs={"pair": PAIR}, mode="code"),
            hint=wrapped_term(
                "MSELoss",
                input={"is_from_teacher": False, "module_path": "layer3", "io": "output"},
                target={"is_from_teacher": True, "module_path": "layer3", "io": "output"},
            ),
            maps=term("LRPRelativeL2Loss", signed=True, target="contrast"),
            relation=term("RelationCosineLoss"),
        )
    ],
    "relevance behind a wrapper": [
        stage(
            role(**FROZEN, recorder="{layers: [layer2]}"),
            role("model.global_pool", "linear", wrapper=CCKD_WRAPPER,
                 recorder="{layers: [layer2]}"),
            ce=CE,
            maps=term("LRPSemanticCosineLoss"),
        )
    ],
}  # fmt: skip


def config(stages: list[dict[str, Any]]) -> str:
    text = HEAD
    for number, parts in enumerate(stages, start=1):
        parts = dict(parts)
        body = LOADERS % json.dumps(parts.pop("wrapper"))
        procedures = {}
        for who in ("teacher", "student"):
            parts[who] = dict(parts[who])
            if recorder := parts[who].pop("recorder", None):
                procedures[f"RECORDER_OF_{who}"] = RECORDER % recorder
                parts[who]["forward_proc"] = f"RECORDER_OF_{who}"
        body += yaml.safe_dump(json.loads(json.dumps(parts)))  # without YAML's own aliases
        for name, call in procedures.items():
            body = body.replace(name, call)
        if number > 1:
            body = body.replace("&val", "")
        text += indent(body if len(stages) == 1 else f"stage{number}:\n{indent(body, '  ')}", "  ")
    return text + TEST


@pytest.mark.parametrize("name", [*METHODS, "sskd"])
def test_a_method_of_torchdistills_trains_and_validates(name, tmp_path):
    stages = sskd(str(tmp_path)) if name == "sskd" else METHODS[name]
    file = tmp_path / "method.yaml"
    file.write_text(config(stages))
    summary = distill(RunSpec(str(file), out=tmp_path / "run"))
    epochs = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert len(epochs) == len(stages)
    for epoch, parts in zip(epochs, stages, strict=True):
        for term_name in parts["criterion"]["kwargs"]["sub_terms"]:
            assert math.isfinite(epoch[f"train_{term_name}"])
            validates = parts["wrapper"] is None
            assert (f"val_{term_name}" in epoch) == validates
            assert not validates or math.isfinite(epoch[f"val_{term_name}"])
        right = 9 * epoch["val_accuracy"]  # a share of all nine images
        assert right == pytest.approx(round(right), abs=1e-6)
        assert 0 <= right <= 9
    assert len((tmp_path / "run/predictions.csv").read_text().splitlines()) == 1 + 9
    assert 0 <= summary["test_accuracy"] <= 1
