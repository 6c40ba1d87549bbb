"""Passes over a data set that need no worker group: embed every sample, cluster embeddings, assign samples to clusters.

Each runs as Ray tasks, one a shard, or one after the other in this process where it isn't connected to Ray; what they make
lies in files beside each other, row for row with the shards.

Shape legend: n samples of a shard, K centres, L nearest centres, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from labelmill.data.decode import decode_column
from labelmill.data.manifest import Manifest
from labelmill.data.shards import read_shard
from labelmill.encoders import EncoderConfig, build_encoder
from labelmill.errors import DataError, user_error_in
from labelmill.evaluation.clustering import accumulate, assign_top, new_centres, reseed_empty

Progress = Callable[[float, float], None]

most_cpus = float("inf")
"""CPUs that a task reserves at the most. A trial of a search sets it: what the trials leave free may be little."""


def embedding_file(folder: Path, shard: int) -> Path:
    """Where the embeddings of a shard lie: `emb` float32 (n, D), `valid` bool (n,)."""
    return folder / f"emb-{shard:05d}.safetensors"


def load_embeddings(folder: Path) -> tuple[Tensor, Tensor]:
    """All embeddings of a folder in the order of the shards: (emb float32 (N, D), valid bool (N,))."""
    parts = [load_file(path) for path in sorted(folder.glob("emb-*.safetensors"))]
    if not parts:
        raise DataError(f"{folder}: no embeddings here.")
    return torch.cat([p["emb"] for p in parts]), torch.cat([p["valid"] for p in parts])


def _shared(value: Any) -> Any:
    """A value that many tasks take: in the object store once, where there is one."""
    import ray

    return ray.put(value) if ray.is_initialized() else value


def run_tasks(calls: list[tuple[Any, tuple[Any, ...]]], cpus: float, progress: Progress) -> list[Any]:
    """Runs (function, arguments) pairs as tasks; results in order. Raises UserError kinds as they are."""
    import ray

    if not ray.is_initialized():
        results = []
        for function, arguments in calls:
            results.append(function(*arguments))
            progress(len(results), len(calls))
        return results
    refs = [ray.remote(num_cpus=min(cpus, most_cpus))(function).remote(*arguments) for function, arguments in calls]
    waiting = list(refs)
    try:
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1)
            ray.get(done)
            progress(len(refs) - len(waiting), len(refs))
        return ray.get(refs)
    except Exception as error:
        for ref in waiting:
            ray.cancel(ref, force=True)
        raise user_error_in(error) or error from None


def _embed_shard(
    manifest: Manifest, shard: int, encoder: EncoderConfig, weights: dict[str, Tensor], max_bad: int, out: Path
) -> list[tuple[str, str]]:
    torch.set_num_threads(1)
    module = build_encoder(encoder)
    module.load_state_dict(weights)
    table = read_shard(manifest, shard)
    column = table.column(module.field)
    size, channels = getattr(encoder, "image_size", None), getattr(encoder, "channels", 3)
    keys = table.column("key").to_pylist()
    raw, valid, bad = decode_column(column, manifest.fields[module.field], keys, size, channels)
    if len(bad) > max_bad:
        key, reason = bad[0]
        raise DataError(f"{manifest.shard_path(shard)}: sample {key!r} can't be decoded: {reason}.")
    emb = module.embed(raw, batch=512)
    part = out.with_name(f".{out.name}.part")
    save_file({"emb": emb.contiguous(), "valid": torch.from_numpy(valid)}, part)
    part.replace(out)
    return bad


def embed_shards(
    manifest: Manifest,
    folder: Path,
    encoder: EncoderConfig,
    weights: dict[str, Tensor],
    max_bad: int,
    progress: Progress,
    cpus: float = 1.0,
) -> list[tuple[str, str]]:
    """Embeds every sample with a frozen encoder; files by `embedding_file`. Shards done before are kept.

    Returns the undecodable samples (key, reason); their rows have `valid` False. Raises DataError when there are more than
    `max_bad`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shared = _shared(weights)
    todo = [i for i in range(len(manifest.shards)) if not embedding_file(folder, i).is_file()]
    calls = [(_embed_shard, (manifest, i, encoder, shared, max_bad, embedding_file(folder, i))) for i in todo]
    bad = [item for items in run_tasks(calls, cpus, progress) for item in items]
    if len(bad) > max_bad:
        raise DataError(f"data set {manifest.name!r}: {len(bad)} undecodable samples, the job allows {max_bad}.")
    return bad


def _unit(path: Path) -> tuple[Tensor, Tensor]:
    """Unit embeddings of the valid rows of a file, and the mask of valid rows."""
    content = load_file(path)
    emb_ND, valid = content["emb"], content["valid"]
    norm_N = emb_ND.norm(dim=1)
    wrong = valid & (~torch.isfinite(norm_N) | (norm_N == 0))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise DataError(
            f"{path.name}: the embedding of row {row} is zero or not finite; it has no direction to cluster."
        )
    return emb_ND[valid] / norm_N[valid, None], valid


def _accumulate_file(path: Path, centres_KD: Tensor) -> tuple[Tensor, Tensor, float]:
    torch.set_num_threads(1)
    unit_ND, _ = _unit(path)
    id_NL, cos_NL = assign_top(unit_ND, centres_KD)
    sums, counts = accumulate(unit_ND, id_NL[:, 0], len(centres_KD))
    return sums, counts, float(cos_NL.double().sum())


def spherical_kmeans(
    folder: Path, num_centres: int, passes: int, seed: int, progress: Progress, cpus: float = 1.0
) -> tuple[Tensor, list[dict[str, float]]]:
    """Spherical k-means over the embeddings of a folder: unit centres float32 (K, D) and a record of each pass.

    Centres start as random samples; one left empty is moved to a random sample. Sums are float64 in the order of the files, so
    the result doesn't depend on the number of tasks. Raises DataError for fewer samples than centres.
    """
    files = sorted(folder.glob("emb-*.safetensors"))
    units = [_unit(path)[0] for path in files]
    total = sum(len(unit) for unit in units)
    if total < num_centres:
        raise DataError(f"clusters.count: {num_centres} clusters asked for, but only {total} samples can be clustered.")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(total, generator=generator)[:num_centres].sort().values
    pool = torch.cat(units)
    centres_KD, history = pool[chosen].clone(), []
    del units
    for number in range(passes):
        shared = _shared(centres_KD)
        results = run_tasks([(_accumulate_file, (path, shared)) for path in files], cpus, lambda done, of: None)
        sums, counts = results[0][0].clone(), results[0][1].clone()
        for more_sums, more_counts, _ in results[1:]:
            sums += more_sums
            counts += more_counts
        centres_KD = new_centres(sums, counts, centres_KD)
        centres_KD, reseeded = reseed_empty(centres_KD, counts, pool, seed + 1 + number)
        mean_cosine = sum(result[2] for result in results) / total
        history.append({"pass": number + 1, "mean_cosine": mean_cosine, "reseeded": reseeded})
        progress(number + 1, passes)
    return centres_KD, history


def _assign_file(path: Path, centres_KD: Tensor, nearest: int) -> Tensor:
    torch.set_num_threads(1)
    unit_ND, valid = _unit(path)
    # holes keep a row, so that labels stay aligned with the shard; training gives them weight 0
    ids = torch.arange(nearest).repeat(len(valid), 1)
    ids[valid] = assign_top(unit_ND, centres_KD, nearest)[0]
    return ids


def assign_nearest(
    manifest: Manifest, folder: Path, centres_KD: Tensor, nearest: int, progress: Progress, cpus: float = 1.0
) -> Iterator[pa.Table]:
    """The `nearest` centres of every sample, most similar first: a label table (key, label) a shard."""
    shared = _shared(centres_KD)
    calls = [(_assign_file, (embedding_file(folder, i), shared, nearest)) for i in range(len(manifest.shards))]
    for i, ids_NL in enumerate(run_tasks(calls, cpus, progress)):
        keys = read_shard(manifest, i).column("key")
        if nearest == 1:
            labels: pa.Array = pa.array(ids_NL[:, 0].numpy())
        else:
            offsets = np.arange(0, ids_NL.numel() + 1, nearest, dtype=np.int32)
            labels = pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids_NL.reshape(-1).numpy()))
        yield pa.table({"key": keys, "label": labels})
