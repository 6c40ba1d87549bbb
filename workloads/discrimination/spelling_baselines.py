"""What a spelling corrector does without training, on the same vocabulary and queries.

`ngram_nearest`: TF-IDF cosine over character n-grams. `edit_rule`: every word within one edit, and the n-gram shortlist,
ranked by edit distance, then by frequency.

Shape legend: Q queries, K ranked classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import scipy.sparse as sp

from labelmill.encoders.augment import code_points
from labelmill.encoders.text import CharNgramsConfig, hash_features

_HASH_BITS = 22


def _ngram_counts(words: list[str], orders: tuple[int, ...]) -> sp.csr_matrix:
    """Counts of hashed n-grams, float32 (len(words), 2^22)."""
    config = CharNgramsConfig(buckets=1 << _HASH_BITS, orders=orders, placed=(), gaps=(), deletions=False)
    codes_BL, length_B = code_points(words, config.max_length)
    rows, columns = [], []
    for ids_BT in hash_features(codes_BL, length_B, config):
        row, place = np.nonzero(ids_BT)
        rows.append(row)
        columns.append(ids_BT[row, place])
    row, column = np.concatenate(rows), np.concatenate(columns)
    return sp.csr_matrix((np.ones(len(row), np.float32), (row, column)), shape=(len(words), 1 << _HASH_BITS))


def ngram_nearest(
    words: list[str],
    queries: list[str],
    k: int,
    orders: tuple[int, ...] = (3,),
    progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Class ids int64 (Q, K) of the nearest words by TF-IDF cosine over character n-grams with boundary marks.

    Rows with fewer than K words in common are padded with -1.
    """
    counts = _ngram_counts(words, orders)
    document_frequency = np.bincount(counts.indices, minlength=counts.shape[1])
    idf = np.log((1 + len(words)) / (1 + document_frequency)).astype(np.float32)

    def weighted(matrix: sp.csr_matrix) -> sp.csr_matrix:
        matrix = (matrix @ sp.diags(idf)).tocsr()
        norm = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
        return (sp.diags(1 / np.maximum(norm, 1e-9)) @ matrix).tocsr()

    by_ngram = weighted(counts).T.tocsr()
    asked = weighted(_ngram_counts(queries, orders))
    found = np.full((len(queries), k), -1, dtype=np.int64)
    for first in range(0, len(queries), 256):
        scores = (asked[first : first + 256] @ by_ngram).tocsr()
        for row in range(scores.shape[0]):
            lo, hi = scores.indptr[row], scores.indptr[row + 1]
            ids, values = scores.indices[lo:hi], scores.data[lo:hi]
            if len(ids) > k:
                best = np.argpartition(-values, k)[:k]
                ids, values = ids[best], values[best]
            order = np.lexsort((ids, -values))
            found[first + row, : len(order)] = ids[order]
        progress(first + scores.shape[0])
    return found


def edit_rule(words: list[str], queries: list[str], shortlist: np.ndarray, k: int) -> np.ndarray:
    """Class ids int64 (Q, K), ranked by (edit distance, frequency); words are given most frequent first.

    Candidates: every word within one edit (substitute, insert, delete, swap; complete for the vocabulary's 80 most
    frequent letters) and the shortlist int64 (Q, any), -1 ignored. Distance: optimal string alignment.
    """
    from rapidfuzz.distance import OSA

    rank = {word: i for i, word in enumerate(words)}
    letters = [c for c, _ in Counter("".join(words[:100_000])).most_common(80)]
    found = np.full((len(queries), k), -1, dtype=np.int64)
    for q, query in enumerate(queries):
        splits = [(query[:i], query[i:]) for i in range(len(query) + 1)]
        near = {a + b[1:] for a, b in splits if b}
        near |= {a + b[1] + b[0] + b[2:] for a, b in splits if len(b) > 1}
        near |= {a + c + b[1:] for a, b in splits if b for c in letters}
        near |= {a + c + b for a, b in splits for c in letters}
        ids = {rank[word] for word in near if word in rank} | {int(i) for i in shortlist[q] if i >= 0}
        ranked = sorted(ids, key=lambda i: (OSA.distance(query, words[i]), i))[:k]
        found[q, : len(ranked)] = ranked
    return found
