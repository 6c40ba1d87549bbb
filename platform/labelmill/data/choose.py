"""Makes selections from keys and labels: one pass over the shards, compact arrays, never a list of samples.

Shape legend: N samples of the data set, C classes, G groups, B rows of a shard, L labels of a shard end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from labelmill.data.keys import check_unique
from labelmill.data.labels import check_labels, ragged
from labelmill.data.manifest import Manifest
from labelmill.data.plan import SLOT_ORDER, philox
from labelmill.data.selection import Balanced, KeepRows
from labelmill.data.shards import read_labels
from labelmill.errors import DataError

_BATCH = 1 << 16  # keys looked up together
_NAMED = 20  # things that a message or a report names one by one
_LISTED = ("single", "multi", "soft", "partial")  # forms that say which classes apply

Tables = Iterable[pa.Table]
"""For each shard, in order, a table with `key` and the label columns."""


# --- kept rows ------------------------------------------------------------------------------------------


def keep_where(manifest: Manifest, keep: Callable[[pa.Table], np.ndarray], tables: Tables | None = None) -> KeepRows:
    """Samples for which `keep` says so: it gets a shard's `key` and label columns and gives bool (B,).

    `tables` may hand over these columns (read in parallel, or known already); by default every shard is read here.
    Raises DataError when nothing is left, or a label is wrong.
    """
    masks = (np.asarray(keep(table), dtype=np.bool_) for table in _read(manifest, tables))
    return KeepRows.of(masks, manifest.digest, {"rule": "rows"})


def keep_keys(manifest: Manifest, keys: Sequence[str] | pa.Array, tables: Tables | None = None) -> KeepRows:
    """The samples with these keys.

    Raises DataError for a key that occurs twice in the list or the data set, or isn't in the data set.
    """
    about = {"rule": "keep keys", "keys": len(keys)}
    return KeepRows.of(_masks_of_keys(manifest, keys, tables), manifest.digest, about)


def drop_keys(manifest: Manifest, keys: Sequence[str] | pa.Array, tables: Tables | None = None) -> KeepRows:
    """All samples but those with these keys. Raises DataError as `keep_keys`."""
    about = {"rule": "drop keys", "keys": len(keys)}
    return KeepRows.of((~mask for mask in _masks_of_keys(manifest, keys, tables)), manifest.digest, about)


def keep_classes(manifest: Manifest, ids: Iterable[int], keep: bool = True, tables: Tables | None = None) -> KeepRows:
    """The samples with one of these classes, or with `keep=False` those with none of them.

    Raises DataError: a class that the data set doesn't have, labels that don't say which classes apply, nothing left.
    """
    num_classes = _num_classes(manifest)
    chosen = np.unique(np.fromiter(ids, dtype=np.int64))
    if (wrong := chosen[(chosen < 0) | (chosen >= num_classes)]).size:
        raise DataError(f"data set {manifest.name!r}: no class {wrong[0]}; its classes are 0 ... {num_classes - 1}.")
    wanted, found = np.zeros(num_classes, np.bool_), np.zeros(num_classes, np.bool_)
    wanted[chosen] = True

    def masks() -> Iterator[np.ndarray]:
        for table in _read(manifest, tables):
            ids_L, lengths_B = _classes(table, manifest)
            hits_L = wanted[ids_L]
            found[ids_L[hits_L]] = True
            rows = np.repeat(np.arange(len(lengths_B)), lengths_B)[hits_L]
            yield (np.bincount(rows, minlength=len(lengths_B)) > 0) == keep

    selection = KeepRows.of(masks(), manifest.digest, {"rule": f"{'keep' if keep else 'drop'} classes"})
    selection.about |= {"classes": len(chosen)} | _named("classes without a sample", chosen[~found[chosen]])
    return selection


def _masks_of_keys(manifest: Manifest, keys: Sequence[str] | pa.Array, tables: Tables | None) -> Iterator[np.ndarray]:
    """For each shard, bool (B,): whether a row's key is in `keys`. Checks the keys at the end."""
    wanted = keys if isinstance(keys, pa.Array) else pa.array(keys, pa.string())
    if not len(wanted):
        raise DataError("the list of keys is empty. Leave the selection out, or name the keys.")
    check_unique(pa.chunked_array([wanted]), "list of keys")
    seen = np.zeros(len(wanted), np.int64)
    waiting: list[pa.ChunkedArray] = []

    def look_up() -> Iterator[np.ndarray]:
        chunks = [chunk for column in waiting for chunk in column.chunks]
        where = pc.fill_null(pc.index_in(pa.chunked_array(chunks, pa.string()), value_set=wanted), -1).to_numpy()
        np.add(seen, np.bincount(where[where >= 0], minlength=len(seen)), out=seen)
        yield from np.split(where >= 0, np.cumsum([len(column) for column in waiting])[:-1])
        waiting.clear()

    rows = 0
    for table in _read(manifest, tables):
        waiting.append(table.column("key"))
        rows += table.num_rows
        if rows >= max(_BATCH, len(wanted)):  # every look-up hashes the whole list, so it serves as many rows
            yield from look_up()
            rows = 0
    if waiting:
        yield from look_up()
    _check_found(manifest, wanted, seen)


def _check_found(manifest: Manifest, keys: pa.Array, seen: np.ndarray) -> None:
    for wrong, what, remedy in (
        (np.flatnonzero(seen == 0), "aren't in it", "Correct the list; was it written for another data set?"),
        (np.flatnonzero(seen > 1), "occur there more than once", "Every sample needs a key of its own."),
    ):
        if len(wrong):
            names = ", ".join(repr(key) for key in keys.take(pa.array(wrong[:5])).to_pylist())
            more = ", ..." if len(wrong) > 5 else ""
            raise DataError(f"data set {manifest.name!r}: {len(wrong)} key(s) {what}: {names}{more}. {remedy}")


# --- quotas ---------------------------------------------------------------------------------------------


def balance(
    manifest: Manifest,
    exponent: float = 1.0,
    per_class: int | None = None,
    seed: int = 0,
    within: KeepRows | None = None,
    tables: Tables | None = None,
) -> Balanced:
    """Classes of single labels in proportions n_c^(1 - exponent), n_c being the samples of class c.

    Exponent 1 draws the same number from every class, 0 leaves the classes as they are, 0.5 is square-root sampling.
    Shares are apportioned by largest remainder, with at least one sample of every class in every epoch.

    Args:
        manifest: the data set.
        exponent: 0 ... 1.
        per_class: mean samples of a class in an epoch; by default an epoch keeps about its length.
        seed: of the order in which the samples of a class take turns.
        within: only these samples take part.
        tables: as in `keep_where`.

    Classes without samples can't be drawn; `about` names them. Raises DataError when labels aren't single.
    """
    if manifest.label.form != "single":
        raise DataError(
            f"data set {manifest.name!r} has labels of form {manifest.label.form!r}: only single labels can be "
            "balanced by class. Use repeat factors (kind: repeat_factor)."
        )
    label_N = np.concatenate([_classes(t, manifest)[0].astype(np.uint32) for t in _read(manifest, tables)])
    num_classes = _num_classes(manifest)
    group_N = np.where(_part(manifest, within), label_N, num_classes)
    count_C = np.bincount(group_N, minlength=num_classes + 1)[:-1]
    present = np.flatnonzero(count_C)
    quota_C = np.zeros(num_classes, np.int64)
    if len(present):
        quota_C[present] = _class_quotas(count_C[present], exponent, per_class)
    about = {"rule": "balanced", "exponent": exponent, "classes": len(present), "per_epoch": int(quota_C.sum())}
    about |= _named("classes without a sample", np.flatnonzero(count_C == 0))
    return _draw(manifest, group_N, count_C, quota_C, seed, about)


def _class_quotas(count_G: np.ndarray, exponent: float, per_class: int | None) -> np.ndarray:
    if exponent == 1:
        return np.full(len(count_G), per_class or max(1, round(int(count_G.sum()) / len(count_G))))
    total = int(count_G.sum()) if per_class is None else per_class * len(count_G)
    weights = count_G.tolist() if exponent == 0 else as_integers(count_G ** (1.0 - exponent))
    return apportion(weights, total, least=1)


def repeat_factors(
    manifest: Manifest,
    threshold: float = 0.001,
    seed: int = 0,
    within: KeepRows | None = None,
    tables: Tables | None = None,
) -> Balanced:
    """Repeat-factor sampling: samples with a rare class come several times in an epoch, the others once.

    A class on a share f_c of the samples has the factor r_c = max(1, sqrt(threshold / f_c)), a sample the largest factor
    of its classes (Gupta, Dollár, Girshick 2019, LVIS, section on repeat factor sampling). Instead of rounding at random
    in each epoch, all n samples of one factor share a quota of n r draws (fractions by largest remainder) and take turns.

    Args as in `balance`. Raises DataError when the labels don't say which classes apply.
    """
    num_classes = _num_classes(manifest)
    parts = [_classes(table, manifest) for table in _read(manifest, tables)]
    part_N = _part(manifest, within)
    ids_L = np.concatenate([ids.astype(np.uint32) for ids, _ in parts])
    rows_L = np.repeat(np.arange(len(part_N)), np.concatenate([lengths for _, lengths in parts]))
    inside = part_N[rows_L]
    ids_L, rows_L = ids_L[inside], rows_L[inside]
    count_C = np.bincount(ids_L, minlength=num_classes)
    samples = int(np.count_nonzero(part_N))
    rarest_N = np.full(len(part_N), samples)
    np.minimum.at(rarest_N, rows_L, count_C[ids_L])
    # samples whose rarest class is equally rare have one factor; those with factor 1 are one group
    rarest_N[rarest_N >= threshold * samples] = samples
    rarest_N[~part_N] = samples + 1
    values, group_N = np.unique(np.append(rarest_N, samples + 1), return_inverse=True)
    size_G = np.bincount(group_N[:-1], minlength=len(values))[:-1]
    extra_G = size_G * (np.maximum(1.0, np.sqrt(threshold * samples / values[:-1])) - 1.0)
    quota_G = size_G + apportion(as_integers(extra_G), round(float(extra_G.sum())))
    about = {"rule": "repeat factor", "threshold": threshold, "samples": samples, "per_epoch": int(quota_G.sum())}
    about |= {
        "repeated": int(size_G[extra_G > 0].sum()),
        "largest_factor": float(1 + (extra_G / size_G).max(initial=0)),
    }
    about |= _named("classes without a sample", np.flatnonzero(count_C == 0))
    return _draw(manifest, group_N[:-1], size_G, quota_G, seed, about)


def _draw(
    manifest: Manifest,
    group_N: np.ndarray,
    size_G: np.ndarray,
    quota_G: np.ndarray,
    seed: int,
    about: dict[str, object],
) -> Balanced:
    """Gives every sample a slot in its group's ring; group G is left out."""
    if not quota_G.sum():
        raise DataError(f"data set {manifest.name!r}: the selection leaves no sample to draw.")
    order = np.lexsort((philox(seed, SLOT_ORDER).random(len(group_N)), group_N))
    first_G = np.cumsum(size_G) - size_G
    taking = len(group_N) - int(np.count_nonzero(group_N == len(size_G)))
    slot_N = np.zeros(len(group_N), np.int64)
    slot_N[order[:taking]] = np.arange(taking) - np.repeat(first_G, size_G)
    arrays = {
        "shards": np.array([shard.samples for shard in manifest.shards], np.int64),
        "group": group_N.astype(np.min_scalar_type(len(size_G))),
        "slot": slot_N.astype(np.min_scalar_type(int(size_G.max()))),
        "size": np.append(np.maximum(size_G, 1), 1),
        "quota": np.append(quota_G, 0),
    }
    return Balanced(arrays, manifest.digest, about)


def apportion(weights: Sequence[int], total: int, least: int = 0) -> np.ndarray:
    """int64 (G,): `total` units in proportion to integer weights by largest remainder, exactly; ties to the first.

    Whoever would get fewer than `least` gets that, and the rest is apportioned among the others.
    """
    units = np.full(len(weights), least, np.int64)
    open_ = list(range(len(weights)))
    while open_:
        whole = sum(weights[i] for i in open_)
        few = [i for i in open_ if total * weights[i] < least * whole]
        if not few:
            break
        total -= least * len(few)
        short = set(few)
        open_ = [i for i in open_ if i not in short]
    if not open_ or not whole:
        return units
    shares = [divmod(total * weights[i], whole) for i in open_]
    units[open_] = [share for share, _ in shares]
    for k in sorted(range(len(open_)), key=lambda k: -shares[k][1])[: total - sum(share for share, _ in shares)]:
        units[open_[k]] += 1
    return units


def as_integers(values: np.ndarray) -> list[int]:
    """Non-negative reals as integers in the same proportions, to 40 bits: the last bits differ between machines."""
    mantissa, power = np.frexp(values)
    whole = np.rint(np.ldexp(mantissa, 40)).astype(np.int64).tolist()
    return [m << p for m, p in zip(whole, (power - power.min(initial=0)).tolist(), strict=True)]


# --- reading --------------------------------------------------------------------------------------------


def _read(manifest: Manifest, tables: Tables | None) -> Iterator[pa.Table]:
    """For each shard, its checked `key` and label columns."""
    shards = manifest.shards
    given = iter(tables) if tables is not None else (read_labels(manifest, i) for i in range(len(shards)))
    for i, info in enumerate(shards):
        table = next(given, None)
        if table is None or table.num_rows != info.samples:
            found = "nothing" if table is None else f"{table.num_rows} rows"
            raise DataError(f"labels of {manifest.shard_path(i)}: {found} for {info.samples} samples.")
        check_labels(table, manifest.label, where=manifest.shard_path(i))
        yield table


def _num_classes(manifest: Manifest) -> int:
    if manifest.label.form not in _LISTED or manifest.label.num_classes is None:
        raise DataError(
            f"data set {manifest.name!r} has labels of form {manifest.label.form!r}, which don't say which classes apply "
            f"to a sample. Choosing by class needs one of {', '.join(_LISTED)}."
        )
    return manifest.label.num_classes


def _classes(table: pa.Table, manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """Classes that apply: int64 ids end to end (L,), and how many each row has (B,). Soft: weight above 0."""
    _num_classes(manifest)
    label = pa.concat_arrays(table.column("label").chunks) if table.num_rows else pa.array([], pa.int64())
    if manifest.label.form == "single":
        ids_L = label.to_numpy(zero_copy_only=False)
        return ids_L, np.ones(len(ids_L), np.int64)
    ids_L, lengths_B = ragged(label)
    if manifest.label.form != "soft":
        return ids_L, lengths_B
    above = ragged(pa.concat_arrays(table.column("label_weight").chunks))[0] > 0
    rows = np.repeat(np.arange(len(lengths_B)), lengths_B)[above]
    return ids_L[above], np.bincount(rows, minlength=len(lengths_B))


def _part(manifest: Manifest, within: KeepRows | None) -> np.ndarray:
    """bool (N,): samples that may take part."""
    shards = [shard.samples for shard in manifest.shards]
    if within is None:
        return np.ones(sum(shards), np.bool_)
    if within.shard_samples.tolist() != shards:
        raise DataError(f"data set {manifest.name!r}: the rows to choose from belong to another data set.")
    return np.concatenate([within.mask(i) for i in range(len(shards))])


def _named(what: str, ids: np.ndarray) -> dict[str, object]:
    """An entry of a report: how many, and the first of them."""
    return {what: {"count": len(ids), "first": ids[:_NAMED].tolist()}} if len(ids) else {}
