"""What a stream is: which samples in which order and in which global batches. Picklable, independent of the workers.

Positions are those of the plan (`labelmill.data.plan`). A cursor is one position; it belongs to the model's checkpoint
and is valid for one `digest`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np

from labelmill.data.damage import Policy
from labelmill.data.fetch import Verify
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec, Manifest
from labelmill.data.mix import Mix
from labelmill.data.plan import Plan
from labelmill.data.selection import Selection
from labelmill.errors import DataError

DecodePlace = Literal["auto", "late", "task"]

_LATE_EXTS = {"jpg", "jpeg"}
_BLOCK_BYTES = 8 << 20
_MOST_ROWS = 4096


@dataclass(frozen=True)
class Reading:
    """How a stream's shards are read; none of it changes what is read.

    Attributes:
        verify: re-hash shards always, never, or only those that this process has not seen unchanged before ("first").
        on_damage: a damaged shard stops the run ("raise"), becomes holes as a whole ("shard"), or only where its samples
            can't be proved good ("sample").
        decode: images are decoded by tasks on the cluster ("task") or by threads of the rank ("late"); "auto" is late for
            JPEG, whose decoder runs beside Python, and task for the rest.
        image_decoder: name of an installed decoder that ranks use for images; empty: ours.
        threads: of a rank, for decoding and preparing batches; 0 leaves it to the rank.
        prefetch_mb: object-store memory that blocks read ahead may take, MiB.
        readers: windows read at once.
        cache_folder, cache_mb: local copies of remote shards, shared by the workers of a host; empty: none.
    """

    verify: Verify = "first"
    on_damage: Policy = "raise"
    decode: DecodePlace = "auto"
    image_decoder: str = ""
    threads: int = 0
    prefetch_mb: float = 128.0
    readers: int = 2
    cache_folder: str = ""
    cache_mb: float = 0.0


class _Positions:
    """What a stream and a mix share: positions `[start, stop)` cut into global batches."""

    global_batch: int
    start: int
    stop: int | None

    @property
    def epoch_samples(self) -> int:
        """Positions of one epoch."""
        raise NotImplementedError

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.epoch_samples if self.stop is None else self.stop

    @property
    def steps(self) -> int:
        """Global batches, the last one may be smaller."""
        return -(-(self.end - self.start) // self.global_batch)

    def after(self, cursor: int) -> Self:
        """The same stream from position `cursor` on."""
        return replace(self, start=cursor)  # type: ignore[type-var]

    def batch_range(self, step: int) -> tuple[int, int]:
        """Positions `[lo, hi)` of global batch `step`, counted from `start`."""
        lo = self.start + step * self.global_batch
        return lo, min(self.end, lo + self.global_batch)


@dataclass(frozen=True)
class StreamSpec(_Positions):
    """A stream over one data set.

    Attributes:
        manifest: the shards.
        field: the manifest field an encoder reads; empty for labels only.
        global_batch: samples of one global batch, over all workers.
        start, stop: positions `[start, stop)`; stop None is one epoch.
        seed, window, shuffle, selection: of the plan.
        image_size, channels: images are resized to `image_size` (None keeps them) and converted to `channels`.
        max_bad_samples: holes (undecodable or damaged samples, weight 0) before the run stops; 0 stops at the first.
        reading: how shards are read.
    """

    manifest: Manifest
    field: str
    global_batch: int
    start: int = 0
    stop: int | None = None
    seed: int = 0
    window: int = 8
    shuffle: bool = True
    selection: Selection | None = None
    image_size: int | None = None
    channels: int = 3
    max_bad_samples: int = 0
    reading: Reading = Reading()

    def __post_init__(self) -> None:
        if self.field and self.field not in self.manifest.fields:
            known = ", ".join(self.manifest.fields)
            raise DataError(f"data set {self.manifest.name!r} has no field {self.field!r}; it has: {known}.")

    @cached_property
    def plan(self) -> Plan:
        """The order of the stream."""
        counts = np.array([shard.samples for shard in self.manifest.shards], np.int64)
        return Plan(counts, self.seed, self.window, self.shuffle, self.selection)

    @property
    def name(self) -> str:
        """Name of the data set, for messages."""
        return self.manifest.name

    @property
    def label(self) -> LabelSpec:
        """The label form."""
        return self.manifest.label

    @property
    def field_spec(self) -> FieldSpec | None:
        """What `field` is; None for labels only."""
        return self.manifest.fields[self.field] if self.field else None

    @property
    def epoch_samples(self) -> int:
        """Samples of one epoch."""
        return self.plan.epoch_samples

    @property
    def digest(self) -> str:
        """Identity of the order: a cursor belongs to one digest."""
        return self.plan.digest(self.manifest.digest)

    # --- the same face as a mix ---

    @property
    def parts(self) -> tuple[StreamSpec, ...]:
        """The streams it is made of."""
        return (self,)

    def split(self, lo: int, hi: int) -> tuple[list[tuple[int, int]], np.ndarray | None]:
        """Positions `[lo, hi)` as one range a part, and the order that makes of the parts' rows, end to end, the batch's."""
        return [(lo, hi)], None

    # --- decoding and blocks ---

    @property
    def decodes_in_task(self) -> bool:
        """Whether images are decoded before they reach the rank."""
        spec, place = self.field_spec, self.reading.decode
        if spec is None or spec.kind != "image" or place == "late" or self.reading.image_decoder:
            return False
        return place == "task" or not set(spec.exts) <= _LATE_EXTS

    @cached_property
    def sample_bytes(self) -> float:
        """Mean bytes of a sample on its way to the rank (decoded, where a task decodes)."""
        encoded = self.manifest.num_bytes / max(1, self.manifest.num_samples)
        if not self.decodes_in_task:
            return encoded
        side = self.image_size
        shape = (side, side) if side else (self.field_spec.shape or () if self.field_spec else ())
        return float(np.prod(shape[:2])) * self.channels if shape else 10 * encoded

    @property
    def block_rows(self) -> int:
        """Samples of a block: about 8 MiB, at most 4,096."""
        return max(1, min(_MOST_ROWS, int(_BLOCK_BYTES / max(1.0, self.sample_bytes))))


@dataclass(frozen=True)
class MixedSpec(_Positions):
    """Several streams as one, in exact proportions; parts wrap into their own next epochs.

    Attributes:
        parts: the streams; their own `start`, `stop` and batch sizes are not used. An epoch is one of the first part's.
        mix: the interleaving.
        global_batch, start, stop: as of `StreamSpec`, in positions of the mix.

    Raises DataError when parts differ in field, label form or classes.
    """

    parts: tuple[StreamSpec, ...]
    mix: Mix
    global_batch: int
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        first = self.parts[0]
        if len(self.parts) != len(self.mix.shares):
            raise ValueError(f"{len(self.parts)} streams and {len(self.mix.shares)} weights")
        for part in self.parts[1:]:
            if part.label != first.label:
                raise DataError(
                    f"mixed data sets need one label space: {part.name!r} has {_show(part.label)}, {first.name!r} has "
                    f"{_show(first.label)}."
                )
            mine, its = part.field_spec, first.field_spec
            if (mine and mine.kind) != (its and its.kind) or part.field != first.field:
                raise DataError(
                    f"mixed data sets need one input: field {part.field!r} of {part.name!r} is another kind."
                )
            if (part.image_size, part.channels) != (first.image_size, first.channels):
                raise ValueError("parts of a mix need one image size")

    @property
    def name(self) -> str:
        """Names of the data sets, for messages."""
        return " + ".join(part.name for part in self.parts)

    @property
    def field(self) -> str:
        """The field an encoder reads."""
        return self.parts[0].field

    @property
    def field_spec(self) -> FieldSpec | None:
        """What `field` is."""
        return self.parts[0].field_spec

    @property
    def label(self) -> LabelSpec:
        """The label form."""
        return self.parts[0].label

    @property
    def seed(self) -> int:
        """Of augmentation."""
        return self.parts[0].seed

    @property
    def image_size(self) -> int | None:
        """As of the parts."""
        return self.parts[0].image_size

    @property
    def channels(self) -> int:
        """As of the parts."""
        return self.parts[0].channels

    @property
    def max_bad_samples(self) -> int:
        """Over all parts."""
        return self.parts[0].max_bad_samples

    @property
    def reading(self) -> Reading:
        """As of the first part."""
        return self.parts[0].reading

    @property
    def epoch_samples(self) -> int:
        """Positions until the first part has been seen once."""
        return -(-self.parts[0].epoch_samples * self.mix.period // self.mix.shares[0])

    @cached_property
    def digest(self) -> str:
        """Identity of the order."""
        content = [self.mix.digest, *(part.digest for part in self.parts)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def split(self, lo: int, hi: int) -> tuple[list[tuple[int, int]], np.ndarray | None]:
        """See `StreamSpec.split`."""
        ranges = self.mix.ranges(lo, hi)
        source_B, local_B = self.mix.order(lo, hi)
        first_K = np.concatenate([[0], np.cumsum(ranges[:, 1] - ranges[:, 0])[:-1]])
        return [(int(a), int(b)) for a, b in ranges], first_K[source_B] + local_B - ranges[source_B, 0]


AnySpec = StreamSpec | MixedSpec


def identity(spec: AnySpec) -> dict[str, Any]:
    """Everything that changes what ranks are given, as JSON; how fast they are given it is left out."""
    return {
        "digest": spec.digest,
        "positions": [spec.start, spec.stop, spec.global_batch],
        "input": [spec.field, spec.image_size, spec.channels, spec.reading.image_decoder],
        "holes": [spec.reading.on_damage, spec.max_bad_samples],
    }


def _show(label: LabelSpec) -> str:
    return f"{label.form} of {label.num_classes} classes" if label.num_classes else label.form
