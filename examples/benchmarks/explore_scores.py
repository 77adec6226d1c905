"""Scores that were tried, and whether any of them beats counting parameters.

Registers further scores beside the package's, which train a copy of the student for a few steps or
look at its gradients, combines scores with the parameters, and judges all of them as
examples/benchmarks/validate_selection.py does (its options hold here). OUT/weights.json gets the
weights of combinations that are best here; a fair judgement takes those that another ground truth
chose:

    python examples/benchmarks/explore_scores.py --ground-truth cifar.csv --images data/mri \\
        --train-teacher 10 --out explored/cifar
    python examples/benchmarks/explore_scores.py --ground-truth space.csv --images data/mri \\
        --teacher teacher/best.pt --tuned explored/cifar/weights.json --out explored/space
"""

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from validate_selection import Judge, arguments, score_networks, write

from kd_lrp_plugin.losses import kl_divergence
from kd_lrp_plugin.metrics.ranking_quality import ranking_quality
from kd_lrp_plugin.selection.scores.observation import Observation
from kd_lrp_plugin.selection.scores.registry import SCORES, Score

STEPS, RATE, TEMPERATURE = 10, 2e-3, 4.0
WEIGHTS = (0.1, 0.2, 0.3, 0.5, 1.0)  # of a score beside the parameters, both standardised


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tuned", type=Path, help="weights.json of another ground truth")
    parser.set_defaults(scores=[*TRIED, *BESIDE])
    args = parser.parse_args()
    judge = score_networks(args, all_kinds=not args.images)
    best = tuned(judge)
    (args.out / "weights.json").write_text(json.dumps(best, indent=2), encoding="utf-8")
    chosen = {"chosen here": best}
    if args.tuned:
        chosen["chosen elsewhere"] = json.loads(args.tuned.read_text(encoding="utf-8"))
    scores = list(judge.scores.items())
    for words, weights in chosen.items():
        for (score, images, teacher), values in scores:
            weight = weights.get(" ".join(filter(None, (score, teacher))))
            if weight is not None and np.isfinite(values).all():
                name = f"parameters + {weight} {score}, {words}"
                judge.scores[name, images, teacher] = combined(judge, values, weight)
    judge.scores |= aggregated(judge)
    write(args.out, judge, args.resamples)


# --- scores -------------------------------------------------------------------------------------


def losses(student: nn.Module, images: Tensor, targets: Tensor, soft: Tensor) -> list[Tensor]:
    logits = student(images)
    hard = nn.functional.cross_entropy(logits, targets)
    return [hard, kl_divergence(logits, soft, TEMPERATURE)]


@cache  # an observation is of one network on one batch
def trained(student: Observation, teacher: Observation, kd: bool) -> tuple[Observation, ...]:
    """Student after some steps on one half of the batch, and the teacher, both on the other."""
    half = len(student.images) // 2
    images, targets, soft = student.images, student.targets, teacher.logits
    model = copy.deepcopy(student.model).train().requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    for _ in range(STEPS):
        hard, distilled = losses(model, images[:half], targets[:half], soft[:half])
        optimizer.zero_grad()
        ((hard + distilled) / 2 if kd else hard).backward()
        optimizer.step()
    rest = images[half:], targets[half:]
    return (
        Observation(model, *rest, student.layers),
        Observation(teacher.model, *rest, teacher.layers, teacher.train_mode),
    )


def early(distance: Callable[[Observation, Observation], float], kd: bool) -> Callable:
    def score(student: Observation, teacher: Observation) -> float:
        with torch.random.fork_rng(devices=[]):
            return distance(*trained(student, teacher, kd))

    return score


def cross_entropy(student: Observation, _: Observation) -> float:
    return float(nn.functional.cross_entropy(student.logits, student.targets))


def divergence(student: Observation, teacher: Observation) -> float:
    return float(kl_divergence(student.logits, teacher.logits, TEMPERATURE))


def misalignment(student: Observation, teacher: Observation) -> float:
    """Negated cosine of the gradients of both losses with respect to the weights."""
    model = copy.deepcopy(student.model).train().requires_grad_(True)
    weights = list(model.parameters())
    flat = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, retain_graph=True)])
        for loss in losses(model, student.images, student.targets, teacher.logits)
    ]
    return -float(torch.cosine_similarity(*flat, dim=0))


def size(student: Observation, _: Observation) -> float:
    return -float(np.log(student.parameters) + 0.3 * np.log(student.macs))


TRIED = {
    "early_cross_entropy_alone": early(cross_entropy, kd=False),
    "early_cross_entropy": early(cross_entropy, kd=True),
    "early_divergence": early(divergence, kd=True),
    "early_lrp_cosine": early(SCORES["lrp_cosine"].function, kd=True),
    "early_gradcam_l2": early(SCORES["gradcam_l2"].function, kd=True),
    "early_relation_cosine": early(SCORES["relation_cosine"].function, kd=True),
    "gradient_misalignment": misalignment,
    "size": size,
}
for _name, _function in TRIED.items():
    SCORES.register(Score(_function, "tried in examples/benchmarks/explore_scores.py"), _name)
AGGREGATED = (
    ("parameters", "macs"),
    ("parameters", "synflow"),
    ("parameters", "macs", "synflow"),
    ("parameters", "relation_l2"),
    ("parameters", "macs", "relation_l2"),
    ("parameters", "macs", "lrp_cosine"),
)
BESIDE = (
    *("parameters", "macs", "synflow", "bn_log_variance"),
    *("diswot", "lrp_cosine", "relation_l2", "reference_relation"),
)


# --- combinations -------------------------------------------------------------------------------


def combined(judge: Judge, values: np.ndarray, weight: float) -> np.ndarray:
    """Negated log parameters and a score, both standardised over the networks."""
    sizes = -np.log(np.array(judge.parameters, dtype=float))[:, None]

    def standard(x: np.ndarray) -> np.ndarray:
        return (x - x.mean(0)) / np.maximum(x.std(0), 1e-12)

    return standard(sizes) + weight * standard(values)


def aggregated(judge: Judge) -> dict[tuple[str, str, str], np.ndarray]:
    """Mean ranks of several scores: nothing to tune."""
    by_name = {score: (images, seen, v) for (score, images, seen), v in judge.scores.items()}
    found = {}
    for names in AGGREGATED:
        if all(name in by_name and np.isfinite(by_name[name][2]).all() for name in names):
            parts = [rankdata(by_name[name][2], axis=0) for name in names]
            images, teacher, _ = by_name[names[-1]]
            found[f"mean rank of {', '.join(names)}", images, teacher] = np.mean(parts, 0)
    return found


def tuned(judge: Judge) -> dict[str, float]:
    """By score and teacher, the weight with the best Kendall correlation."""
    found = {}
    for (score, _, teacher), values in judge.scores.items():
        if score in SCORES and score != "parameters" and np.isfinite(values).all():

            def quality(weight: float, values: np.ndarray = values) -> float:
                columns = combined(judge, values, weight).T
                qualities = [ranking_quality(c, judge.truth, judge.parameters) for c in columns]
                return float(np.mean([quality["kendall"] for quality in qualities]))

            found[" ".join(filter(None, (score, teacher)))] = max(WEIGHTS, key=quality)
    return found


if __name__ == "__main__":
    main()
