"""Explanation-guided distillation in a plain PyTorch loop; no torchdistill.

    python examples/plain_loop.py

Copy the four marked places into your own loop.
"""

import argparse

import timm
import torch
from torch.nn import functional
from torch.utils.data import DataLoader

from kd_lrp_plugin.data.phantom.dataset import Phantom
from kd_lrp_plugin.losses import kl_divergence, relation_cosine, resize_maps, semantic_cosine
from kd_lrp_plugin.relevance.recording import record

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--epochs", type=int, default=5, help="default: %(default)s")
parser.add_argument("--method", default="gradient_activation", help="default: %(default)s")
args = parser.parse_args()

torch.manual_seed(0)
loader = DataLoader(Phantom(size=48, image_size=64, cache=True), batch_size=16, shuffle=True)

# Stands for the teacher that you have: ten epochs of ordinary training.
teacher = timm.create_model("resnet10t", num_classes=4)
optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-3)
for _ in range(10):
    for images, labels in loader:
        optimizer.zero_grad()
        functional.cross_entropy(teacher(images), labels).backward()
        optimizer.step()

# 1. The teacher is frozen and in eval mode.
teacher.eval().requires_grad_(False)
student = timm.create_model("resnet10t", num_classes=4)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)

# 2. Layers to compare, pair by pair; ahead of the last, where the methods differ.
TEACHER_LAYERS, STUDENT_LAYERS = ["layer2", "layer3"], ["layer2", "layer3"]
WEIGHTS = {"ce": 0.3, "kl": 0.3, "semantic": 0.2, "relation": 0.2}


def distill_step(images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    # 3. Record the forward passes that happen anyway.
    with record(teacher, TEACHER_LAYERS, args.method) as of_teacher:
        teacher_logits = teacher(images)
    with record(student, STUDENT_LAYERS, args.method) as of_student:
        student_logits = student(images)

    # 4. Maps out of them; create_graph lets a loss on the student's reach its weights.
    teacher_maps = of_teacher.maps(teacher_logits, labels)
    student_maps = of_student.maps(student_logits, labels, create_graph=True)
    maps = zip(student_maps, teacher_maps, strict=True)
    features = zip(of_student.activations, of_teacher.activations, strict=True)

    semantic = [semantic_cosine(s, resize_maps(t, s.shape[1:])) for s, t in maps]
    relation = [relation_cosine(s, t) for s, t in features]
    terms = {
        "ce": functional.cross_entropy(student_logits, labels),
        "kl": kl_divergence(student_logits, teacher_logits, temperature=4),
        "semantic": torch.stack(semantic).mean(),
        "relation": torch.stack(relation).mean(),
    }
    optimizer.zero_grad()
    sum(WEIGHTS[name] * term for name, term in terms.items()).backward()
    optimizer.step()
    return terms


for epoch in range(1, args.epochs + 1):
    means = dict.fromkeys(WEIGHTS, 0.0)
    for images, labels in loader:
        for name, term in distill_step(images, labels).items():
            means[name] += term.item() / len(loader)
    print(f"epoch {epoch}", *(f"{name} {mean:.4f}" for name, mean in means.items()), sep="  ")
