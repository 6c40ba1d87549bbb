"""A Gaussian for each class in feature space, robust to wrong labels, and lent from frequent classes to rare ones.

Zhang et al., When Noisy Labels Meet Long Tail Dilemmas: A Representation Calibration Method (ICCV 2023, arXiv 2211.10955);
the calibration follows Yang, Liu, Xu, Free Lunch for Few-shot Learning (ICLR 2021), which the paper builds on.

Shape legend: N rows, n rows of a class, K classes, D feature width, q lending classes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from labelmill.errors import DataError

log = logging.getLogger("labelmill")


def local_outlier_factor(z_nD: np.ndarray, neighbours: int = 20) -> np.ndarray:
    """float64 (n,): density of the neighbours relative to a row's own; well above 1 is an outlier (Breunig et al. 2000).

    With as many neighbours as rows or more, n - 1 are taken.
    """
    from sklearn.neighbors import LocalOutlierFactor

    if len(z_nD) < 2:
        return np.ones(len(z_nD))
    neighbours = min(neighbours, len(z_nD) - 1)
    found = LocalOutlierFactor(n_neighbors=neighbours).fit(np.asarray(z_nD, np.float64))
    return -found.negative_outlier_factor_


@dataclass(frozen=True)
class ClassGaussians:
    """Mean and covariance of each class.

    Attributes:
        mean_KD, cov_KDD: float64.
        count_K: rows that are labelled so.
        kept_K: rows that the estimate is made of, outliers left out. Classes with none have mean and covariance 0.
    """

    mean_KD: np.ndarray
    cov_KDD: np.ndarray
    count_K: np.ndarray
    kept_K: np.ndarray

    def sample(self, cls: int, number: int, seed: int, step: int = 0, jitter: float = 1e-6) -> np.ndarray:
        """float64 (number, D) drawn from a class, by (seed, class, step). Raises DataError for a covariance of none."""
        rng = np.random.default_rng([seed, cls, step])
        cov = self.cov_KDD[cls] + jitter * np.eye(self.cov_KDD.shape[1])
        try:
            factor = np.linalg.cholesky(cov)
        except np.linalg.LinAlgError:
            raise DataError(
                f"class {cls}: the covariance of {int(self.kept_K[cls])} rows of {cov.shape[0]} features is no covariance "
                "(not positive definite). Raise alpha, or shrink."
            ) from None
        return self.mean_KD[cls] + rng.normal(size=(number, len(cov))) @ factor.T


def class_gaussians(
    z_ND: np.ndarray,
    label_N: np.ndarray,
    num_classes: int,
    neighbours: int = 20,
    factor: float = 1.5,
    most: int = 20_000,
    shrink: bool = True,
) -> ClassGaussians:
    """Mean and unbiased covariance of each class's rows without its local outliers.

    Args:
        z_ND: features.
        label_N: given labels; some are wrong.
        neighbours: of the local outlier factor; 0 keeps every row.
        factor: rows with a larger local outlier factor are left out.
        most: rows of a class that are looked at; a fixed random choice of larger classes.
        shrink: covariances of fewer rows than features move towards their diagonal, by the share that is missing.

    Raises DataError for features that are not finite.
    """
    z_ND, dim = np.asarray(z_ND, np.float64), z_ND.shape[1]
    if len(bad := np.flatnonzero(~np.isfinite(z_ND).all(axis=1))):
        raise DataError(f"the features of row {bad[0]} are not finite ({len(bad)} such row(s)).")
    order = np.argsort(label_N, kind="stable")
    count_K = np.bincount(label_N, minlength=num_classes)
    edges = np.concatenate([[0], np.cumsum(count_K)])
    mean, cov, kept_K = np.zeros((num_classes, dim)), np.zeros((num_classes, dim, dim)), np.zeros(num_classes, np.int64)
    for k in range(num_classes):
        rows = order[edges[k] : edges[k + 1]]
        if len(rows) > most:
            rows = np.random.default_rng(k).choice(rows, most, replace=False)
        z = z_ND[rows]
        if neighbours and len(z) > 2:
            if neighbours >= len(z):
                log.info("class %d: %d neighbours of %d rows; %d are taken", k, neighbours, len(z), len(z) - 1)
            z = z[local_outlier_factor(z, neighbours) <= factor]
        kept_K[k] = len(z)
        if not len(z):
            continue
        mean[k] = z.mean(axis=0)
        if len(z) > 1:
            cov[k] = np.cov(z, rowvar=False).reshape(dim, dim)
            if shrink and len(z) <= dim:
                away = 1 - (len(z) - 1) / dim
                cov[k] = (1 - away) * cov[k] + away * np.diag(np.diagonal(cov[k]))
    return ClassGaussians(mean, cov, count_K, kept_K)


def head_classes(count_K: np.ndarray, share: float = 0.6) -> np.ndarray:
    """bool (K,): the largest classes that together hold `share` of the rows; the others are the tail.

    Raises DataError when there is no class with rows.
    """
    if not count_K.sum():
        raise DataError("no class has a row.")
    order = np.argsort(-count_K, kind="stable")
    before = np.concatenate([[0], np.cumsum(count_K[order])[:-1]])
    head = np.zeros(len(count_K), np.bool_)
    head[order[(before < share * count_K.sum()) & (count_K[order] > 0)]] = True
    return head


def calibrate_tail(
    given: ClassGaussians,
    head_K: np.ndarray,
    q: int = 3,
    beta: float = 0.5,
    alpha: float = 0.1,
    ones: bool = False,
) -> tuple[ClassGaussians, list[str]]:
    """Tail classes borrow mean and covariance from the q nearest head classes; warnings besides.

    mean' = beta sum_c w_c mean_c + (1 - beta) mean, the covariance alike plus alpha I; w_c proportional to n_c / distance^2.
    A head class in the same place gets all the weight. A tail class with fewer than 2 rows borrows all (beta 1); without any
    row its nearest classes aren't known, and it borrows from every head class by size.

    Args:
        given: estimates.
        head_K: bool, the classes that lend.
        q, beta, alpha: as above.
        ones: add alpha to every entry of the covariance instead of the diagonal, as the paper's line of work does.

    Raises DataError when there is no head class.
    """
    head = np.flatnonzero(head_K & (given.kept_K > 0))
    if not len(head):
        raise DataError("no head class that could lend. Raise the share of the head.")
    mean, cov, warnings = given.mean_KD.copy(), given.cov_KDD.copy(), []
    dim = mean.shape[1]
    spread = alpha * (np.ones((dim, dim)) if ones else np.eye(dim))
    few: list[int] = []
    for k in np.flatnonzero(~head_K):
        if given.kept_K[k]:
            distance = ((given.mean_KD[head] - given.mean_KD[k]) ** 2).sum(axis=1)
            near = np.argsort(distance, kind="stable")[:q]
            lend, weight = head[near], lending_weights(given.count_K[head[near]], distance[near])
        else:
            lend, weight = head, given.count_K[head] / given.count_K[head].sum()
        own = beta
        if given.kept_K[k] < 2:
            own = 1.0
            few.append(int(k))
        mean[k] = own * weight @ given.mean_KD[lend] + (1 - own) * given.mean_KD[k]
        cov[k] = own * np.tensordot(weight, given.cov_KDD[lend], 1) + (1 - own) * given.cov_KDD[k] + spread
    if few:
        warnings.append(
            f"{len(few)} class(es) have fewer than 2 rows and borrow all they have, such as class {few[0]}."
        )
    return replace(given, mean_KD=mean, cov_KDD=cov), warnings


def lending_weights(count_q: np.ndarray, distance_q: np.ndarray) -> np.ndarray:
    """n / distance^2 (squared distances), normalised; a distance of 0 takes all."""
    same = distance_q < 1e-12
    raw = same.astype(np.float64) if same.any() else count_q / distance_q
    return raw / raw.sum()


def missing_to_balance(count_K: Sequence[int] | np.ndarray, most: int | None = None) -> np.ndarray:
    """int64 (K,): how many samples each class lacks to the largest one, at most `most`."""
    count = np.asarray(count_K)
    lacking = count.max(initial=0) - count
    return lacking if most is None else np.minimum(lacking, most)
