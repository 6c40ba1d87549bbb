"""Where the true classes stand, by counting: rank, recall and loss over all classes without a top-k and without logits.

One pass over a rank's rows counts the classes above each label's score; counts and sums of exponentials are then added
over the ranks.

Shape legend: B samples of this rank, N samples of all ranks, P labels of a sample (padded with -1), C classes of this
rank, G sub-centres, R classes of a chunk, D embedding size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from labelmill.heads.batch import HasIds, class_ids, gather_queries, wrong_label
from labelmill.heads.topk import row_chunks

if TYPE_CHECKING:
    from labelmill.heads.sharded import ShardedHead


@dataclass(frozen=True)
class LabelRanks:
    """What counting found out about the labels of own samples.

    Attributes:
        rank_BP: 1 for the best of all classes; 0 where a label is padding. Equal scores stand by class id.
        score_BP: of the label, without margin: cosine, or inner product if the head doesn't normalise; -inf at padding.
        lse_B: log-sum-exp over all classes of scale * score.
        scale: of the head.
    """

    rank_BP: Tensor
    score_BP: Tensor
    lse_B: Tensor
    scale: float

    @property
    def nll_BP(self) -> Tensor:
        """-log softmax of each label, without margin; inf at padding."""
        return self.lse_B[:, None] - self.scale * self.score_BP

    def recall(self, ks: Iterable[int]) -> dict[str, Tensor]:
        """`recall@k` (B,): share of a sample's labels among the best k; NaN for a sample without labels."""
        known_BP = self.rank_BP > 0
        count_B = known_BP.sum(dim=1)
        return {f"recall@{k}": ((self.rank_BP <= k) & known_BP).sum(dim=1) / count_B for k in ks}

    @property
    def reciprocal_rank_B(self) -> Tensor:
        """1 / rank of the sample's best label; 0 without labels."""
        return torch.where(self.rank_BP > 0, 1.0 / self.rank_BP, 0.0).amax(dim=1)


@torch.no_grad()
def label_ranks(head: ShardedHead, emb_BD: Tensor, labels: HasIds | Tensor) -> LabelRanks:
    """Rank and score of every label of own samples among all classes, and their log-sum-exp.

    Collective over all ranks, of all replicas; batches of any size. A label whose score equals another class's to the
    last digits of the head's arithmetic may stand on either side of it. Memory: N x (P + a chunk of classes).

    Raises, on all ranks alike, SampleError (a DataError) for a class id out of range, NotFiniteError for embeddings
    that are not finite.
    """
    ids_BP, _ = class_ids(labels, len(emb_BD))
    wrong = ((ids_BP >= head.num_classes) | (ids_BP < -1)).nonzero()
    index, label = (int(wrong[0, 0]), int(ids_BP[tuple(wrong[0])])) if len(wrong) else (-1, 0)
    x_BD = emb_BD.to(head.device, head.dtype)
    if head.config.normalize:
        x_BD = torch.nn.functional.normalize(x_BD, dim=1, eps=1e-6)
    x_ND, counts, table = gather_queries(head.grid, x_BD, [ids_BP.shape[1], index, label])
    for rank, (count, _, at, wrong_id) in enumerate(table):
        if at >= 0:
            raise wrong_label(wrong_id, at, (rank, at, count), head.num_classes)
    padded_BP = torch.full((len(ids_BP), max(row[1] for row in table)), -1, device=head.device)
    padded_BP[:, : ids_BP.shape[1]] = ids_BP
    ids_NP = head.ranks.gather_rows(padded_BP, counts)
    rows_CGD = head.state_tensors()["rows"].view(-1, head.config.sub_centres, head.dim)
    score_NP = head.ranks.sum_(_own_scores(head, rows_CGD, x_ND, ids_NP))
    above_NP, top_N, total_N = _count(head, rows_CGD, x_ND, ids_NP, score_NP)
    rank_NP = torch.where(ids_NP >= 0, head.ranks.sum_(above_NP) + 1, 0)
    everywhere_N = head.ranks.max_(top_N.clone())
    total_N = head.ranks.sum_(total_N * torch.where(torch.isfinite(top_N), (top_N - everywhere_N).exp(), 0.0))
    first = sum(counts[: head.ranks.rank])
    mine = slice(first, first + len(x_BD))
    score_NP = torch.where(ids_NP >= 0, score_NP, -torch.inf)
    own = ids_BP.shape[1]
    return LabelRanks(
        rank_NP[mine, :own], score_NP[mine, :own], (everywhere_N + total_N.log())[mine], head.config.scale
    )


def _own_scores(head: ShardedHead, rows_CGD: Tensor, x_ND: Tensor, ids_NP: Tensor) -> Tensor:
    """Scores (N, P) of labels that this rank owns, 0 elsewhere."""
    score_NP = x_ND.new_zeros(ids_NP.shape)
    for column in range(ids_NP.shape[1]):
        ids_N = ids_NP[:, column]
        at = ((ids_N >= head.start) & (ids_N < head.stop)).nonzero()[:, 0]
        rows_KGD = rows_CGD[ids_N[at] - head.start].to(head.dtype)
        if head.config.normalize:
            rows_KGD = torch.nn.functional.normalize(rows_KGD, dim=-1)
        score_NP[at, column] = torch.linalg.vecdot(rows_KGD, x_ND[at, None]).amax(dim=1)
    return score_NP


def _count(
    head: ShardedHead, rows_CGD: Tensor, x_ND: Tensor, ids_NP: Tensor, score_NP: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Own classes above each label (N, P), the largest logit (N,), the sum of exponentials relative to it (N,)."""
    above_NP, group = torch.zeros_like(ids_NP), rows_CGD.shape[1]
    top_N, total_N = x_ND.new_full((len(x_ND),), -torch.inf), x_ND.new_zeros(len(x_ND))
    sample_N = torch.arange(len(x_ND), device=x_ND.device)
    for first, chunk_RD, scale_R in row_chunks(x_ND, rows_CGD.flatten(0, 1), head.config.normalize, group):
        score_NR = x_ND @ chunk_RD.t()
        if scale_R is not None:
            score_NR.mul_(scale_R)
        if group > 1:
            score_NR = score_NR.view(len(x_ND), -1, group).amax(dim=2)
        lo = head.start + first // group
        ids_R = torch.arange(lo, lo + score_NR.shape[1], device=x_ND.device)
        for column in range(ids_NP.shape[1]):
            ids_N, own_N = ids_NP[:, column], score_NP[:, column]
            inside = (ids_N >= lo) & (ids_N < lo + score_NR.shape[1])
            # the label itself, computed another way above, must not stand before or behind itself
            score_NR[sample_N[inside], ids_N[inside] - lo] = own_N[inside]
        for column in range(ids_NP.shape[1]):
            ids_N1, own_N1 = ids_NP[:, column, None], score_NP[:, column, None]
            above_NP[:, column] += (score_NR > own_N1).sum(dim=1)
            above_NP[:, column] += ((score_NR == own_N1) & (ids_R < ids_N1)).sum(dim=1)
        z_NR = score_NR.mul_(head.config.scale)
        new_N = torch.maximum(top_N, z_NR.amax(dim=1))
        total_N = total_N * torch.where(torch.isfinite(top_N), (top_N - new_N).exp(), 0.0)
        total_N += z_NR.sub_(new_N[:, None]).exp_().sum(dim=1)
        top_N = new_N
    return above_NP, top_N, total_N
