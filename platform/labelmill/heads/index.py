"""An approximate index over class rows, for heads too large to compare with every class at prediction.

    index.json                 what it is; written last
    index.faiss | index.usearch

Built from the row files of a folder (a packaged model, or a saved head), a chunk at a time; only the index itself is in
memory. Needs `faiss-cpu` or `usearch` (pip install 'labelmill[index]').

Shape legend: C classes, Q queries, R rows of a chunk, D embedding size, k results.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from labelmill.errors import DataError, UserError
from labelmill.heads.refill import whole_rows
from labelmill.heads.source import RowSource, open_rows
from labelmill.heads.topk import merge_topk, topk_rows
from labelmill.job import StrictModel

FILE = "index.json"
MODEL = "model.json"  # of a packaged model, which knows the hash of its index
Kind = Literal["faiss", "usearch"]
CHUNK_BYTES = 64 * 2**20


class IndexConfig(StrictModel):
    """An index that a job packs into the model it registers."""

    kind: Kind = "faiss"
    factory: str | None = Field(None, description="faiss: an index_factory string; usearch: f32, f16, bf16 or i8")
    probes: int | None = Field(None, ge=1, description="lists or candidates looked at for a query")


@dataclass(frozen=True)
class IndexInfo:
    """Content of `index.json`.

    Attributes:
        factory: faiss's description of the index; for usearch the dtype of its vectors.
        normalized: rows are compared by cosine, else by inner product.
        probes: lists (faiss IVF) or candidates (usearch) looked at for a query.
        rows: digest of the row files' names and sizes, to notice an index of other rows.
        bytes, sha256: of the index file.
        recall: measured recall of the exact best by `recall@k`, if it was.
    """

    kind: Kind
    factory: str
    num_classes: int
    dim: int
    normalized: bool
    probes: int
    rows: str
    file: str
    bytes: int
    sha256: str
    seconds: float
    recall: dict[str, float]


def build_index(
    folder: str | Path,
    kind: Kind = "faiss",
    factory: str | None = None,
    probes: int | None = None,
    train_rows: int | None = None,
    seed: int = 0,
) -> IndexInfo:
    """Builds an index over the rows of `folder` and puts it beside them.

    Args:
        factory: faiss: an index_factory string; by default `Flat` below 20 000 classes, else `IVF<lists>,SQ8` with
            4 sqrt(C) lists. usearch: `f32`, `f16`, `bf16` or `i8`, by default `f16`.
        probes: lists or candidates looked at for a query; by default an eighth of the lists (faiss), 128 (usearch).
        train_rows: rows that faiss learns its lists from; by default 64 a list, at most all.

    Raises DataError for damaged rows, UserError when the library isn't installed or refuses the factory string.
    """
    source, began = open_rows(folder), time.perf_counter()
    if source.sub_centres > 1:
        raise DataError(f"{folder}: has {source.sub_centres} sub-centres a class: an index needs one row a class.")
    library = _library(kind)
    lists = _lists(source.num_classes)
    if kind == "faiss":
        factory = factory or ("Flat" if source.num_classes < 20_000 else f"IVF{lists},SQ8")
        index = _build_faiss(library, source, factory, train_rows or 64 * lists, seed)
        probes = probes or max(1, _faiss_lists(library, index) // 8)
        path = source.folder / "index.faiss"
        _replace(path, lambda partial: library.write_index(index, str(partial)))
    else:
        factory, probes = factory or "f16", probes or 128
        index = _build_usearch(library, source, factory, probes)
        path = source.folder / "index.usearch"
        _replace(path, lambda partial: index.save(str(partial)))
    info = IndexInfo(
        kind=kind,
        factory=factory,
        num_classes=source.num_classes,
        dim=source.dim,
        normalized=source.normalized,
        probes=probes,
        rows=_digest(source),
        file=path.name,
        bytes=path.stat().st_size,
        sha256=_sha256(path),
        seconds=round(time.perf_counter() - began, 3),
        recall={},
    )
    _write_info(source.folder, info)
    return info


class RowIndex:
    """An index read from a folder. Make it with `load_index`."""

    def __init__(self, folder: Path, info: IndexInfo, index: Any) -> None:
        self.folder, self.info, self._index = folder, info, index

    def search(self, queries_QD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Scores (Q, k), best first, and class ids (Q, k) of about the best classes; -inf and -1 where there are fewer.

        Queries are made unit vectors if the rows are. Raises ValueError for another width.
        """
        if queries_QD.ndim != 2 or queries_QD.shape[1] != self.info.dim:
            raise ValueError(f"queries {tuple(queries_QD.shape)} don't have {self.info.dim} columns")
        queries = queries_QD.float()
        queries = torch.nn.functional.normalize(queries, dim=1) if self.info.normalized else queries
        if self.info.kind == "faiss":
            scores, ids = self._index.search(queries.numpy(), k)
            return torch.from_numpy(scores), torch.from_numpy(ids)
        found = self._index.search(queries.numpy(), min(k, self.info.num_classes))
        ids = np.atleast_2d(found.keys).astype(np.int64)
        scores = 1.0 - np.atleast_2d(found.distances).astype(np.float32)
        return torch.from_numpy(scores), torch.from_numpy(ids)


def load_index(folder: str | Path) -> RowIndex:
    """The index beside the rows of a folder.

    Raises DataError when there is none, when it is damaged, or when it belongs to other rows.
    """
    folder = Path(folder)
    try:
        info = IndexInfo(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise DataError(f"{folder}: has no index; `labelmill head index build` makes one.") from None
    except (ValueError, TypeError) as error:
        raise DataError(f"{folder / FILE}: unreadable: {error}") from error
    path = folder / Path(info.file).name
    if not path.is_file() or path.stat().st_size != info.bytes or _sha256(path) != info.sha256:
        raise DataError(f"{path}: missing or damaged; build the index again.")
    if (folder / MODEL).is_file() and _noted(folder / MODEL, path.name) != info.sha256:
        raise DataError(f"{path}: isn't the index that {folder / MODEL} names; build the index again.")
    if _digest(open_rows(folder)) != info.rows:
        raise DataError(f"{path}: was built from other rows; build the index again.")
    library = _library(info.kind)
    if info.kind == "faiss":
        index = library.read_index(str(path))
        if _faiss_lists(library, index) > 1:
            library.extract_index_ivf(index).nprobe = info.probes
    else:
        index = library.Index.restore(str(path), view=True)
        index.expansion_search = info.probes
    return RowIndex(folder, info, index)


def _noted(model: Path, name: str) -> str | None:
    """The sha256 of a file of a packaged model."""
    try:
        return json.loads(model.read_text(encoding="utf-8"))["files"].get(name)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{model}: unreadable: {error}") from error


def exact_topk(folder: str | Path, queries_QD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores (Q, k) and class ids (Q, k) of the best of all rows in a folder's files, a chunk at a time."""
    source = open_rows(folder)
    queries = torch.nn.functional.normalize(queries_QD.float(), dim=1) if source.normalized else queries_QD.float()
    scores_Qk = queries.new_full((len(queries), k), -torch.inf)
    ids_Qk = torch.full_like(scores_Qk, -1, dtype=torch.int64)
    for first, rows_RD in _chunks(source):
        scores, ids = topk_rows(queries, rows_RD, k, first)
        scores_Qk, ids_Qk = merge_topk(torch.cat([scores_Qk, scores], 1), torch.cat([ids_Qk, ids], 1), k)
    return scores_Qk, ids_Qk


def measure_recall(folder: str | Path, queries_QD: Tensor, k: int = 10, keep: bool = True) -> dict[str, float]:
    """How well the index of a folder finds the exact best classes of given queries.

    Returns `recall@1` and `recall@k` (share of the exact best k among the k found), and the milliseconds a query takes
    in the index (`index_ms`) and in the exact search (`exact_ms`), all queries at once. The recall is noted in
    `index.json` if `keep`. Raises DataError for queries of another width.
    """
    index = load_index(folder)
    if queries_QD.ndim != 2 or queries_QD.shape[1] != index.info.dim or not len(queries_QD):
        raise DataError(f"queries {tuple(queries_QD.shape)}: needs at least one row of {index.info.dim} numbers.")
    k = min(k, index.info.num_classes)
    began = time.perf_counter()
    _, exact_Qk = exact_topk(folder, queries_QD, k)
    middle = time.perf_counter()
    _, found_Qk = index.search(queries_QD, k)
    ended = time.perf_counter()
    recall = {
        f"recall@{n}": float((exact_Qk[:, :n, None] == found_Qk[:, None, :n]).any(dim=2).float().mean()) for n in {1, k}
    }
    if keep:
        _write_info(index.folder, IndexInfo(**(asdict(index.info) | {"recall": recall})))
    each = 1000 / len(queries_QD)
    return recall | {"exact_ms": (middle - began) * each, "index_ms": (ended - middle) * each}


# --- parts --------------------------------------------------------------------------------------------------


def _library(kind: str) -> Any:
    modules = {"faiss": "faiss", "usearch": "usearch.index"}
    if kind not in modules:
        raise UserError(f"index kind {kind!r}: write faiss or usearch.")
    try:
        return importlib.import_module(modules[kind])
    except ImportError:
        raise UserError(f"{kind} isn't installed: pip install 'labelmill[index]'") from None


def _chunks(source: RowSource) -> Iterator[tuple[int, Tensor]]:
    """(first class, rows (R, D) float32, unit if the head normalises) piece by piece."""
    names = [name for name in source.specs if name == "rows"]
    for lo, hi in source.pages(max(1, CHUNK_BYTES // (4 * source.dim))):
        rows_RD = whole_rows(source.read(lo, hi, names)).float()
        yield lo, torch.nn.functional.normalize(rows_RD, dim=1) if source.normalized else rows_RD


def _lists(num_classes: int) -> int:
    return max(1, round(4 * math.sqrt(num_classes)))


def _build_faiss(faiss: Any, source: RowSource, factory: str, train_rows: int, seed: int) -> Any:
    try:
        index = faiss.index_factory(source.dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UserError(f"faiss knows no index {factory!r}: {str(error).splitlines()[-1]}") from error
    if not index.is_trained:
        count = min(train_rows, source.num_classes)
        generator = torch.Generator().manual_seed(seed)
        ids_K = torch.randperm(source.num_classes, generator=generator)[:count].sort().values
        spec = source.specs["rows"]
        rows_KD = torch.empty(count, source.dim, dtype=torch.promote_types(spec.torch_dtype, torch.float32))
        source.take_into({"rows": rows_KD}, ids_K)
        rows_KD = torch.nn.functional.normalize(rows_KD, dim=1) if source.normalized else rows_KD
        try:
            index.train(rows_KD.float().numpy())
        except RuntimeError as error:
            raise UserError(
                f"faiss can't make {factory!r} of {count} rows: {str(error).splitlines()[-1]}. Take fewer lists."
            ) from error
    for _, rows_RD in _chunks(source):
        index.add(rows_RD.numpy())
    return index


def _faiss_lists(faiss: Any, index: Any) -> int:
    try:
        return int(faiss.extract_index_ivf(index).nlist)
    except RuntimeError:
        return 1


def _build_usearch(usearch: Any, source: RowSource, dtype: str, probes: int) -> Any:
    if dtype not in ("f32", "f16", "bf16", "i8"):
        raise UserError(f"usearch dtype {dtype!r}: write f32, f16, bf16 or i8.")
    metric = "cos" if source.normalized else "ip"
    index = usearch.Index(ndim=source.dim, metric=metric, dtype=dtype, expansion_search=probes)
    for first, rows_RD in _chunks(source):
        index.add(np.arange(first, first + len(rows_RD)), rows_RD.numpy(), threads=torch.get_num_threads())
    return index


def _digest(source: RowSource) -> str:
    content = [(entry.file, entry.start, entry.stop, entry.bytes, entry.crc32.get("rows")) for entry in source.files]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace(path: Path, write: Any) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _write_info(folder: Path, info: IndexInfo) -> None:
    text = json.dumps(asdict(info), indent=1)
    _replace(folder / FILE, lambda partial: partial.write_text(text, encoding="utf-8"))
