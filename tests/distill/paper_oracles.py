"""The papers' equations in float64 NumPy, written from the papers without a look at the code that they check.

Arrays are (n, K) logits, (n, d) features, (n, c, h, w) maps and (K, c) words; labels are n class numbers. There is no
gradient here, so a network that an equation holds fixed is an argument like any other. No epsilon is added anywhere
unless the equation has one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Labels = NDArray[np.int64]
Linear = tuple[Array, Array | None]
"""Weight (out, in) and bias (out,)."""


def log_softmax(z: Array) -> Array:
    """Log of exp(z_c) / Σ_k exp(z_k) along the last axis."""
    shifted = z - z.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def softmax(z: Array) -> Array:
    """exp(z_c) / Σ_k exp(z_k) along the last axis."""
    return np.exp(log_softmax(z))


def l2_normalized(x: Array) -> Array:
    """Each row divided by its Euclidean norm; a row of zeros, such as a first word of OBoW, stays one."""
    norms = np.sqrt((x**2).sum(axis=-1, keepdims=True))
    return x / np.where(norms > 0, norms, 1)


def kl(p: Array, log_q: Array) -> float:
    """Σ_c p_c (log p_c − log q_c) with 0 log 0 = 0, mean over the rows."""
    total = 0.0
    for row, log_row in zip(p, log_q, strict=True):
        total += sum(a * (math.log(a) - b) for a, b in zip(row, log_row, strict=True) if a > 0)
    return total / len(p)


def cross_entropy(logits: Array, labels: Labels, smoothing: float = 0.0) -> float:
    """Cross-entropy with label smoothing ε (Szegedy et al. 2016, arXiv 1512.00567).

    − Σ_c q_c log p_c with q = (1 − ε) one-hot + ε / K, mean over the rows.
    """
    n, classes = logits.shape
    log_p, total = log_softmax(logits), 0.0
    for i in range(n):
        for c in range(classes):
            q = (1 - smoothing) * (c == labels[i]) + smoothing / classes
            total -= q * log_p[i, c]
    return total / n


def kd(logits: Array, teacher_logits: Array, temperature: float = 1.0) -> float:
    """KD (Hinton et al. 2015, arXiv 1503.02531): T² KL(softmax(z_t / T) ‖ softmax(z_s / T)), mean over the rows."""
    return temperature**2 * kl(softmax(teacher_logits / temperature), log_softmax(logits / temperature))


def dkd(
    logits: Array,
    teacher_logits: Array,
    labels: Labels,
    *,
    alpha: float = 1.0,
    beta: float = 2.0,
    temperature: float = 1.0,
) -> float:
    """DKD (Zhao et al. 2022, arXiv 2203.08679): T² (α TCKD + β NCKD), mean over the rows.

    With y the label and p the softmax at temperature T: TCKD = KL between the pairs (p_y, 1 − p_y), and NCKD = KL
    between the softmax of the K − 1 logits without that of y. The factor T² is that of the authors' code.
    """
    total = 0.0
    for z_s, z_t, y in zip(logits / temperature, teacher_logits / temperature, labels, strict=True):
        p_s, p_t = softmax(z_s)[y], softmax(z_t)[y]
        target = p_t * math.log(p_t / p_s) + (1 - p_t) * math.log((1 - p_t) / (1 - p_s))
        others_s, others_t = np.delete(z_s, y), np.delete(z_t, y)
        rest = kl(softmax(others_t)[None], log_softmax(others_s)[None])
        total += alpha * target + beta * rest
    return temperature**2 * total / len(logits)


def pearson(x: Array, y: Array) -> float:
    """Pearson's correlation of two vectors."""
    a, b = x - x.mean(), y - y.mean()
    return float((a * b).sum() / math.sqrt((a**2).sum() * (b**2).sum()))


def dist(
    logits: Array, teacher_logits: Array, *, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0
) -> float:
    """DIST (Huang et al. 2022, arXiv 2205.10536): β L_inter + γ L_intra.

    With p = softmax(z / τ): L_inter = 1 − Pearson of the two networks' rows (an image's classes), mean over images;
    L_intra = 1 − Pearson of their columns (a class over the batch), mean over classes. The authors' code multiplies
    by τ²; the paper, and this function, do not. At τ = 1 they are equal.
    """
    p_s, p_t = softmax(logits / temperature), softmax(teacher_logits / temperature)
    inter = [1 - pearson(a, b) for a, b in zip(p_s, p_t, strict=True)]
    intra = [1 - pearson(a, b) for a, b in zip(p_s.T, p_t.T, strict=True)]
    return float(beta * np.mean(inter) + gamma * np.mean(intra))


def ofa(
    logits: Array,
    teacher_logits: Array,
    labels: Labels,
    *,
    gamma: float = 1.0,
    temperature: float = 1.0,
    form: Literal["code", "paper"] = "code",
) -> float:
    """OFA loss (Hao et al. 2023, arXiv 2310.19444), mean over the rows, no factor T².

    "code" raises all classes: − Σ_c [(p_t,c + m_c)^γ − m_c] log p_s,c, with m the one-hot label.
    "paper" raises the label's term alone: − [(1 + p_t,y)^γ − 1] log p_s,y − Σ_{c≠y} p_t,c log p_s,c. The paper
    has no "− 1": its sum holds the cross-entropy with the label, which is a separate term of the total loss here.
    """
    n, classes = logits.shape
    p_t, log_p_s, total = softmax(teacher_logits / temperature), log_softmax(logits / temperature), 0.0
    for i in range(n):
        for c in range(classes):
            m = float(c == labels[i])
            raised = form == "code" or m == 1
            weight = (p_t[i, c] + m) ** gamma - m if raised else p_t[i, c]
            total -= weight * log_p_s[i, c]
    return float(total / n)


def standardize(z: Array, ddof: int = 0) -> Array:
    """Z-score over the classes of each row (Sun et al. 2024, arXiv 2403.01427, algorithm 1).

    (z − mean) / std. With ``ddof=0`` std has 1/K, which is what the paper's bound √(K − 1) of a z-score needs. The
    authors' code has 1/(K − 1), ``ddof=1``, and adds 1e-7 to std, which is left out here.
    """
    out = np.empty_like(z)
    for i, row in enumerate(z):
        mean = sum(row) / len(row)
        out[i] = (row - mean) / math.sqrt(sum((row - mean) ** 2) / (len(row) - ddof))
    return out


def kd_standardized(logits: Array, teacher_logits: Array, temperature: float = 1.0, ddof: int = 0) -> float:
    """T² KL(softmax(Z(z_t) / T) ‖ softmax(Z(z_s) / T)), Z the z-score of each side (arXiv 2403.01427, algorithm 1)."""
    return kd(standardize(logits, ddof), standardize(teacher_logits, ddof), temperature)


def dkd_standardized(
    logits: Array,
    teacher_logits: Array,
    labels: Labels,
    *,
    alpha: float = 1.0,
    beta: float = 2.0,
    temperature: float = 1.0,
    ddof: int = 0,
) -> float:
    """DKD of the z-scores of both sides (arXiv 2403.01427, where it is applied to DKD as to KD)."""
    student, teacher = standardize(logits, ddof), standardize(teacher_logits, ddof)
    return dkd(student, teacher, labels, alpha=alpha, beta=beta, temperature=temperature)


def ofa_standardized(
    logits: Array,
    teacher_logits: Array,
    labels: Labels,
    *,
    gamma: float = 1.0,
    temperature: float = 1.0,
    form: Literal["code", "paper"] = "code",
    ddof: int = 0,
) -> float:
    """OFA loss of the z-scores of both sides. Not in arXiv 2403.01427, which does not treat OFA."""
    student, teacher = standardize(logits, ddof), standardize(teacher_logits, ddof)
    return ofa(student, teacher, labels, gamma=gamma, temperature=temperature, form=form)


def crd_scores(embeddings: Array, memory: Array, indices: Labels, tau: float) -> Array:
    """exp(x_i · memory[indices[i, j]] / τ), (n, columns of indices)."""
    scores = np.empty(indices.shape)
    for i, j in np.ndindex(*indices.shape):
        scores[i, j] = math.exp(embeddings[i] @ memory[indices[i, j]] / tau)
    return scores


def crd_z(embeddings: Array, memory: Array, own: Labels, drawn: Labels, tau: float = 0.07) -> float:
    """Z of the authors' code: M times the mean score of the first batch, own and drawn entries together."""
    indices = np.concatenate([own[:, None], drawn], axis=1)
    return float(len(memory) * crd_scores(embeddings, memory, indices, tau).mean())


def crd(embeddings: Array, memory: Array, own: Labels, drawn: Labels, *, tau: float = 0.07, z: float = 1.0) -> float:
    """One direction of CRD (Tian et al. 2020, arXiv 1910.10699: the critic h and its objective).

    h = p / (p + N / M) with p = exp(x · y / τ) / Z; the loss is − mean over rows of [log h(own) + Σ log(1 − h(drawn))].
    The paper's critic has Z = 1; the authors' code has Z from the first batch (``crd_z``) and adds 1e-7 to the
    denominator, which is left out here.

    Args:
        embeddings: (n, d), rows of norm 1.
        memory: (M, d), the other network's embeddings of all M images, rows of norm 1.
        own: (n,) index of each row's own image.
        drawn: (n, N) indices of the negatives.
        tau: Temperature τ.
        z: Normaliser Z.
    """
    negatives, images = drawn.shape[1], len(memory)
    positive = crd_scores(embeddings, memory, own[:, None], tau) / z
    negative = crd_scores(embeddings, memory, drawn, tau) / z
    total = 0.0
    for i in range(len(embeddings)):
        total += math.log(positive[i, 0] / (positive[i, 0] + negatives / images))
        for p in negative[i]:
            total += math.log(1 - p / (p + negatives / images))
    return -total / len(embeddings)


def crd_memory_update(memory: Array, embeddings: Array, own: Labels, momentum: float = 0.5) -> Array:
    """Row own[i] becomes momentum · old + (1 − momentum) · embeddings[i], divided by its norm (arXiv 1910.10699)."""
    out = memory.copy()
    for i, index in enumerate(own):
        mixed = momentum * memory[index] + (1 - momentum) * embeddings[i]
        out[index] = mixed / math.sqrt((mixed**2).sum())
    return out


def batch_norm(x: Array, weight: Array, bias: Array, eps: float = 1e-5) -> Array:
    """Batch normalisation in training mode: mean and variance (1/n) of each column over the rows."""
    return (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + eps) * weight + bias


def gelu(x: Array) -> Array:
    """Exact GELU, x Φ(x)."""
    return np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x.ravel()]).reshape(x.shape)


def rsd_projector(features: Array, first: Array, norm: tuple[Array, Array], second: Array) -> Array:
    """Projector of RSD (arXiv 2507.21844) in training mode: linear → batch norm → GELU → linear, no biases.

    Args:
        features: (n, C_s) pooled features of the student.
        first: (2 C_s, C_s).
        norm: Weight and bias of the batch norm, (2 C_s,) each.
        second: (C_t, 2 C_s).
    """
    return gelu(batch_norm(features @ first.T, *norm)) @ second.T


def rsd(projected: Array, teacher_features: Array, kappa: float = 0.01) -> float:
    """RSD loss (arXiv 2507.21844) between projected student features and teacher features, both (n, C_t).

    Both are standardised over the batch, (f − mean) / (std + 1e-5) with std of 1/n. R = Z_tᵀ Z_s / n; the loss is
    Σ_ij w_ij (R_ij − δ_ij)², w = 1 on the diagonal and κ elsewhere.
    """
    n, width = teacher_features.shape
    z_s, z_t = (((f - f.mean(axis=0)) / (f.std(axis=0) + 1e-5)) for f in (projected, teacher_features))
    total = 0.0
    for i in range(width):
        for j in range(width):
            r = (z_t[:, i] * z_s[:, j]).sum() / n
            total += (r - 1) ** 2 if i == j else kappa * r**2
    return float(total)


def info_nce(queries: Array, keys: Array, temperature: float) -> float:
    """InfoNCE (van den Oord et al. 2018, arXiv 1807.03748) from the queries to the keys, mean over rows.

    − log [exp(q_i · k_i / τ) / Σ_j exp(q_i · k_j / τ)], rows L2-normalised. The queries are those of the network that
    learns, the keys those of the source. The temperature is used as given: a floor of it is the caller's.
    """
    similarity = l2_normalized(queries) @ l2_normalized(keys).T / temperature
    total = 0.0
    for i in range(len(queries)):
        total -= similarity[i, i] - math.log(sum(math.exp(s) for s in similarity[i]))
    return total / len(queries)


def linear(x: Array, layer: Linear) -> Array:
    """X Wᵀ + b."""
    weight, bias = layer
    return x @ weight.T if bias is None else x @ weight.T + bias


ARROWS = (("teacher", "student"), ("teacher", "assistant"), ("assistant", "student"))


def fbt(
    pooled: Mapping[str, Array],
    logits: Mapping[str, Array],
    labels: Labels,
    projections: Mapping[str, Linear],
    *,
    weights: Sequence[float] = (1.0, 1.0, 1.0),
    temperatures: Sequence[float] = (0.07, 0.07, 0.07),
    gamma: float = 1.0,
    form: Literal["code", "paper"] = "code",
) -> float:
    """FBT as described (arXiv 2410.12342): L(T→S) + L(T→F) + L(F→S), in the order of ``ARROWS``.

    Each arrow is its weight times [InfoNCE between pooled features + OFA loss between logits at T = 1]. The first
    network is the source (InfoNCE's keys, OFA's teacher) and is detached, which has no meaning without gradients.
    The student's cross-entropy with the labels is not part of it.

    Args:
        pooled: Pooled last features of "teacher", "student" and "assistant", (n, d) each.
        logits: Their logits, (n, K) each.
        labels: (n,).
        projections: Linear layers to the teacher's width; a network without one is compared as it is.
        weights: One an arrow.
        temperatures: InfoNCE's, one an arrow.
        gamma: OFA's γ.
        form: OFA's form.
    """
    projected = {name: linear(x, projections[name]) if name in projections else x for name, x in pooled.items()}
    total = 0.0
    for (source, target), weight, temperature in zip(ARROWS, weights, temperatures, strict=True):
        contrast = info_nce(projected[target], projected[source], temperature)
        total += weight * (contrast + ofa(logits[target], logits[source], labels, gamma=gamma, form=form))
    return total


def without_ring(maps: Array) -> Array:
    """Maps (n, c, h, w) without the outer ring of locations, (n, c, h − 2, w − 2) (OBoW, arXiv 2012.11552)."""
    return maps[:, :, 1:-1, 1:-1]


def distances(maps: Array, words: Array) -> Array:
    """Squared Euclidean distance of each location of the ringless maps to each word, (n, locations, K)."""
    inner = without_ring(maps)
    n, _, h, w = inner.shape
    out = np.empty((n, h * w, len(words)))
    for i, y, x, k in np.ndindex(n, h, w, len(words)):
        out[i, y * w + x, k] = ((inner[i, :, y, x] - words[k]) ** 2).sum()
    return out


def update_mean_distance(maps: Array, words: Array, mean_distance: float = 0.5, decay: float = 0.99) -> float:
    """m̄ ← decay · m̄ + (1 − decay) · m, m the mean over locations of the smallest distance (OBoW, arXiv 2012.11552).

    The codes of the same step use the new value.
    """
    return float(decay * mean_distance + (1 - decay) * distances(maps, words).min(axis=-1).mean())


def codes(maps: Array, words: Array, mean_distance: float, inverse_delta: float) -> Array:
    """Soft assignment of each location (OBoW, arXiv 2012.11552): softmax_k(− (δ⁻¹ / m̄) · distance to word k).

    Returns:
        (n, locations, K), rows that sum to 1.
    """
    return softmax(-(inverse_delta / mean_distance) * distances(maps, words))


def bags(codes: Array) -> Array:
    """Maximum over the locations of (n, locations, K) codes, divided by its sum over the words, (n, K)."""
    out = np.empty((codes.shape[0], codes.shape[2]))
    for i, code in enumerate(codes):
        largest = np.array([max(code[:, k]) for k in range(code.shape[1])])
        out[i] = largest / largest.sum()
    return out


def word_candidates(maps: Array, locations: Labels) -> Array:
    """One new word an image: the 3 × 3 mean (stride 1, no padding) of the ringless map at a location, (n, c).

    Args:
        maps: (n, c, h, w) with their ring.
        locations: (n, 2) row and column in the averaged map, which is (h − 4, w − 4).
    """
    inner = without_ring(maps)
    return np.array([inner[i, :, y : y + 3, x : x + 3].mean(axis=(1, 2)) for i, (y, x) in enumerate(locations)])


def dictionary_update(words: Array, candidates: Array, oldest: int) -> tuple[Array, int]:
    """A queue: the candidates are written over the oldest words, in their order.

    Returns:
        The new words (K, c) and the row of the word that is oldest from now on.
    """
    out = words.copy()
    for j, candidate in enumerate(candidates):
        out[(oldest + j) % len(words)] = candidate
    return out, (oldest + len(candidates)) % len(words)


def dynamic_head(words: Array, first: Array, norm: tuple[Array, Array], second: Linear) -> Array:
    """Classifier weights made from the words (OBoW, arXiv 2012.11552), in training mode.

    Words L2-normalised → linear without bias → batch norm over the words → ReLU → linear → L2-normalised.

    Args:
        words: (K, C_level).
        first: (2 C_out, C_level).
        norm: Weight and bias of the batch norm, (2 C_out,) each.
        second: (C_out, 2 C_out) and (C_out,).

    Returns:
        (K, C_out), rows of norm 1.
    """
    hidden = np.maximum(batch_norm(l2_normalized(words) @ first.T, *norm), 0)
    return l2_normalized(linear(hidden, second))


def logits(pooled: Array, head: Array, kappa: float) -> Array:
    """κ · pooled · headᵀ, (n, K); the pooled features (n, C_out) are not normalised (OBoW, arXiv 2012.11552)."""
    return kappa * pooled @ head.T


def loss(predictions: Sequence[Sequence[Sequence[Array]]], targets: Sequence[Array]) -> float:
    """KL(bag ‖ softmax(logits)) with the batch mean, mean over levels, sum over kinds of crops (arXiv 2012.11552).

    The crops of one kind are averaged: all of an image's are predicted from its one bag a level.

    Args:
        predictions: By kind of crop, level and crop: (n, K) logits.
        targets: By level: (n, K) bags.
    """
    total = 0.0
    for kind in predictions:
        of_levels = [
            sum(kl(bag, log_softmax(crop)) for crop in crops) / len(crops)
            for crops, bag in zip(kind, targets, strict=True)
        ]
        total += sum(of_levels) / len(of_levels)
    return total


def alpha(step: int, total: int, start: float = 0.99) -> float:
    """Momentum of the teacher's parameters: 1 − (1 − start) · ½ (1 + cos(π step / total)) (arXiv 2012.11552)."""
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * step / total))
