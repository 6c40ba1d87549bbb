"""Distillation by features and by relations between samples; functions of tensors, of one rank's batch or of a gathered one.

Shape legend: N samples, D embedding width, K keys, M negatives of a query.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def fitnet(student_N: Tensor, teacher_N: Tensor) -> Tensor:
    """Mean squared difference of (adapted) student features and teacher features of one shape (Romero et al., ICLR 2015)."""
    return F.mse_loss(student_N, teacher_N.detach())


def attention_map(features_NCHW: Tensor) -> Tensor:
    """Mean over channels of |F|^2, flattened, of unit length: (N, H W)."""
    return F.normalize(features_NCHW.square().mean(dim=1).flatten(1), dim=1)


def attention_transfer(student_NCHW: Tensor, teacher_NCHW: Tensor) -> Tensor:
    """Mean squared difference of attention maps, (N,) (Zagoruyko and Komodakis, ICLR 2017). Channels may differ, H and W not."""
    return (attention_map(student_NCHW) - attention_map(teacher_NCHW.detach())).square().mean(1)


def _distances(x_ND: Tensor) -> Tensor:
    """Euclidean distances of all pairs, divided by the mean of those that aren't 0; (N, N), diagonal 0."""
    square = x_ND.square().sum(1)
    product = (square[:, None] + square[None, :] - 2 * x_ND @ x_ND.T).clamp_min(0.0)
    off = ~torch.eye(len(x_ND), dtype=torch.bool, device=x_ND.device) & (product > 1e-12)
    d_NN = torch.where(off, torch.where(off, product, 1.0).sqrt(), 0.0)
    mean = d_NN.sum() / off.sum().clamp_min(1)
    return d_NN / mean.clamp_min(1e-12)


def rkd_distance(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """RKD-D (Park et al., CVPR 2019, eq. 5): smooth-L1 of the pairs' distances, each side in units of its mean."""
    return F.smooth_l1_loss(_distances(student_ND), _distances(teacher_ND.detach()))


def _cosines(x_ND: Tensor) -> Tensor:
    """Cosine of the angle at j between i and k, (N, N, N)."""
    e_NND = F.normalize(x_ND[None, :, :] - x_ND[:, None, :], dim=2, eps=1e-12)
    return e_NND @ e_NND.transpose(1, 2)


def rkd_angle(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """RKD-A (Park et al., CVPR 2019, eq. 8): smooth-L1 of the angles in all triplets. Memory N^3."""
    return F.smooth_l1_loss(_cosines(student_ND), _cosines(teacher_ND.detach()))


def rkd(student_ND: Tensor, teacher_ND: Tensor, distance: float = 25.0, angle: float = 50.0) -> Tensor:
    """Both of RKD with the authors' weights. Widths may differ."""
    total = distance * rkd_distance(student_ND, teacher_ND) if distance else student_ND.new_zeros(())
    return total + angle * rkd_angle(student_ND, teacher_ND) if angle else total


def similarity_preserving(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """SP (Tung and Mori, ICCV 2019): squared difference of the row-normalised Gram matrices, over N^2."""
    g_s = F.normalize(student_ND.flatten(1) @ student_ND.flatten(1).T, dim=1)
    teacher_ND = teacher_ND.detach()
    g_t = F.normalize(teacher_ND.flatten(1) @ teacher_ND.flatten(1).T, dim=1)
    return (g_s - g_t).square().mean()


def contrastive_distillation(
    student_BD: Tensor, teacher_KD: Tensor, own_B: Tensor, temperature: float = 0.07, key_mask_K: Tensor | None = None
) -> Tensor:
    """Each student embedding against the teacher's of all samples, its own being right; loss_B.

    The in-batch form of CRD (Tian et al., ICLR 2020): no memory of all samples. Cosines / temperature.

    Args:
        own_B: int64 row of each sample's teacher embedding among the K.
        key_mask_K: False leaves a key out (holes).
    """
    logits_BK = F.normalize(student_BD, dim=1) @ F.normalize(teacher_KD.detach(), dim=1).T / temperature
    if key_mask_K is not None:
        out_BK = ~key_mask_K[None, :].expand_as(logits_BK)
        rows = torch.arange(len(own_B), device=own_B.device)
        out_BK = out_BK.index_put((rows, own_B), torch.zeros_like(own_B, dtype=torch.bool))
        logits_BK = logits_BK.masked_fill(out_BK, -torch.inf)
    return F.cross_entropy(logits_BK, own_B, reduction="none")


def embedding_cosine(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """1 - cosine of each (projected) student embedding and its teacher's, (N,)."""
    return 1 - F.cosine_similarity(student_ND, teacher_ND.detach(), dim=1)


def margin_mse(student_N2: Tensor, teacher_N2: Tensor) -> Tensor:
    """Mean of ((s+ - s-) - (t+ - t-))^2 (Hofstätter et al. 2020, arXiv 2010.02666); columns: positive, negative score."""
    teacher_N2 = teacher_N2.detach()
    return ((student_N2[:, 0] - student_N2[:, 1]) - (teacher_N2[:, 0] - teacher_N2[:, 1])).square().mean()


def listwise_kl(student_NM: Tensor, teacher_NM: Tensor, temperature: float = 1.0) -> Tensor:
    """KL of the softmax over a query's candidates: teacher's scores / T against the student's, (N,)."""
    log_q = torch.log_softmax(teacher_NM.detach() / temperature, dim=1)
    log_p = torch.log_softmax(student_NM / temperature, dim=1)
    return (log_q.exp() * (log_q - log_p)).sum(dim=1)
