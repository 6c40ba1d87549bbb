"""The packaged model: a folder of plain files that predicts without the engine.

    model.json                        what it is: predictor rule, encoder, label space, origin; written last
    encoder.safetensors               weights of the encoder
    rows-<start>-<stop>.safetensors   `rows`: vectors of the classes [start, stop), one file a training rank
    classes.arrow                     Arrow IPC file, column `name` (others kept): row i is class i
    ...                               files an encoder brings along, such as a tokenizer

Training ranks write their own head files, then one process calls `write_model`. Loading imports torch, numpy
and pyarrow, and neither Ray, DeepSpeed, MLflow nor the training code; head files are memory-mapped.

N inputs, C classes, D embedding width, k results.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from labelmill.encoders import build_encoder
from labelmill.encoders.base import Encoder
from labelmill.errors import DataError, did_you_mean
from labelmill.evaluation.ranking import with_prior
from labelmill.heads.storage import check_cover
from labelmill.heads.topk import merge_topk, topk_rows
from labelmill.job import StrictModel

FORMAT_VERSION = 1
InputKind = Literal["text", "image", "array"]
Inputs = Sequence[str] | Sequence[bytes] | np.ndarray
_INDEX_FILES, _INDEX_INFO = "index.*", "index.json"  # of heads/index.py
_HEAD_FILE = re.compile(r"(?:rows|head)-(\d+)-(\d+)\.safetensors")


class HeadShard(StrictModel):
    """File with the rows of the classes [start, stop)."""

    file: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", description="in the model's folder, and nowhere else")
    start: int = Field(ge=0)
    stop: int = Field(ge=0)


class ClassPrior(StrictModel):
    """Ranking by score + weight * ln(column of the label space), over so many candidates of the plain ranking."""

    column: str
    weight: float
    candidates: int = Field(50, ge=1)


class ModelSpec(StrictModel):
    """Content of `model.json`.

    Attributes:
        predictor: name of the rule that turns embeddings into answers.
        encoder: config that `build_encoder` rebuilds the encoder from; paths start from the model's folder.
        field: name of the input, as in the training manifest.
        input: what an input is: a text, an encoded image, an array of numbers.
        shape: of an input array, where every one has the same; None otherwise.
        dim: embedding width D.
        normalized: whether embeddings and rows are unit vectors, so that a score is a cosine; else it is
            their inner product.
        bias: whether rows have a further column, the last, which is added to the score.
        prior: class frequencies that take part in the ranking of rule `topk`; None ranks by score alone.
        scale: factor of the cosine in the training loss; it isn't part of a score.
        label_form: label form of the training data.
        num_classes: C; 0 for a model without a head.
        shards: head files in the order of classes.
        dtype: of the head rows.
        files: sha256 of every other file of the folder, compared when it is read.
        manifest: digest of the training data's manifest.
        code_version: of the labelmill that wrote the model.
        extra: whatever else a workload wants to keep; JSON values.
    """

    format_version: Literal[1] = 1
    predictor: str
    encoder: dict[str, Any]
    field: str
    input: InputKind
    shape: tuple[int, ...] | None = None
    dim: int = Field(ge=1)
    normalized: bool = True
    bias: bool = False
    prior: ClassPrior | None = None
    scale: float = 1.0
    label_form: str = "single"
    num_classes: int = Field(0, ge=0)
    shards: tuple[HeadShard, ...] = ()
    dtype: str = "float32"
    files: dict[str, str] = Field(default_factory=dict)
    manifest: str = ""
    code_version: str = ""
    extra: dict[str, Any] = Field(default_factory=dict)


# --- writing ------------------------------------------------------------------------------------------------


def write_model(
    folder: str | Path,
    *,
    encoder: Encoder,
    input_kind: InputKind,
    predictor: str = "topk",
    classes: pa.Table | None = None,
    state: Mapping[str, Tensor] | None = None,
    normalized: bool = True,
    prior: ClassPrior | None = None,
    scale: float = 1.0,
    label_form: str = "single",
    manifest_digest: str = "",
    code_version: str = "",
    extra: Mapping[str, Any] | None = None,
    input_shape: Sequence[int] | None = None,
    bias: bool = False,
) -> ModelSpec:
    """Finishes a model folder that already holds the head files of every rank.

    Args:
        encoder: what was trained; its own `state_dict` is saved unless `state` gives the weights (ZeRO 3).
        classes: label space, column `name`, row i is class i; None for a model without a head.
        input_shape: of an input array; by default (in_dim,) of an encoder that flattens.

    Raises DataError when the head files don't hold each class exactly once, differ in dtype, don't fit the
    encoder's width, or aren't unit vectors though `normalized`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _rule(predictor)
    num_classes = 0 if classes is None else classes.num_rows
    shards, dtype = _find_shards(folder, num_classes, encoder.dim + bias, normalized)
    if prior and (classes is None or prior.column not in classes.column_names):
        raise DataError(f"{folder}: the prior needs a column {prior.column!r} of the classes")
    if classes is not None:
        if "name" not in classes.column_names:
            raise DataError(f"{folder}: the classes need a column 'name', not only {classes.column_names}")
        _replace(folder / "classes.arrow", lambda path: _write_arrow(classes, path))
    weights = encoder.state_dict() if state is None else state
    # copies: safetensors refuses tensors that share memory
    owned = {name: value.detach().cpu().clone().contiguous() for name, value in weights.items()}
    _replace(folder / "encoder.safetensors", lambda path: save_file(owned, path))
    config = json.loads(encoder.portable(folder).model_dump_json())
    spec = ModelSpec(
        predictor=predictor,
        encoder=config,
        field=encoder.field,
        input=input_kind,
        shape=_shape(encoder, input_kind, input_shape),
        dim=encoder.dim,
        normalized=normalized,
        bias=bias,
        prior=prior,
        scale=scale,
        label_form=label_form,
        num_classes=num_classes,
        shards=shards,
        dtype=dtype,
        files=_hashes(folder),
        manifest=manifest_digest,
        code_version=code_version,
        extra=dict(extra or {}),
    )
    _write_spec(folder, spec)
    return spec


def _write_spec(folder: Path, spec: ModelSpec) -> None:
    text = json.dumps(json.loads(spec.model_dump_json()), indent=1, ensure_ascii=False)
    _replace(folder / "model.json", lambda path: path.write_text(text, encoding="utf-8"))


def note_index(folder: str | Path) -> None:
    """Takes the hash of an index that was built beside the rows of a finished model into its `model.json`."""
    folder = Path(folder)
    spec = read_spec(folder)
    found = {path.name: sha256_of(path) for path in sorted(folder.glob(_INDEX_FILES)) if path.name != _INDEX_INFO}
    kept = {name: value for name, value in spec.files.items() if not _of_index(name)}
    _write_spec(folder, spec.model_copy(update={"files": kept | found}))


def _of_index(name: str) -> bool:
    return fnmatch(name, _INDEX_FILES)


def _shape(encoder: Encoder, kind: InputKind, given: Sequence[int] | None) -> tuple[int, ...] | None:
    if kind != "array":
        return None
    width = getattr(encoder.config, "in_dim", None)
    return tuple(given) if given is not None else (width,) if width else None


def _find_shards(folder: Path, num_classes: int, dim: int, normalized: bool) -> tuple[tuple[HeadShard, ...], str]:
    found = [(f.name, m) for f in sorted(folder.glob("*.safetensors")) if (m := _HEAD_FILE.fullmatch(f.name))]
    entries = [{"file": name, "start": int(match[1]), "stop": int(match[2])} for name, match in found]
    ordered = check_cover(entries, num_classes, folder)
    dtypes = set()
    for entry in ordered:
        rows_RD = _map_rows(folder / entry["file"])
        want = (entry["stop"] - entry["start"], dim)
        if tuple(rows_RD.shape) != want:
            raise DataError(f"{folder / entry['file']}: rows have shape {tuple(rows_RD.shape)}, expected {want}")
        lengths = rows_RD[:256].float().norm(dim=1)
        if normalized and not bool(((lengths - 1).abs() < 0.02).all()):
            raise DataError(
                f"{folder / entry['file']}: rows aren't unit vectors (lengths {float(lengths.min()):.3g} to "
                f"{float(lengths.max()):.3g}); export the head with normalised rows"
            )
        dtypes.add(str(rows_RD.dtype).removeprefix("torch."))
    if len(dtypes) > 1:
        raise DataError(f"{folder}: head files differ in dtype: {', '.join(sorted(dtypes))}")
    return tuple(HeadShard.model_validate(dict(entry)) for entry in ordered), (dtypes or {"float32"}).pop()


def _hashes(folder: Path) -> dict[str, str]:
    apart = ("model.json", _INDEX_INFO)  # the latter is rewritten when the recall is measured
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in apart]
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in found}


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file under another name and renames it: whole or absent."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    os.replace(partial, path)


def _write_arrow(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


# --- loading ------------------------------------------------------------------------------------------------


def read_spec(folder: str | Path) -> ModelSpec:
    """`model.json` of a folder. Raises DataError when it is missing, unreadable or of another version."""
    path = Path(folder) / "model.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: missing; {folder} isn't a finished labelmill model") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: unreadable: {error}") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(f"{path}: format version {version!r}; this labelmill reads {FORMAT_VERSION}. Use a newer one.")
    try:
        return ModelSpec.model_validate(content)
    except ValidationError as error:
        raise DataError(f"{path}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from error


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> Predictor:
    """The predictor in a folder; head files are opened when a prediction needs them.

    Raises DataError for a folder that isn't a model or whose files don't fit each other.
    """
    folder = Path(folder)
    spec = read_spec(folder)
    _rule(spec.predictor)
    rows = {shard.file for shard in spec.shards}
    for name in spec.files.keys() - rows:  # rows and index may be large: when they are opened
        if not _of_index(name):
            check_file(folder, spec, name)
    # building draws fresh weights first: leave the caller's random numbers alone
    with torch.random.fork_rng(devices=[]):
        encoder = build_encoder(spec.encoder, root=folder)
    try:
        encoder.load_state_dict(load_file(folder / "encoder.safetensors"))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{folder / 'encoder.safetensors'}: doesn't fit model.json: {error}") from error
    for shard in spec.shards:
        if not (folder / shard.file).is_file():
            raise DataError(f"{folder / shard.file}: missing; it holds the classes [{shard.start}, {shard.stop})")
    return Predictor(folder, spec, encoder, torch.device(device))


def check_file(folder: Path, spec: ModelSpec, name: str) -> Path:
    """A file of a model, whose content is the one that was written. Raises DataError."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{folder / 'model.json'}: the file {name!r} isn't in the model's folder")
    wanted = spec.files.get(name)
    if not path.is_file():
        raise DataError(f"{path}: missing; it is a file of the model")
    if wanted and sha256_of(path) != wanted:
        raise DataError(
            f"{path}: its content isn't what was written (sha256 differs). Fetch or register the model again."
        )
    return path


class Predictor:
    """Answers inputs with a packaged model. Make it with `load_model`.

    Attributes:
        spec: what the model is.
        encoder: in evaluation mode, on `device`.
    """

    def __init__(self, folder: Path, spec: ModelSpec, encoder: Encoder, device: torch.device) -> None:
        self.folder = folder
        self.spec = spec
        self.device = device
        self.encoder = encoder.to(device).eval()

    @cached_property
    def classes(self) -> pa.Table:
        """The label space, memory-mapped; row i is class i."""
        if not self.spec.num_classes:
            raise DataError(f"{self.folder}: the model has no classes")
        return pa.ipc.open_file(pa.memory_map(str(self.folder / "classes.arrow"))).read_all()

    @cached_property
    def shards(self) -> list[tuple[int, Tensor]]:
        """(first class, rows_RD) of each head file: memory-mapped on the CPU, or copied to the device."""
        return [
            (s.start, _map_rows(check_file(self.folder, self.spec, s.file)).to(self.device)) for s in self.spec.shards
        ]

    def read(self, inputs: Inputs) -> Any:
        """Inputs as `Encoder.prepare` takes them: images decoded, arrays stacked; what was read stays as it is.

        Raises DataError for an input that can't be read, by its number.
        """
        if self.spec.input == "text":
            wrong = next((i for i, value in enumerate(inputs) if not isinstance(value, str)), None)
            if wrong is not None:
                raise DataError(f"input {wrong}: expected a text, got {type(inputs[wrong]).__name__}")
            return list(inputs)
        if isinstance(inputs, np.ndarray) and inputs.dtype != object:
            return inputs
        values: list[Any] = list(inputs)
        if self.spec.input == "image":
            return self._decoded(values)
        return _stacked(values)

    def embed(self, inputs: Inputs) -> Tensor:
        """Embeddings (N, D) float32 on the CPU, unit vectors if the model is normalised.

        Inputs are texts; or encoded images, or uint8 pixels (N, H, W, C); or an array (N, ...). Raises
        DataError for an input that can't be read, by its number.
        """
        emb_ND = self.encoder.embed(self.read(inputs))
        return F.normalize(emb_ND, dim=1) if self.spec.normalized else emb_ND

    def queries(self, inputs: Inputs) -> Tensor:
        """What rows are compared with, (N, D): embeddings, with a last column of ones for rows that end with a bias."""
        emb_ND = self.embed(inputs)
        return torch.cat([emb_ND, torch.ones_like(emb_ND[:, :1])], dim=1) if self.spec.bias else emb_ND

    @torch.no_grad()
    def topk(self, inputs: Inputs, k: int) -> tuple[Tensor, Tensor]:
        """Scores (N, k) float32 and class ids (N, k) int64, best first; k at most the number of classes."""
        k = min(k, self.spec.num_classes)
        queries_ND = self.queries(inputs).to(self.device)
        found = [topk_rows(queries_ND, rows_RD, k, start) for start, rows_RD in self.shards]
        scores_Nm, ids_Nm = torch.cat([s for s, _ in found], dim=1), torch.cat([i for _, i in found], dim=1)
        scores_Nk, ids_Nk = merge_topk(scores_Nm, ids_Nm, k)
        return scores_Nk.cpu(), ids_Nk.cpu()

    def predict(self, inputs: Inputs, k: int = 5) -> pa.Table:
        """Answers as a table with the columns of the model's rule.

        `topk`: `input` (its number from 0), `rank` (from 1), `class_id`, `class`, `score`, k rows per input.
        `embed`: `input`, `embedding`, one row per input.
        """
        if isinstance(inputs, str | bytes):
            raise DataError("give a list of inputs, not a single one")
        if k < 1:
            raise DataError(f"k must be at least 1, not {k}")
        return _rule(self.spec.predictor)(self, inputs, k)

    def _decoded(self, inputs: Sequence[Any]) -> np.ndarray:
        from labelmill.data.decode import decode_images

        config = self.spec.encoder
        side, channels = config.get("image_size"), config.get("channels", 3)
        if not len(inputs):
            return np.zeros((0, side or 1, side or 1, channels), np.uint8)
        names = [f"input {i}" for i in range(len(inputs))]
        images, _, bad = decode_images(pa.array([bytes(v) for v in inputs], pa.binary()), names, side, channels)
        if bad:
            raise DataError(f"{bad[0][0]}: not a readable image: {bad[0][1]}")
        return images


def _stacked(values: Sequence[Any]) -> np.ndarray:
    """Arrays of numbers, whole or not, as float32 (N, ...). Raises DataError for the first that isn't one."""
    arrays: list[np.ndarray] = []
    for number, value in enumerate(values):
        try:
            array = np.asarray(value)
            if array.dtype.kind not in "biuf":
                raise TypeError("an array of numbers is needed")
        except (ValueError, TypeError) as error:
            raise DataError(f"input {number}: not an array of numbers: {str(error).splitlines()[0][:200]}") from None
        arrays.append(array.astype(np.float32))
        if arrays[0].shape != array.shape:
            raise DataError(f"input {number}: shape {array.shape}, but input 0 has {arrays[0].shape}")
    return np.stack(arrays) if arrays else np.zeros((0,), np.float32)


# --- predictor rules ----------------------------------------------------------------------------------------

Rule = Callable[[Predictor, Inputs, int], pa.Table]
RULES: dict[str, Rule] = {}


def rule(name: str) -> Callable[[Rule], Rule]:
    """Registers how embeddings become answers under the name that `model.json` holds."""

    def register(function: Rule) -> Rule:
        RULES[name] = function
        return function

    return register


def _rule(name: str) -> Rule:
    if name not in RULES:
        raise DataError(f"predictor rule {name!r} is unknown.{did_you_mean(name, RULES)}")
    return RULES[name]


@rule("topk")
def predict_topk(predictor: Predictor, inputs: Inputs, k: int) -> pa.Table:
    """The k classes with the largest score for each input."""
    prior = predictor.spec.prior
    if prior is None:
        scores_Nk, ids_Nk = predictor.topk(inputs, k)
    else:
        log_prior_C = torch.from_numpy(np.log(predictor.classes[prior.column].to_numpy())).float()
        plain = predictor.topk(inputs, max(k, prior.candidates))
        scores_Nk, ids_Nk = (ranked[:, :k] for ranked in with_prior(*plain, log_prior_C, prior.weight))
    count, found = ids_Nk.shape
    ids = pa.array(ids_Nk.numpy().reshape(-1))
    return pa.table(
        {
            "input": pa.array(np.repeat(np.arange(count), found)),
            "rank": pa.array(np.tile(np.arange(1, found + 1), count)),
            "class_id": ids,
            "class": predictor.classes["name"].take(ids).cast(pa.string()),
            "score": pa.array(scores_Nk.double().numpy().reshape(-1)),
        }
    )


@rule("embed")
def predict_embed(predictor: Predictor, inputs: Inputs, k: int) -> pa.Table:
    """The embedding of each input; k plays no part."""
    emb_ND = predictor.embed(inputs).numpy()
    values = pa.FixedSizeListArray.from_arrays(pa.array(emb_ND.reshape(-1)), predictor.spec.dim)
    return pa.table({"input": pa.array(np.arange(len(emb_ND))), "embedding": values})


def _map_rows(path: Path) -> Tensor:
    """`rows` of a head file as a memory-mapped tensor: nothing is read until it is used."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("rows")
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: not a readable head file: {error}") from error
