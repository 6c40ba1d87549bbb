"""Losses that make a model forget.

Shape legend: B samples of this rank, S retained and U forgotten ones among them, D embedding width, C classes, L latent width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from labelmill.errors import DataError


def psi(r: Tensor) -> Tensor:
    """exp(r / (r + 1)) for r >= 0: rises from 1 towards e, so that a negated sum of it is bounded (LAF, eq. of L_UE)."""
    return torch.exp(r / (r + 1))


def reconstruction(e_BD: Tensor, h_BD: Tensor) -> Tensor:
    """Squared distance of an embedding and its reconstruction, (B,)."""
    return (h_BD - e_BD).square().sum(dim=1)


def latent_kl(mu_BL: Tensor, sigma_BL: Tensor, eps: float = 1e-8) -> Tensor:
    """KL of N(mu, sigma^2) from N(0, 1) summed over the latents, (B,): -1/2 sum(ln(sigma^2 + eps) + 1 - mu^2 - sigma^2)."""
    variance = sigma_BL.square()
    return -0.5 * (torch.log(variance + eps) + 1 - mu_BL.square() - variance).sum(dim=1)


def cosine_distance(e_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """1 - cos(e_i, T(e)_i), (B,). Raises DataError for an embedding of length zero or with NaN: it has no direction."""
    for who, rows in (("the model's", e_BD), ("the original model's", teacher_BD)):
        length_B = torch.linalg.vector_norm(rows.detach(), dim=1)
        bad = (~torch.isfinite(length_B) | (length_B == 0)).nonzero()
        if len(bad):
            raise DataError(f"{who} embedding {int(bad[0])} of a batch has no direction (zero, NaN or infinite).")
    return 1 - F.cosine_similarity(e_BD, teacher_BD, dim=1)


def alignment(c_retain_S: Tensor, c_forget_U: Tensor, temperature: float) -> Tensor:
    """LAF's L_RA = sum_i ln(exp(c1_i) / sum_j exp(c2_j / temp)) = sum_i c1_i - |s| logsumexp_j(c2_j / temp), a scalar.

    Of the cosine distances of a whole global batch: retained embeddings are drawn to the original model's, forgotten ones
    pushed off. Raises ValueError for a temperature of 0 or less, DataError when either side is empty.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    if not len(c_retain_S) or not len(c_forget_U):
        raise DataError("a batch needs retained and forgotten samples for the alignment.")
    return c_retain_S.sum() - len(c_retain_S) * torch.logsumexp(c_forget_U / temperature, dim=0)


def kl_to_teacher(logits_BC: Tensor, teacher_BC: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of softmax(logits / temperature), times temperature^2, (B,) (Hinton et al. 2015)."""
    student, teacher = F.log_softmax(logits_BC / temperature, dim=1), F.log_softmax(teacher_BC / temperature, dim=1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(dim=1)


def dampened(value: Tensor, importance: Tensor, forget: Tensor, alpha: float, lam: float) -> Tensor:
    """Selective synaptic dampening: theta * min(lam * I_D / I_f, 1) where I_f > alpha * I_D, else theta.

    Foster, Schoepf, Brintrup (AAAI 2024), eq. 5-6; I are diagonals of the Fisher information on all and on forgotten data.
    """
    factor = (lam * importance / forget.clamp_min(torch.finfo(forget.dtype).tiny)).clamp_max(1.0)
    return torch.where(forget > alpha * importance, value * factor, value)


def other_label(label_B: Tensor, hash_B: Tensor, num_classes: int) -> Tensor:
    """A class that isn't the given one, uniform over non-negative hashes, the same for a sample each time, (B,)."""
    if num_classes < 2:
        raise DataError("with one class there is no other label.")
    return (label_B + 1 + hash_B % (num_classes - 1)) % num_classes


def fisher_noise_variance(retain: Tensor, alpha: float, most: float) -> Tensor:
    """Variance alpha min(1 / F_r, most) of the noise that hides what weights knew beyond the retained samples.

    Golatkar, Achille, Soatto: Eternal Sunshine of the Spotless Net (CVPR 2020), Fisher forgetting as their code has it: the
    text's standard deviation (lambda sigma^2)^(1/4) F^(-1/4) is a variance that falls with F^(1/2).
    """
    return alpha * (1 / retain.clamp_min(1 / most))
