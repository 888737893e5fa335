"""Distillation losses: pure functions of tensors, each a scalar that averages over the batch.

Letters: ``n`` examples, ``c`` classes, ``d`` features. A target is class indices (n,) or, under mixup and cutmix, a
distribution over the classes (n, c), whose arg-max then stands for the class. All is computed in the dtype of the
arguments, under autocast too: the caller hands over float32.
"""

from __future__ import annotations

from math import exp, factorial, log
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Enhancement = Literal["code", "paper"]


def class_indices(target: Tensor) -> Tensor:
    """The classes (n,) of a target: itself, or the arg-max of a soft one (n, c)."""
    return target.argmax(1) if target.ndim == 2 else target


def unit_length(x: Tensor, eps: float = 1e-12) -> Tensor:
    """L2-normalized along the last dimension, as `torch.nn.functional.normalize`, except for the gradient of zeros.

    Zeros, such as the features of an image after a ReLU, stay zeros. Their gradient is that of a norm of 1: that of
    ``normalize`` is 1 / eps times as large, and one such image would decide the step.

    Args:
        x: (..., d).
        eps: norms below are taken for 0, and the vector stays as it is.
    """
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm < eps, 1)


def classification_loss(logits: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with class indices, or with a soft target as it is.

    Args:
        logits: (n, c).
        target: (n,) or (n, c).
        smoothing: of class indices, 0 to 1; a soft target was smoothed when it was mixed.
    """
    if target.ndim == 2:
        return -(target * logits.log_softmax(1)).sum(1).mean()
    return F.cross_entropy(logits, target, label_smoothing=smoothing)


def standardized_logits(logits: Tensor) -> Tensor:
    """Z-scores over the classes, (z - mean) / σ with σ² = Σ_c (z_c - mean)² / c (Sun et al. 2024, arXiv 2403.01427).

    Of teacher and student both, they take the place of the logits in a loss: its T is the paper's base temperature,
    and its factor, T² for KD and DKD, stays. The authors' program divides by c - 1, which is one temperature for all.

    Args:
        logits: (n, c). A row of equal logits has σ = 0: its z-scores are 0, and its gradient is that of σ = 1.

    Returns:
        (n, c), neither changed by a scale above 0 nor by a shift of a row of logits.
    """
    # The mean of equal numbers may differ from them by round-off; with the largest as 0, it is exactly 0.
    shifted = logits - logits.detach().amax(1, keepdim=True)
    deviation = shifted.std(1, correction=0, keepdim=True)
    return (shifted - shifted.mean(1, keepdim=True)) / deviation.masked_fill(deviation == 0, 1)


def ofa_loss(  # noqa: PLR0913  # the parameters of its equation, keyword-only
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 1.0,
    temperature: float = 1.0,
    form: Enhancement = "code",
) -> Tensor:
    """The one-for-all loss with adaptive target enhancement (Hao et al. 2023, arXiv 2310.19444, section 3.3).

    ℓ = -Σ_c [(p_t,c + m_c)^γ - m_c] · log p_s,c with p = softmax(z / T) and m the one-hot class; no factor T². At
    γ = 1 it is the cross-entropy with the teacher's probabilities, that is KD at temperature T.

    Args:
        logits: (n, c) of the student or of an exit branch.
        teacher_logits: (n, c).
        target: (n,) or (n, c).
        gamma: the exponent, 1 or more; larger for weaker teachers.
        temperature: above 0.
        form: ``"code"``, as the authors' program: all classes are raised to γ. ``"paper"``, as the paper's formula:
            the target class alone.
    """
    teacher = (teacher_logits / temperature).softmax(1)
    one_hot = F.one_hot(class_indices(target), teacher.shape[1]).to(teacher.dtype)
    weights = (teacher + one_hot).pow(gamma) - one_hot
    if form == "paper":
        weights = torch.where(one_hot.bool(), weights, teacher)
    return -(weights * (logits / temperature).log_softmax(1)).sum(1).mean()


def kd_loss(logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """T² · KL(p_t || p_s) with p = softmax(z / T) (Hinton et al. 2015, arXiv 1503.02531, section 2).

    Args:
        logits: (n, c).
        teacher_logits: (n, c).
        temperature: above 0.
    """
    student, teacher = ((z / temperature).log_softmax(1) for z in (logits, teacher_logits))
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def dkd_loss(  # noqa: PLR0913  # the parameters of its equation, keyword-only
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 2.0,
    temperature: float = 1.0,
) -> Tensor:
    """Decoupled KD, T² · (α · TCKD + β · NCKD) (Zhao et al. 2022, arXiv 2203.08679, equation 7).

    TCKD is the KL divergence between the binary distributions (target class, all others); NCKD that among the other
    classes, renormalized.

    Args:
        logits: (n, c).
        teacher_logits: (n, c).
        target: (n,) or (n, c).
        alpha: weight of TCKD.
        beta: weight of NCKD.
        temperature: above 0.
    """
    own = class_indices(target)[:, None]
    student, teacher = (_decoupled(z / temperature, own) for z in (logits, teacher_logits))
    tckd, nckd = (F.kl_div(s, t, reduction="batchmean", log_target=True) for s, t in zip(student, teacher, strict=True))
    return temperature**2 * (alpha * tckd + beta * nckd)


def dist_loss(
    logits: Tensor, teacher_logits: Tensor, *, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """T² · (β · inter + γ · intra), correlation in place of KL (Huang et al. 2022, arXiv 2205.10536, equation 9).

    inter is 1 - Pearson's correlation of teacher and student over the classes of each example, intra over the
    examples of each class. A constant row or column, whose correlation is not defined, counts as uncorrelated.

    Args:
        logits: (n, c).
        teacher_logits: (n, c).
        beta: weight of inter.
        gamma: weight of intra.
        temperature: above 0.
    """
    student, teacher = ((z / temperature).softmax(1) for z in (logits, teacher_logits))
    inter = 1 - _pearson(student, teacher).mean()
    intra = 1 - _pearson(student.T, teacher.T).mean()
    return temperature**2 * (beta * inter + gamma * intra)


def cc_loss(
    features: Tensor, teacher_features: Tensor, *, bandwidth: float = 0.4, order: int = 2, eps: float = 1e-12
) -> Tensor:
    """Correlation congruence, 1/n² · ||C(F_t) - C(F_s)||² (Peng et al. 2019, arXiv 1904.01802, equations 4 to 6).

    C is a Gaussian RBF kernel of L2-normalized features, by its Taylor series:
    C(x, y) = Σ_{p ≤ P} exp(-2γ) · (2γ)^p / p! · (x · y)^p.

    Args:
        features: (n, d).
        teacher_features: (n, d) of any width of its own.
        bandwidth: the paper's γ, above 0.
        order: the paper's P.
        eps: see `unit_length`.
    """
    kernels = []
    for x in (features, teacher_features):
        unit = unit_length(x, eps)
        with _exact(x):
            cosine = unit @ unit.T
        terms = [(2 * bandwidth) ** p / factorial(p) * cosine**p for p in range(order + 1)]
        kernels.append(exp(-2 * bandwidth) * torch.stack(terms).sum(0))
    student, teacher = kernels
    return (teacher - student).square().mean()


def rkd_distance_loss(features: Tensor, teacher_features: Tensor) -> Tensor:
    """Huber loss of the pairwise distances, each over their mean (Park et al. 2019, arXiv 1904.05068, eq. 5 to 8).

    Args:
        features: (n, d), n at least 2.
        teacher_features: (n, d) of any width of its own.
    """
    student, teacher = (_relative_distances(x) for x in (features, teacher_features))
    return F.smooth_l1_loss(student, teacher)


def rkd_angle_loss(features: Tensor, teacher_features: Tensor, vertices: slice = slice(None)) -> Tensor:
    """Huber loss of the cosines of the angles of all triplets (Park et al. 2019, arXiv 1904.05068, eq. 9 to 11).

    Args:
        features: (n, d).
        teacher_features: (n, d) of any width of its own.
        vertices: the examples whose angles are taken, of triplets with any others: a process's share. All by default.
    """
    student, teacher = (_angles(x, vertices) for x in (features, teacher_features))
    return F.smooth_l1_loss(student, teacher)


def rsd_loss(features: Tensor, teacher_features: Tensor, *, kappa: float = 0.01) -> Tensor:
    """Redundancy suppression, Σ_i (1 - C_ii)² + κ · Σ_{i≠j} C_ij² (Zhang et al. 2025, arXiv 2507.21844).

    C = Z_tᵀ Z_s / n is the cross-correlation (d, d) of the features, each standardized over the batch:
    z = (f - mean) / (σ + 1e-5) with σ² = Σ (f - mean)² / n.

    Args:
        features: (n, d) of the student, projected; n at least 2.
        teacher_features: (n, d).
        kappa: weight of the entries off the diagonal, 0 or more.
    """
    student, teacher = ((x - x.mean(0)) / (x.std(0, correction=0) + 1e-5) for x in (features, teacher_features))
    with _exact(student):
        correlation = teacher.T @ student / len(student)
    identity = torch.eye(len(correlation), dtype=correlation.dtype, device=correlation.device)
    squares = (correlation - identity).square()
    return (1 - kappa) * squares.diagonal().sum() + kappa * squares.sum()


def crd_loss(cosines: Tensor, log_mean: Tensor, *, temperature: float = 0.07) -> Tensor:
    """Contrastive representation distillation, one direction (Tian et al. 2020, arXiv 1910.10699, eq. 17 to 19).

    The critic h = p/(p + N/M) distinguishes an image's own memory from N drawn ones of M images, with the probability
    p = e^{x·y/τ}/Z. As in the authors' program, Z is M times a mean of e^{x·y/τ}, so that h = e^{x·y/τ}/(e^{x·y/τ} +
    N · mean) whatever M. The loss is -log h(own) - Σ log(1 - h(drawn)).

    Args:
        cosines: (n, 1 + N) of each embedding x with memories y of the other network: its own first, then those drawn.
        log_mean: scalar, the logarithm of the mean of e^{x·y/τ}: that of the first batch, see `crd_log_mean`.
        temperature: the paper's τ, above 0.
    """
    negatives = cosines.shape[1] - 1
    odds = cosines / temperature - log_mean - log(negatives)  # h is its sigmoid, which overflows nowhere
    own, drawn = F.logsigmoid(odds[:, :1]), F.logsigmoid(-odds[:, 1:])
    return -(own.sum() + drawn.sum()) / len(cosines)


def crd_log_mean(cosines: Tensor, *, temperature: float = 0.07) -> Tensor:
    """The logarithm of the mean of e^{x·y/τ}, a scalar without gradients.

    Args:
        cosines: as for `crd_loss`.
        temperature: the paper's τ, above 0.
    """
    exponents = cosines.detach() / temperature
    return exponents.logsumexp((0, 1)) - log(exponents.numel())


def info_nce_loss(queries: Tensor, keys: Tensor, first: int = 0, *, log_temperature: Tensor) -> Tensor:
    """InfoNCE in one direction, -log softmax of the cosines over the temperature (van den Oord et al. 2018, eq. 4).

    Computed in float32. The positive of a query is the key of its image; the negatives are all other keys.

    Args:
        queries: (n, d).
        keys: (m, d) of the same width, m at least n: those of all processes.
        first: where the keys of these queries begin.
        log_temperature: scalar, the logarithm of the temperature.
    """
    own, other = (unit_length(x.float()) for x in (queries, keys))
    with _exact(own):
        logits = own @ other.T / log_temperature.exp()
    return F.cross_entropy(logits, torch.arange(first, first + len(own), device=own.device))


def _decoupled(z: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of (own class, others) (n, 2), and of the distribution among the others (n, c - 1); ``own`` (n, 1)."""
    log_p = z.log_softmax(1)
    others = torch.arange(z.shape[1] - 1, device=z.device).expand(len(z), -1)
    # Not by a mask, which a GPU would be waited for.
    among = log_p.gather(1, others + (others >= own))
    rest = among.logsumexp(1, keepdim=True)
    return torch.cat([log_p.gather(1, own), rest], 1), among - rest


def _pearson(x: Tensor, y: Tensor) -> Tensor:
    """The correlation of each row of x with that of y."""
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    return F.cosine_similarity(x, y, dim=1)


def _relative_distances(x: Tensor) -> Tensor:
    n = len(x)
    first, second = torch.triu_indices(n, n, 1, device=x.device)
    # pdist's gradient is 0 for two equal rows, where that of a plain root is not finite. The Huber loss averages over
    # all n² ordered pairs, so the zeros of the diagonal are in.
    distances = F.pdist(x)
    full = x.new_zeros(n, n).index_put((first, second), distances / distances.mean().clamp_min(1e-12))
    return full + full.T


def _angles(x: Tensor, vertices: slice) -> Tensor:
    difference = x[None, :] - x[vertices, None]
    unit = unit_length(difference)
    with _exact(x):
        return torch.bmm(unit, unit.transpose(1, 2)).flatten()


def _exact(x: Tensor) -> torch.autocast:
    """Within the block, matrix products keep the dtype of their arguments, under autocast too."""
    return torch.autocast(x.device.type, enabled=False)
