"""A folder that ``timm.create_model("local-dir:...", pretrained=True)`` loads, and hubs take."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from kd_lrp_plugin.data.transforms import build_transform
from kd_lrp_plugin.evaluation.export.onnx_graph import KEYS
from kd_lrp_plugin.utils import files
from kd_lrp_plugin.utils.files import write_json
from kd_lrp_plugin.utils.validation import message

CONFIG, WEIGHTS = "config.json", "model.safetensors"
OURS = "kd_lrp"  # key of our own part of the config


def write_config(
    folder: Path,
    arguments: Mapping[str, Any],
    model: nn.Module,
    outputs: Sequence[str],
    about: Mapping[str, Any],
) -> None:
    """``config.json`` as timm reads it, with a part of our own.

    Args:
        folder: to write to.
        arguments: of ``timm.create_model``, "model_name" and "num_classes" among them.
        model: what they make.
        outputs: names of its outputs.
        about: :data:`KEYS`, and perhaps "subclass_of".
    """
    rest = {k: v for k, v in arguments.items() if k not in ("model_name", "num_classes")}
    of_timm: Mapping[str, Any] = getattr(model, "pretrained_cfg", {})
    policy = about["preprocessing"]
    config = {
        "architecture": arguments["model_name"],
        "num_classes": arguments["num_classes"],
        "num_features": getattr(model, "num_features", None),
        "label_names": list(outputs),
        "model_args": rest,
        "pretrained_cfg": {
            **{key: of_timm.get(key) for key in ("first_conv", "classifier")},
            "num_classes": arguments["num_classes"],
            "input_size": [policy["channels"], *policy["size"]],
            "fixed_input_size": bool(of_timm.get("fixed_input_size", False)),
            "pool_size": None,
            "mean": policy["mean"],
            "std": policy["std"],
            "interpolation": policy["interpolation"] or "bilinear",
            **_describe_crop(policy),
        },
        OURS: about,
    }
    write_json(folder / CONFIG, config)


def _describe_crop(policy: Mapping[str, Any]) -> dict[str, Any]:
    """How timm cuts an image: all of it squashed into the size, or the centre of its sides."""
    if policy["crop"] is None or not isinstance(policy["resize"], int):
        return {"crop_mode": "squash", "crop_pct": 1.0}
    return {"crop_mode": "center", "crop_pct": policy["crop"][0] / policy["resize"]}


def load_folder(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a folder that :func:`write_config` describes, and our part of the config.

    Raises:
        FileNotFoundError: if its weights are missing.
        ValueError: if the config is damaged or not of our making.
    """
    fix = "Give a folder that kd-lrp export has written."
    about = files.read_json(folder / CONFIG, fix, **{OURS: dict, "architecture": str})[OURS]
    files.check_keys(folder / CONFIG, about, fix, **dict.fromkeys(KEYS, object))
    if not (folder / WEIGHTS).is_file():
        got = f"none in {folder}"
        raise FileNotFoundError(message("timm folder", f"a file {WEIGHTS}", got, fix))
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except Exception as error:  # timm raises what the config leads it to
        got = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        raise ValueError(message(str(folder), "a model that timm builds", got, fix)) from error
    return model.eval(), about


def prepares_alike(model: nn.Module, policy: Mapping[str, Any]) -> bool:
    """Whether timm alone reads images, and prepares them by a model's config, by the policy."""
    if policy["bits"] is not None:  # Pillow's convert("RGB") cuts values off above 8 bits
        return False
    prepare = create_transform(**resolve_model_data_config(model))
    noise = torch.randint(256, (61, 83, 3), generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(noise.to(torch.uint8).numpy())
    try:
        return torch.equal(prepare(image), build_transform(policy)(image))
    except (ValueError, RuntimeError):
        return False


def write_example(model: nn.Module, about: Mapping[str, Any]) -> str:
    """Python that loads the folder and classifies an image, as far as timm alone can do it."""
    lines = [
        "import timm",
        "",
        'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()',
    ]
    if prepares_alike(model, about["preprocessing"]):
        lines += [
            "data = timm.data.resolve_model_data_config(model)",
            "prepare = timm.data.create_transform(**data)",
            'image = prepare(Image.open("image.png").convert("RGB"))',
            "logits = model(image[None])",
        ]
        lines.insert(1, "from PIL import Image")
    else:
        lines.append(f"# timm has no transform for its images: see {OURS!r} in {CONFIG}")
    if about.get("subclass_of"):
        lines.append(f"# outputs are subclasses: 'subclass_of' of {OURS!r} says their classes")
    return "\n".join([*lines, "# or, in a shell: kd-lrp predict FOLDER image.png", ""])
