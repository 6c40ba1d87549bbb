"""Membership inference: can one tell from a model's answers that a sample was trained on?

Every attack learns on retained samples (members) and half of the unseen ones, and is asked about the samples in question and
the other half. What it gives is the balanced accuracy of telling those apart: 0.5 if they can't be, 1 if they are known as
members, and below 0.5 where they are recognised as something else, which is no safety either. Compare with a model that
never saw them.

With `match_classes` unseen samples count as much as samples in question of the same class, and the attack may learn
from samples of the other classes alone if there are no others. A class that is gone then isn't taken for membership.

Shape legend: N samples, K classes or best classes of a sample, S shadow models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Answers:
    """What a model said about samples.

    Attributes:
        label_N: the given class.
        given_N: its probability.
        prob_NK: probabilities, largest first (all classes, or the best).
    """

    label_N: np.ndarray
    given_N: np.ndarray
    prob_NK: np.ndarray

    def __len__(self) -> int:
        return len(self.label_N)

    def take(self, rows: np.ndarray) -> Answers:
        """Some of them."""
        return Answers(self.label_N[rows], self.given_N[rows], self.prob_NK[rows])

    @property
    def loss_N(self) -> np.ndarray:
        """Cross-entropy of the given class."""
        return -np.log(np.clip(self.given_N, 1e-12, 1.0))

    @property
    def features_NK(self) -> np.ndarray:
        """Sorted probabilities as the learned attacks see them: their logarithms, which spread what crowds at 0 and 1."""
        return np.log(np.clip(self.prob_NK, 1e-6, 1.0))


Scorer = Callable[[Answers, Answers, np.ndarray, int], Callable[[Answers], np.ndarray]]
"""Fits on (members, non-members, weights of both, seed); gives bool "is a member" for answers."""


def _loss_threshold(
    members: Answers, others: Answers, weight: np.ndarray, seed: int
) -> Callable[[Answers], np.ndarray]:
    """Yeom et al., Privacy Risk in Machine Learning (CSF 2018): a member has a small loss; the best threshold."""
    loss = np.concatenate([members.loss_N, others.loss_N])
    signed = np.concatenate([weight[: len(members)], -weight[len(members) :]])
    order = np.argsort(loss, kind="stable")
    reach = np.cumsum(signed[order])  # share of members minus share of others at or below each loss
    ends = np.append(loss[order][1:] != loss[order][:-1], True)  # equal losses go together
    best = np.flatnonzero(ends)[np.argmax(reach[ends])]
    threshold = loss[order][best] if reach[best] > 0 else -np.inf
    return lambda asked: asked.loss_N <= threshold


def _learned(build: Callable[[int], object]) -> Scorer:
    def fit(members: Answers, others: Answers, weight: np.ndarray, seed: int) -> Callable[[Answers], np.ndarray]:
        x = np.concatenate([members.features_NK, others.features_NK])
        y = np.repeat([True, False], [len(members), len(others)])
        model = build(seed)
        model.fit(x, y, sample_weight=weight)  # type: ignore[attr-defined]
        return lambda asked: np.asarray(model.predict(asked.features_NK), bool)  # type: ignore[attr-defined]

    return fit


def _logistic(seed: int) -> object:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=500)


def _boosted(seed: int) -> object:
    from sklearn.ensemble import HistGradientBoostingClassifier

    return HistGradientBoostingClassifier(max_iter=100, max_leaf_nodes=15, early_stopping=False, random_state=seed)


ATTACKS: dict[str, Scorer] = {
    "threshold": _loss_threshold,
    "logistic": _learned(_logistic),
    "boosted": _learned(_boosted),
}


def attack(
    kind: str, asked: Answers, members: Answers, unseen: Answers, seed: int = 0, match_classes: bool = False
) -> float:
    """Balanced accuracy of telling `asked` (called members) from unseen samples; see the top of this file.

    Members are cut to as many as are asked about. NaN where there is nothing to learn from or to compare with. Raises
    ValueError for an unknown attack.
    """
    if kind not in ATTACKS:
        raise ValueError(f"attack {kind!r} is none of {', '.join(ATTACKS)}")
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(unseen))
    known, held = unseen.take(shuffled[::2]), unseen.take(shuffled[1::2])
    members = members.take(rng.permutation(len(members))[: max(len(asked), 200)])
    if match_classes:
        weight_held = _matched(held.label_N, asked.label_N)
        present = np.isin(known.label_N, members.label_N)
        known = known.take(np.flatnonzero(present))
        weight_known = _matched(known.label_N, members.label_N)
        # samples in question whose class no unseen sample has can't be compared
        asked = asked.take(np.flatnonzero(np.isin(asked.label_N, held.label_N)))
    else:
        weight_held, weight_known = np.ones(len(held)), np.ones(len(known))
    if min(len(asked), len(members), len(known)) == 0 or weight_held.sum() == 0 or weight_known.sum() == 0:
        return float("nan")
    weight = np.concatenate([np.full(len(members), 1 / len(members)), weight_known / weight_known.sum()])
    is_member = ATTACKS[kind](members, known, weight * (len(members) + len(known)) / 2, seed)
    hit = is_member(asked).mean()
    miss = (is_member(held) * weight_held).sum() / weight_held.sum()
    return float((hit + 1 - miss) / 2)


def _matched(label_N: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Weights that give the classes of `label_N` the shares they have in `wanted`."""
    size = int(max(label_N.max(initial=0), wanted.max(initial=0))) + 1
    has_C, wants_C = np.bincount(label_N, minlength=size), np.bincount(wanted, minlength=size)
    return (wants_C / np.maximum(has_C, 1))[label_N].astype(np.float64)


# --- with shadow models ---------------------------------------------------------------------------------------


def logit_confidence(given_N: np.ndarray) -> np.ndarray:
    """ln(p / (1 - p)) of the given class: about Gaussian over models (Carlini et al. 2022, section V.A)."""
    p = np.clip(np.asarray(given_N, np.float64), 1e-7, 1 - 1e-7)
    return np.log(p / (1 - p))


def lira_scores(
    target_N: np.ndarray, shadow_SN: np.ndarray, inside_SN: np.ndarray, offline: bool = False
) -> np.ndarray:
    """Likelihood-ratio scores (N,), larger for members, from shadow models.

    Carlini et al., Membership Inference Attacks From First Principles (S&P 2022). ln N(c; in) - ln N(c; out) for samples that
    some shadow models saw and others didn't; -ln P(out >= c) (the offline attack) for those that none saw. One
    spread for all samples, which is what the paper advises below some 64 models.

    Args:
        target_N: `logit_confidence` of the model under attack.
        shadow_SN: the same of the shadow models.
        inside_SN: bool, whether a shadow model was trained on the sample.
        offline: the offline attack for all samples, which makes scores of seen and of unseen ones comparable.

    Raises ValueError for a sample that every shadow model saw.
    """
    inside_SN = np.asarray(inside_SN, bool)
    if inside_SN.all(axis=0).any():
        raise ValueError(f"sample {int(inside_SN.all(axis=0).argmax())} was in the training set of every shadow model")

    def fit(mask_SN: np.ndarray) -> tuple[np.ndarray, float]:
        count_N = mask_SN.sum(0)
        mean_N = np.where(mask_SN, shadow_SN, 0).sum(0) / np.maximum(count_N, 1)
        square_N = np.where(mask_SN, (shadow_SN - mean_N) ** 2, 0).sum(0)
        free = int(np.maximum(count_N - 1, 0).sum())
        return mean_N, max(float(np.sqrt(square_N.sum() / max(free, 1))), 1e-3)

    out_N, out_sd = fit(~inside_SN)
    in_N, in_sd = fit(inside_SN)
    from scipy.stats import norm

    ratio_N = norm.logpdf(target_N, in_N, in_sd) - norm.logpdf(target_N, out_N, out_sd)
    tail_N = -norm.logsf(target_N, out_N, out_sd)
    return tail_N if offline else np.where(inside_SN.any(axis=0), ratio_N, tail_N)


def roc(member_scores: np.ndarray, other_scores: np.ndarray, at_fpr: float = 0.01) -> tuple[float, float]:
    """(area under the curve, true-positive rate at a false-positive rate) of scores that are larger for members."""
    from sklearn.metrics import roc_auc_score

    y = np.repeat([1, 0], [len(member_scores), len(other_scores)])
    area = float(roc_auc_score(y, np.concatenate([member_scores, other_scores])))
    threshold = np.quantile(other_scores, 1 - at_fpr, method="higher")
    return area, float((np.asarray(member_scores) > threshold).mean())
