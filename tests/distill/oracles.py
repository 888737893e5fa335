"""Distillation losses as the papers write them: float64, loops over examples and classes, nothing of cka_probe."""

from __future__ import annotations

from itertools import combinations
from math import exp, factorial, log, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray

Matrix = NDArray[np.float64]


def softmax(row: ArrayLike, temperature: float = 1.0) -> list[float]:
    z = [float(value) / temperature for value in np.asarray(row)]
    total = sum(exp(value - max(z)) for value in z)
    return [exp(value - max(z)) / total for value in z]


def ofa(
    student: Matrix, teacher: Matrix, labels: list[int], gamma: float, temperature: float = 1.0, form: str = "code"
) -> float:
    """-Σ_c [(p_t,c + m_c)^γ - m_c] log p_s,c; "paper": γ on the target's term alone."""
    total = 0.0
    for z_s, z_t, label in zip(student, teacher, labels, strict=True):
        p_s, p_t = softmax(z_s, temperature), softmax(z_t, temperature)
        for c in range(len(p_s)):
            m = 1.0 if c == label else 0.0
            raised = form == "code" or c == label
            weight = (p_t[c] + m) ** gamma - m if raised else p_t[c]
            total -= weight * log(p_s[c])
    return total / len(labels)


def kd(student: Matrix, teacher: Matrix, temperature: float) -> float:
    total = 0.0
    for z_s, z_t in zip(student, teacher, strict=True):
        p_s, p_t = softmax(z_s, temperature), softmax(z_t, temperature)
        total += sum(t * (log(t) - log(s)) for s, t in zip(p_s, p_t, strict=True))
    return temperature**2 * total / len(student)


def dkd(student: Matrix, teacher: Matrix, labels: list[int], alpha: float, beta: float, temperature: float) -> float:
    tckd = nckd = 0.0
    for z_s, z_t, label in zip(student, teacher, labels, strict=True):
        p_s, p_t = softmax(z_s, temperature), softmax(z_t, temperature)
        b_s, b_t = (p_s[label], 1 - p_s[label]), (p_t[label], 1 - p_t[label])
        tckd += sum(t * log(t / s) for s, t in zip(b_s, b_t, strict=True))
        for c in range(len(p_s)):
            if c != label:
                hat_s, hat_t = p_s[c] / b_s[1], p_t[c] / b_t[1]
                nckd += hat_t * log(hat_t / hat_s)
    return temperature**2 * (alpha * tckd + beta * nckd) / len(labels)


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    return float(np.corrcoef(np.asarray(x), np.asarray(y))[0, 1])


def dist(student: Matrix, teacher: Matrix, beta: float, gamma: float, temperature: float) -> float:
    s = np.array([softmax(row, temperature) for row in student])
    t = np.array([softmax(row, temperature) for row in teacher])
    inter = np.mean([1 - pearson(a, b) for a, b in zip(s, t, strict=True)])
    intra = np.mean([1 - pearson(a, b) for a, b in zip(s.T, t.T, strict=True)])
    return float(temperature**2 * (beta * inter + gamma * intra))


def cc(student: Matrix, teacher: Matrix, bandwidth: float, order: int) -> float:
    def kernel(x: Matrix, y: Matrix) -> float:
        cosine = float(x @ y) / sqrt(float(x @ x) * float(y @ y))
        return sum(exp(-2 * bandwidth) * (2 * bandwidth) ** p / factorial(p) * cosine**p for p in range(order + 1))

    n = len(student)
    return (
        sum((kernel(teacher[i], teacher[j]) - kernel(student[i], student[j])) ** 2 for i in range(n) for j in range(n))
        / n**2
    )


def huber(x: float) -> float:
    return 0.5 * x**2 if abs(x) <= 1 else abs(x) - 0.5


def rkd_distance(student: Matrix, teacher: Matrix) -> float:
    n = len(student)

    def relative(x: Matrix) -> Matrix:
        d = np.array([[sqrt(float(((a - b) ** 2).sum())) for b in x] for a in x])
        return np.asarray(d / np.mean([d[i, j] for i, j in combinations(range(n), 2)]))

    s, t = relative(student), relative(teacher)
    return sum(huber(s[i, j] - t[i, j]) for i in range(n) for j in range(n)) / n**2


def rkd_angle(student: Matrix, teacher: Matrix) -> float:
    n = len(student)

    def cosine(x: Matrix, i: int, j: int, k: int) -> float:
        first, second = x[i] - x[j], x[k] - x[j]
        norms = np.linalg.norm(first) * np.linalg.norm(second)
        return float(first @ second / norms) if norms > 0 else 0.0

    triplets = [(i, j, k) for j in range(n) for i in range(n) for k in range(n)]
    return sum(huber(cosine(student, *which) - cosine(teacher, *which)) for which in triplets) / len(triplets)


def crd(embedding: Matrix, memory: Matrix, images: int, temperature: float, first: Matrix | None = None) -> float:
    """One direction, as the paper's program has it: p = e^{x·y/τ}/Z with Z = M · mean e^{x·y/τ} of the first batch."""
    n, negatives = len(embedding), memory.shape[1] - 1

    def powers(x: Matrix) -> list[list[float]]:
        return [[exp(float(x[i] @ memory[i, k]) / temperature) for k in range(1 + negatives)] for i in range(n)]

    z = images * float(np.mean(powers(embedding if first is None else first)))
    total = 0.0
    for row in powers(embedding):
        p = [value / z for value in row]
        h = [one / (one + negatives / images) for one in p]
        total -= log(h[0]) + sum(log(1 - one) for one in h[1:])
    return total / n


def info_nce(queries: Matrix, keys: Matrix, temperature: float) -> float:
    """-mean_i log(exp(cos(q_i, k_i)/τ) / Σ_j exp(cos(q_i, k_j)/τ)): the positive of a query is the key of its image."""
    total = 0.0
    for index, query in enumerate(queries):
        cosines = [query @ key / (np.linalg.norm(query) * np.linalg.norm(key)) for key in keys]
        total -= log(exp(cosines[index] / temperature) / sum(exp(c / temperature) for c in cosines))
    return total / len(queries)


def fbt(
    features: dict[str, Matrix],
    logits: dict[str, Matrix],
    labels: list[int],
    temperatures: dict[str, float],
    gamma: float = 1.0,
) -> dict[str, tuple[float, float]]:
    """The three arrows of FBT as described (arXiv 2410.12342): InfoNCE and OFA's loss from source to target.

    Args:
        features: "teacher", "student" and "assistant" -> (n, d) pooled last features of the teacher's width.
        logits: the same -> (n, c).
        labels: (n,).
        temperatures: arrow -> τ.
        gamma: of OFA's loss.
    """
    found = {}
    for source, target in (("teacher", "student"), ("teacher", "assistant"), ("assistant", "student")):
        arrow = f"{source}_{target}"
        found[arrow] = (
            info_nce(features[target], features[source], temperatures[arrow]),
            ofa(logits[target], logits[source], labels, gamma),
        )
    return found
