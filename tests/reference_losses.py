"""The losses again, as their formulas read: float64, explicit loops, no code of the package.

Zero maps are left out; the tests state their values one by one.
"""

import math

from torch import Tensor

Row = list[float]


def rows(tensor: Tensor) -> list[Row]:
    return [sample.flatten().tolist() for sample in tensor.detach().double()]


def dot(one: Row, other: Row) -> float:
    return math.fsum(a * b for a, b in zip(one, other, strict=True))


def cosine(one: Row, other: Row) -> float:
    return dot(one, other) / math.sqrt(dot(one, one) * dot(other, other))


def matrix(tensor: Tensor) -> Row:
    """G Gᵀ over its Frobenius norm, entry by entry."""
    samples = rows(tensor)
    entries = [dot(one, other) for one in samples for other in samples]
    norm = math.sqrt(dot(entries, entries))
    return [entry / norm for entry in entries]


def softmax(logits: Row, temperature: float) -> Row:
    powers = [math.exp(logit / temperature) for logit in logits]
    return [power / math.fsum(powers) for power in powers]


def semantic_cosine(student: Tensor, teacher: Tensor) -> float:
    pairs = list(zip(rows(student), rows(teacher), strict=True))
    return sum(1 - cosine(s, t) for s, t in pairs) / len(pairs)


def semantic_l2(student: Tensor, teacher: Tensor) -> float:
    pairs = list(zip(rows(student), rows(teacher), strict=True))
    return sum((a - b) ** 2 for s, t in pairs for a, b in zip(s, t, strict=True)) / len(pairs)


def semantic_relative_l2(student: Tensor, teacher: Tensor) -> float:
    energy = math.fsum(dot(t, t) for t in rows(teacher)) / len(teacher)
    return semantic_l2(student, teacher) / energy


def matrix_l2(student: Tensor, teacher: Tensor) -> float:
    pairs = zip(matrix(student), matrix(teacher), strict=True)
    return math.sqrt(math.fsum((a - b) ** 2 for a, b in pairs))


def matrix_cosine(student: Tensor, teacher: Tensor) -> float:
    return 1 - cosine(matrix(student), matrix(teacher))


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> float:
    total = 0.0
    for s, t in zip(rows(student), rows(teacher), strict=True):
        p_s, p_t = softmax(s, temperature), softmax(t, temperature)
        total += sum(b * math.log(b / a) for a, b in zip(p_s, p_t, strict=True))
    return temperature**2 * total / len(student)


REFERENCE = {
    "semantic_cosine": semantic_cosine,
    "semantic_l2": semantic_l2,
    "semantic_relative_l2": semantic_relative_l2,
    "correlation_l2": matrix_l2,
    "correlation_cosine": matrix_cosine,
    "relation_l2": matrix_l2,
    "relation_cosine": matrix_cosine,
    "kl_divergence": kl_divergence,
}
