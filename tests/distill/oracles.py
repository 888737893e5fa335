"""Relational losses as the papers write them: float64, loops over examples, nothing of cka_probe."""

from __future__ import annotations

from itertools import combinations
from math import exp, factorial, sqrt

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


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
