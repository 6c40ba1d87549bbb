"""Evaluation against hand-computed values and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from labelmill.errors import DataError
from labelmill.evaluation.clustering import (
    accumulate,
    assign_top,
    new_centres,
    nmi,
    purity,
    reseed_empty,
    spherical_kmeans,
)
from labelmill.evaluation.groups import bootstrap, metrics_by_group, paired_difference, wilson_interval
from labelmill.evaluation.probe import choose_labelled, knn_accuracy, linear_probe
from labelmill.evaluation.ranking import (
    cosine_summary,
    hits,
    mean_reciprocal_rank,
    merge_top,
    nearest_neighbours,
    retrieval_recall,
    topk_accuracy,
    unit_rows,
)

torch.set_num_threads(1)


def clusters(per: int = 60, dim: int = 8, noise: float = 0.3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(4).repeat_interleave(per)
    return centres[labels] + noise * torch.randn(4 * per, dim, generator=g), labels


def test_hits_topk_and_reciprocal_rank_by_hand() -> None:
    top = torch.tensor([[3, 1, 2], [0, 2, 1], [5, 6, 7], [4, 0, 9]])
    target = torch.tensor([[3, -1], [1, 2], [0, -1], [-1, -1]])
    found = hits(top, target)
    assert found.tolist() == [[True, False, False], [False, True, True], [False] * 3, [False] * 3]
    assert topk_accuracy(found, (1, 2)) == {"top1": 0.25, "top2": 0.5}
    assert topk_accuracy(found, (1,), weight_B=torch.tensor([1.0, 1.0, 0.0, 0.0])) == {"top1": 0.5}
    assert mean_reciprocal_rank(found) == pytest.approx((1 + 0.5) / 4)
    assert hits(top, torch.tensor([2, 9, 5, 9]))[:, 0].tolist() == [False, False, True, False]
    with pytest.raises(ValueError, match="top-4"):
        topk_accuracy(found, (4,))
    with pytest.raises(ValueError, match="no query"):
        topk_accuracy(found, weight_B=torch.zeros(4))


@pytest.mark.parametrize("block", [3, 7, 1000])
def test_nearest_neighbours_equal_the_dense_answer(block: int) -> None:
    g = torch.Generator().manual_seed(1)
    query, base = torch.randn(9, 5, generator=g), torch.randn(50, 5, generator=g)
    cos, ids = nearest_neighbours(query, base, 4, block=block)
    dense = F.normalize(query) @ F.normalize(base).T
    want = dense.topk(4, dim=1)
    assert torch.equal(ids, want.indices)
    assert torch.allclose(cos, want.values)
    _, other = nearest_neighbours(base, base, 1, exclude_self=True, block=block)
    no_self = F.normalize(base) @ F.normalize(base).T
    no_self.fill_diagonal_(-2)
    assert torch.equal(other[:, 0], no_self.argmax(dim=1))


def test_ties_go_to_the_lower_id_whatever_the_block() -> None:
    base = torch.tensor([[0.0, 1.0]] + [[1.0, 0.0]] * 9)
    for block in (1, 2, 4, 64):
        _, ids = nearest_neighbours(torch.tensor([[1.0, 0.0]]), base, 3, block=block)
        assert ids.tolist() == [[1, 2, 3]], block
    score, ids = merge_top(torch.tensor([[0.5]]), torch.tensor([[9]]), torch.tensor([[0.5, 0.1, 0.7]]), 3, 2)
    assert ids.tolist() == [[5, 3]]
    assert score.tolist() == [[pytest.approx(0.7), 0.5]]


def test_neighbour_errors_name_the_row() -> None:
    with pytest.raises(DataError, match=r"row 1 .*1 of 3 rows"):
        unit_rows(torch.tensor([[1.0], [0.0], [2.0]]))
    with pytest.raises(DataError, match="row 0"):
        unit_rows(torch.tensor([[float("nan")]]))
    with pytest.raises(ValueError, match="5 neighbours"):
        nearest_neighbours(torch.ones(1, 2), torch.ones(4, 2), 5)


def test_retrieval_recall_by_hand() -> None:
    angle = torch.deg2rad(torch.tensor([0.0, 10.0, 25.0, 90.0, 97.0, 180.0]))
    emb = torch.stack([angle.cos(), angle.sin()], dim=1)
    label = torch.tensor([0, 1, 0, 1, 1, 2])
    # rows 0..4 count (label 2 occurs once); nearest other: 0->1 no, 1->0 no, 2->1 no, 3->4 yes, 4->3 yes
    result = retrieval_recall(emb, label, (1, 2), block=2)
    assert result == {"recall@1": pytest.approx(2 / 5), "recall@2": pytest.approx(4 / 5)}
    duplicates = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert retrieval_recall(duplicates, torch.tensor([0, 0, 1, 1]), (1,)) == {"recall@1": 1.0}
    with pytest.raises(ValueError, match="two rows"):
        retrieval_recall(emb, torch.arange(6))


def test_cosine_summary_separates_clusters() -> None:
    emb, label = clusters()
    result = cosine_summary(emb, label, pairs=4000, seed=3)
    again = cosine_summary(emb, label, pairs=4000, seed=3)
    assert result["same_mean"] == again["same_mean"]
    cos = F.normalize(emb) @ F.normalize(emb).T
    same = (label[:, None] == label[None, :]) & ~torch.eye(len(label), dtype=torch.bool)
    assert result["same_mean"] == pytest.approx(float(cos[same].mean()), abs=0.01)
    assert result["different_mean"] == pytest.approx(float(cos[label[:, None] != label[None, :]].mean()), abs=0.03)
    assert 0.9 < float(result["separation"]) <= 1.0  # type: ignore[arg-type]
    assert math.isnan(cosine_summary(emb[:4], torch.arange(4))["separation"])  # type: ignore[arg-type]


def test_wilson_interval_known_values() -> None:
    # scipy.stats.binomtest(...).proportion_ci(method="wilson")
    assert wilson_interval(8, 10) == pytest.approx((0.4901624715, 0.9433178485), abs=1e-9)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775327998), abs=1e-9)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="11 correct of 10"):
        wilson_interval(11, 10)


def test_metrics_by_group() -> None:
    rows = metrics_by_group(["b", "a", "b", "b"], np.array([1, 0, 1, 0], dtype=bool))
    assert [(r.group, r.count, r.correct) for r in rows] == [("a", 1, 0), ("b", 3, 2), ("all", 4, 2)]
    assert rows[1].accuracy == pytest.approx(2 / 3)
    assert rows[1].low < 2 / 3 < rows[1].high
    ordered = metrics_by_group([1, 2], np.array([True, False]), order=["2", "1", "3"], total=None)
    assert [r.group for r in ordered] == ["2", "1", "3"]
    assert math.isnan(ordered[2].accuracy)
    assert (ordered[2].low, ordered[2].high) == (0.0, 1.0)
    with pytest.raises(ValueError, match=r"\['z'\]"):
        metrics_by_group(["z"], np.array([True]), order=["a"])
    with pytest.raises(ValueError, match="2 groups"):
        metrics_by_group(["a", "b"], np.array([True]))


def test_bootstrap_and_paired_difference() -> None:
    values = np.random.default_rng(0).normal(5.0, 1.0, 400)
    mean, low, high = bootstrap(values, seed=1)
    assert mean == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.15)
    assert bootstrap(values, seed=1) == (mean, low, high)
    assert bootstrap(np.array([1.0, 2.0, 9.0]), lambda s: float(np.median(s)), draws=50)[0] == 2.0
    difference, low, high = paired_difference(values + 0.1, values)
    assert (difference, low, high) == pytest.approx((0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match="no values"):
        bootstrap(np.array([]))


def test_linear_probe_learns_and_never_sees_the_test_set() -> None:
    train, label = clusters(noise=0.8)
    test, test_label = clusters(per=100, noise=0.8, seed=5)
    result = linear_probe(train, label, test, test_label, seed=0, num_labels=80)
    assert result.num_labels == 80
    assert result.accuracy > 0.8
    assert result.low < result.accuracy < result.high
    shuffled = linear_probe(train, label, test, test_label.flip(0), seed=0, num_labels=80)
    assert shuffled.c == result.c
    assert np.array_equal(shuffled.predicted_M, result.predicted_M)
    # standardised: scale and offset of a column change nothing
    moved = linear_probe(train * 100 + 3, label, test * 100 + 3, test_label, seed=0, num_labels=80)
    assert moved.accuracy == pytest.approx(result.accuracy, abs=0.01)


def test_linear_probe_equals_scikit_learn_with_one_c() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    train, label = clusters(noise=1.5)
    test, test_label = clusters(per=50, noise=1.5, seed=6)
    scaler = StandardScaler().fit(train.numpy().astype(np.float64))
    model = LogisticRegression(C=0.1, max_iter=300).fit(scaler.transform(train.numpy()), label.numpy())
    want = model.score(scaler.transform(test.numpy()), test_label.numpy())
    assert linear_probe(train, label, test, test_label, grid=(0.1,)).accuracy == pytest.approx(want, abs=0.006)


def test_choose_labelled() -> None:
    label = np.array([0] * 5 + [1] * 9)
    rows = choose_labelled(label, seed=2, labels_per_class=3)
    assert np.bincount(label[rows]).tolist() == [3, 3]
    assert np.array_equal(rows, choose_labelled(label, seed=2, labels_per_class=3))
    assert len(choose_labelled(label, 0)) == 14
    with pytest.raises(ValueError, match="class 0 has 5 rows"):
        choose_labelled(label, 0, labels_per_class=6)
    with pytest.raises(ValueError, match="not both"):
        choose_labelled(label, 0, labels_per_class=1, num_labels=1)
    with pytest.raises(ValueError, match="num_labels is 15"):
        choose_labelled(label, 0, num_labels=15)
    with pytest.raises(ValueError, match="two classes"):
        linear_probe(np.ones((4, 2)), np.zeros(4), np.ones((1, 2)), np.zeros(1))


def test_knn_equals_scikit_learn() -> None:
    from sklearn.neighbors import KNeighborsClassifier

    train, label = clusters(noise=1.0)
    test, test_label = clusters(per=40, noise=1.0, seed=7)
    unit, unit_test = F.normalize(train).numpy(), F.normalize(test).numpy()
    reference = KNeighborsClassifier(
        7,
        weights=lambda d: np.exp((-(d**2) / 2) / 0.1),  # cos - 1 = -d^2 / 2 for unit rows
    ).fit(unit, label.numpy())
    want = reference.score(unit_test, test_label.numpy())
    assert knn_accuracy(train, label, test, test_label, k=7, temperature=0.1, block=33) == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("block", [2, 5, 100])
def test_assign_top_equals_the_dense_answer(block: int) -> None:
    g = torch.Generator().manual_seed(0)
    emb = F.normalize(torch.randn(20, 6, generator=g))
    centre = F.normalize(torch.randn(11, 6, generator=g))
    ids, cos = assign_top(emb, centre, 3, block)
    want = (emb @ centre.T).topk(3, dim=1)
    assert torch.equal(ids, want.indices)
    assert torch.allclose(cos, want.values)
    with pytest.raises(ValueError, match="12 centres"):
        assign_top(emb, centre, 12)


def test_blocks_add_up_to_one_pass() -> None:
    emb, _ = clusters()
    ids = torch.arange(len(emb)) % 5
    whole_sum, whole_count = accumulate(emb, ids, 6)
    parts = [accumulate(emb[lo : lo + 50], ids[lo : lo + 50], 6) for lo in range(0, len(emb), 50)]
    assert torch.allclose(sum(p[0] for p in parts), whole_sum)  # type: ignore[arg-type]
    assert torch.equal(sum(p[1] for p in parts), whole_count)  # type: ignore[arg-type]
    assert whole_count.tolist() == [48] * 5 + [0]
    old = F.normalize(torch.ones(6, emb.shape[1]))
    fresh = new_centres(whole_sum, whole_count, old)
    assert torch.equal(fresh[5], old[5])
    assert torch.allclose(fresh[2], F.normalize(emb[ids == 2].sum(dim=0), dim=0), atol=1e-6)


def test_reseed_empty_takes_distinct_rows() -> None:
    pool = F.normalize(torch.randn(10, 3, generator=torch.Generator().manual_seed(0)))
    centre = torch.zeros(5, 3)
    fresh, count = reseed_empty(centre, torch.tensor([4, 0, 2, 0, 0]), pool, seed=3)
    assert count == 3
    assert torch.equal(fresh[[0, 2]], centre[[0, 2]])
    rows = [(pool == row).all(dim=1).nonzero().item() for row in fresh[[1, 3, 4]]]
    assert len(set(rows)) == 3
    again, _ = reseed_empty(centre, torch.tensor([4, 0, 2, 0, 0]), pool, seed=3)
    assert torch.equal(again, fresh)
    assert reseed_empty(centre, torch.ones(5, dtype=torch.long), pool, 0)[1] == 0


def test_spherical_kmeans_finds_clusters() -> None:
    emb, label = clusters(noise=0.15)
    result = spherical_kmeans(emb, 8, passes=8, seed=1, block=50)
    assert torch.equal(result.id_N, spherical_kmeans(emb, 8, passes=8, seed=1, block=7).id_N)
    assert torch.allclose(result.centre_KD.norm(dim=1), torch.ones(8))
    assert all(b >= a - 1e-6 for a, b in zip(result.mean_cosine, result.mean_cosine[1:], strict=False))
    assert purity(result.id_N, label) > 0.95
    with pytest.raises(ValueError, match="centres asked"):
        spherical_kmeans(emb[:3], 4)
    with pytest.raises(DataError, match="row 2"):
        spherical_kmeans(torch.tensor([[1.0], [1.0], [0.0]]), 2)


def test_purity_and_nmi() -> None:
    cluster, label = np.array([0, 0, 0, 7, 7, 9]), np.array([2, 2, 5, 5, 5, 2])
    assert purity(cluster, label) == pytest.approx(5 / 6)
    assert nmi(label, label) == pytest.approx(1.0)
    assert nmi(np.zeros(6), label) == pytest.approx(0.0)
    assert purity(torch.tensor([1, 1]), torch.tensor([0, 0])) == 1.0
