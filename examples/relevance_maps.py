"""Relevance maps of one model: every method, at two layers, in one figure.

    python examples/relevance_maps.py
    python examples/relevance_maps.py --model mobilenetv2_100 --weights my.safetensors \
        --layers blocks.2 blocks.4 --classes cat dog --image-size 224 --images a.jpg b.jpg

Without weights the model first learns the built-in phantom for half a minute: an untrained one
has nothing to explain.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from kd_lrp_plugin.data.phantom.dataset import Phantom
from kd_lrp_plugin.data.phantom.drawing import CLASSES
from kd_lrp_plugin.data.transforms import make_transforms
from kd_lrp_plugin.models.factory import build_model
from kd_lrp_plugin.plots.maps import MapRow, map_figure
from kd_lrp_plugin.relevance.methods import METHODS
from kd_lrp_plugin.relevance.recording import relevance_maps


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    model = build_model(args.model, len(args.classes), weights=args.weights)
    if args.weights is None:
        learn_phantom(model, args.image_size, args.steps)
    model.eval()

    if args.images:
        pictures = [Image.open(path).convert("RGB") for path in args.images]
        names = [path.stem for path in args.images]
        masks = [None] * len(pictures)
    else:
        phantom = Phantom("test", size=4, image_size=args.image_size)  # one image of each class
        pictures = [phantom.image(i) for i in range(4)]
        names = [phantom.classes[label] for label in phantom.targets]
        masks = [phantom.mask(i) for i in range(4)]
    prepare = make_transforms(args.image_size)
    images = torch.stack([prepare(picture) for picture in pictures])
    with torch.no_grad():
        confidence, predicted = model(images).softmax(1).max(1)

    # One call per method: maps[method][layer] has shape (n, h, w).
    maps = {
        method: relevance_maps(model, images, predicted, args.layers, method) for method in METHODS
    }

    rows = []
    for i, name in enumerate(names):
        for place, layer in enumerate(args.layers):
            guess = f"{args.classes[predicted[i]]} {confidence[i]:.2f}"
            label = f"{name}\n(model: {guess})\n{layer}"
            heat = {method: maps[method][place][i].numpy() for method in METHODS}
            picture = pictures[i].resize((args.image_size, args.image_size))
            rows.append(MapRow(label, picture, heat, mask=masks[i]))
    figure = map_figure(rows, title=f"{args.model}: relevance of the predicted class")
    figure.savefig(args.out)
    print(f"saved {args.out}")


def learn_phantom(model: nn.Module, image_size: int, steps: int) -> None:
    data = DataLoader(Phantom("train", size=32 * steps, image_size=image_size), batch_size=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for images, labels in data:
        loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="resnet10t", help="a timm model (default: %(default)s)")
    add("--weights", type=Path, help="local .safetensors or .pth file of that model")
    add("--classes", nargs="+", default=CLASSES, help="names of its outputs, in their order")
    add(
        "--layers", nargs="+", default=["layer2", "layer3"], help="modules with (n, c, h, w) output"
    )
    add("--images", type=Path, nargs="+", help="image files (default: one phantom per class)")
    add("--image-size", type=int, default=64, help="side in pixels (default: %(default)s)")
    add("--steps", type=int, default=60, help="of learning, without weights (default: %(default)s)")
    add("--out", type=Path, default=Path("relevance_maps.png"), help="(default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
