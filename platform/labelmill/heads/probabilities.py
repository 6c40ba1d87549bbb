"""Softmax probabilities of a class-sharded head, for the few classes that matter: the given one and the best.

Shape legend: B samples of this rank, N of all ranks, R class rows of a chunk, k results.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from labelmill.heads.sharded import ShardedHead
from labelmill.heads.topk import row_chunks


@dataclass(frozen=True)
class Probabilities:
    """Of each sample, over all classes, though only a few are named.

    Attributes:
        given_B: probability of the given class; 0 for a class id below 0.
        entropy_B: -sum p ln p in nats.
        class_id_Bk, prob_Bk: the k most probable classes, most probable first.
    """

    given_B: Tensor
    entropy_B: Tensor
    class_id_Bk: Tensor
    prob_Bk: Tensor


@torch.no_grad()
def class_probabilities(head: ShardedHead, emb_BD: Tensor, given_B: Tensor, k: int) -> Probabilities:
    """softmax(scale * similarity) without margin. Collective, batches of any size; no batch x classes in memory.

    Each rank keeps the log-sum-exp of its rows and the sum of z e^z; five numbers a sample are joined over the ranks.
    Raises as `ShardedHead.topk`.
    """
    sims_Bk, id_Bk = head.topk(emb_BD, k)
    x_BD = emb_BD.to(head.device, head.dtype)
    if head.config.normalize:
        x_BD = torch.nn.functional.normalize(x_BD, dim=1, eps=1e-6)
    counts = [n for (n,) in head.ranks.gather_numbers([len(x_BD)], head.device)]
    x_ND = head.ranks.gather_rows(x_BD, counts)
    given_N = head.ranks.gather_rows(given_B.to(head.device), counts)
    top_N = x_ND.new_full((len(x_ND),), -torch.inf)
    sum_N, moment_N, own_N = torch.zeros_like(top_N), torch.zeros_like(top_N), torch.zeros_like(top_N)
    group, scale = head.config.sub_centres, head.config.scale
    for first, chunk_RD, factor_R in row_chunks(x_ND, head.w_CD, head.config.normalize, multiple=group):
        z_NR = x_ND @ chunk_RD.t()
        z_NR = scale * (z_NR if factor_R is None else z_NR * factor_R)
        z_NR = z_NR if group == 1 else z_NR.unflatten(1, (-1, group)).amax(dim=2)
        start = head.start + first // group
        mine = (given_N >= start) & (given_N < start + z_NR.shape[1])
        own_N[mine] = z_NR[mine, given_N[mine] - start]
        higher_N = torch.maximum(top_N, z_NR.amax(dim=1))
        shrink_N = torch.exp(top_N - higher_N)
        e_NR = torch.exp(z_NR - higher_N[:, None])
        sum_N = sum_N * shrink_N + e_NR.sum(dim=1)
        moment_N = moment_N * shrink_N + (e_NR * z_NR).sum(dim=1)
        top_N = higher_N
    all_top_N = head.ranks.max_(top_N.clone())
    shrink_N = torch.exp(top_N - all_top_N)
    sum_N, moment_N, own_N = head.ranks.sum_(torch.stack([sum_N * shrink_N, moment_N * shrink_N, own_N]))
    lse_N = all_top_N + torch.log(sum_N)
    entropy_N = (lse_N - moment_N / sum_N).clamp_min(0.0)
    self_N = torch.where(given_N >= 0, torch.exp(own_N - lse_N), 0.0)
    rank = head.ranks.rank
    mine_B = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    prob_Bk = torch.exp(scale * sims_Bk - lse_N[mine_B, None])
    return Probabilities(self_N[mine_B], entropy_N[mine_B], id_Bk, prob_Bk)
