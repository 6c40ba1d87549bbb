"""The `data` section of a job: which data sets, and how their streams are read."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from pydantic import Field, model_validator

from labelmill.data import store
from labelmill.data.cache import ShardCache
from labelmill.data.damage import Policy
from labelmill.data.decode import image_decoder
from labelmill.data.fetch import Verify
from labelmill.data.manifest import Manifest, load_manifest
from labelmill.data.mix import Mix
from labelmill.data.selection_config import SelectionConfig
from labelmill.data.spec import AnySpec, DecodePlace, MixedSpec, Reading, StreamSpec
from labelmill.errors import DataError
from labelmill.job import StrictModel


class CacheConfig(StrictModel):
    """Local copies of remote shards, shared by all workers of a host."""

    folder: str = Field(min_length=1, description="a local folder, the same on every host")
    limit_mb: float = Field(10_240, gt=0, description="most it may hold, MiB; the longest unused go first")


class MixPart(StrictModel):
    """A data set that is mixed into the training stream."""

    data: str = Field(min_length=1, description="folder or URI of a data set with the training set's label space")
    weight: float = Field(gt=0, description="its share, in the unit of `data.weight`")


class StreamConfig(StrictModel):
    """How streams are read."""

    window: int = Field(8, ge=1, description="shards shuffled together; what a read task holds in memory")
    max_bad_samples: int = Field(0, ge=0, description="holes that are left out and named; one more stops the run")
    on_damage: Policy = Field(
        "raise", description="a damaged shard stops the run, becomes holes as a whole (shard) or where needed (sample)"
    )
    verify: Verify = Field(
        "first", description="re-hash shards as they are read: always, never, or those this process has not seen yet"
    )
    decode: DecodePlace = Field("auto", description="images: in tasks, or late in threads of the rank (auto: JPEG)")
    image_decoder: str = Field("", description="an installed decoder for the ranks' images, e.g. on a GPU; empty: ours")
    decode_threads: int = Field(0, ge=0, description="a rank's threads that decode and prepare; 0: its CPUs")
    prefetch_mb: float = Field(128.0, gt=0, description="object-store memory for blocks that are read ahead, MiB")
    readers: int = Field(2, ge=1, description="windows read at once")
    cache: CacheConfig | None = Field(None, description="keep local copies of shards that come from an object store")
    select: SelectionConfig | None = Field(None, description="training samples that take part, and how often")
    mix: tuple[MixPart, ...] = Field((), description="data sets mixed into the training stream, in exact proportions")
    weight: float = Field(1.0, gt=0, description="share of the training set itself in a mix")

    @model_validator(mode="after")
    def _check(self) -> StreamConfig:
        try:
            image_decoder(self.image_decoder)
        except DataError as error:
            raise ValueError(str(error)) from None
        if self.cache and store.is_uri(self.cache.folder):
            raise ValueError(f"cache.folder {self.cache.folder!r} must be a local folder")
        return self

    @property
    def reading(self) -> Reading:
        """How shards are read."""
        return Reading(
            verify=self.verify,
            on_damage=self.on_damage,
            decode=self.decode,
            image_decoder=self.image_decoder,
            threads=self.decode_threads,
            prefetch_mb=self.prefetch_mb,
            readers=self.readers,
            cache_folder=os.path.abspath(self.cache.folder) if self.cache else "",
            cache_mb=self.cache.limit_mb if self.cache else 0.0,
        )

    def stream(
        self,
        manifest: Manifest,
        field: str,
        global_batch: int,
        seed: int = 0,
        shuffle: bool = True,
        image_size: int | None = None,
        channels: int = 3,
    ) -> StreamSpec:
        """One epoch of a data set as a stream, every sample once; training sets its own end."""
        return StreamSpec(
            manifest,
            field,
            global_batch,
            seed=seed,
            shuffle=shuffle,
            window=self.window,
            image_size=image_size,
            channels=channels,
            max_bad_samples=self.max_bad_samples,
            reading=self.reading,
        )

    def training_stream(
        self, manifest: Manifest, folder: str | os.PathLike[str], field: str, global_batch: int, **options: Any
    ) -> AnySpec:
        """The training stream: `stream` with the selection and the mix of the section.

        Args:
            manifest: the training set.
            folder: where a selection is kept; read tasks on other hosts must see it.
            field, global_batch, options: as of `stream`.

        Raises DataError when the selection is empty or names what isn't there, or a mixed data set doesn't fit.
        """
        spec = self.stream(manifest, field, global_batch, **options)
        if self.select:
            selection = self.select.build(manifest, os.fspath(folder), options.get("seed", 0))
            spec = replace(spec, selection=selection)
        if not self.mix:
            return spec
        others = (self.stream(load_manifest(part.data), field, global_batch, **options) for part in self.mix)
        return MixedSpec((spec, *others), Mix([self.weight, *(part.weight for part in self.mix)]), global_batch)


class DataConfig(StreamConfig):
    """A training and a test data set with one label space: folders that hold a `manifest.json`."""

    train: str = Field(min_length=1, description="folder or URI of the training set")
    test: str = Field(min_length=1, description="folder or URI of the test set")
    dev: str | None = Field(
        None, min_length=1, description="held-out set for `train.evaluate_every`; empty: the test set, just to look at"
    )

    def open(self) -> tuple[Manifest, Manifest]:
        """Both manifests. Raises DataError when one is missing, their labels don't fit together, or the cache can't work."""
        train, test = load_manifest(self.train), load_manifest(self.test)
        others = [("data.test", self.test), *(("data.mix", part.data) for part in self.mix)]
        for where, other in [*others, ("data.dev", self.dev)] if self.dev else others:
            label = test.label if where == "data.test" else load_manifest(other).label
            if train.label != label:
                raise DataError(
                    f"{where} {other} has labels {_show(label)}, data.train {self.train} has {_show(train.label)}. "
                    "Import both with one label space (labelmill data import --split)."
                )
        if self.cache:
            largest = max(shard.bytes for shard in (*train.shards, *test.shards))
            ShardCache(self.reading.cache_folder, int(self.cache.limit_mb * 2**20)).check(largest)
        return train, test

    def held_out(self, test: Manifest) -> Manifest:
        """What training is judged by while it goes on: `dev`, or the opened test set without one."""
        return load_manifest(self.dev) if self.dev else test

    def judging(self, test: Manifest, field: str, global_batch: int, **options: Any) -> dict[str, Any]:
        """What a fit predicts and is judged by, as its arguments: `predict`, the test set in order, and `evaluate`.

        Args:
            test: the opened test set.
            field, global_batch, options: as of `stream`.
        """
        return {
            "predict": {"test": self.stream(test, field, global_batch, shuffle=False, **options)},
            "evaluate": self.stream(self.held_out(test), field, global_batch, **options),
        }


def _show(label: Any) -> str:
    classes = "" if label.num_classes is None else f" of {label.num_classes} classes"
    return f"{label.form}{classes}"
