"""Contrastive losses over embeddings of a batch.

Shape legend: B queries, N keys (of all ranks), D embedding width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def in_batch_softmax(
    query_BD: Tensor, key_ND: Tensor, query_id_B: Tensor, key_id_N: Tensor, own_B: Tensor, scale: float
) -> Tensor:
    """Softmax of each query over the keys, the key at `own_B` being right; float32 loss_B.

    loss_b = -z_bo + log(sum_n e^{z_bn}), z = scale * cosine, o = own_b; keys n != o with the query's id or id -1 (holes)
    take no part. The contrastive loss of dual encoders (Oord et al. 2018, InfoNCE; Radford et al. 2021, one side).

    Args:
        query_BD, key_ND: not normalised, any floating dtype.
        query_id_B, key_id_N: int64 identities.
        own_B: int64 row of each query's key.
        scale: 1 / temperature.
    """
    logits_BN = scale * F.normalize(query_BD.float(), dim=1) @ F.normalize(key_ND.float(), dim=1).T
    out_BN = (query_id_B[:, None] == key_id_N[None, :]) | (key_id_N < 0)[None, :]
    out_BN[torch.arange(len(own_B), device=own_B.device), own_B] = False
    return F.cross_entropy(logits_BN.masked_fill(out_BN, -torch.inf), own_B, reduction="none")


def info_nce(query_BD: Tensor, key_BD: Tensor, queue_MD: Tensor, temperature: float) -> Tensor:
    """-ln( e^{q.k / t} / (e^{q.k / t} + sum_m e^{q.n_m / t}) ), float32 loss_B (He et al., MoCo, CVPR 2020, eq. 1).

    Args:
        query_BD: any length, with gradient; cosines are compared.
        key_BD: the other view of each query, no gradient.
        queue_MD: unit rows of earlier keys, the negatives.
        temperature: t.
    """
    q_BD, k_BD = F.normalize(query_BD.float(), dim=1), F.normalize(key_BD.detach().float(), dim=1)
    own_B1 = (q_BD * k_BD).sum(dim=1, keepdim=True)
    logits = torch.cat([own_B1, q_BD @ queue_MD.float().T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q_BD), dtype=torch.int64, device=q_BD.device), reduction="none")
