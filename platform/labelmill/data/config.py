"""The `data` section of a job: which data sets, and how their streams are read."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from labelmill.data.manifest import Manifest, load_manifest
from labelmill.data.source import StreamSpec
from labelmill.errors import DataError
from labelmill.job import StrictModel


class StreamConfig(StrictModel):
    """How streams are read."""

    window: int = Field(8, ge=1, description="shards shuffled together; what a read task holds in memory")
    max_bad_samples: int = Field(0, ge=0, description="undecodable samples left out and named; one more stops the run")
    verify: bool = Field(True, description="re-hash every shard as it is read")

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
        """One epoch of a data set as a stream; training sets its own end."""
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
            verify=self.verify,
        )


class DataConfig(StreamConfig):
    """A training and a test data set with one label space: folders that hold a `manifest.json`."""

    train: str = Field(min_length=1, description="folder or URI of the training set")
    test: str = Field(min_length=1, description="folder or URI of the test set")

    def open(self) -> tuple[Manifest, Manifest]:
        """Both manifests. Raises DataError when one is missing or their labels don't fit together."""
        train, test = load_manifest(self.train), load_manifest(self.test)
        if train.label != test.label:
            raise DataError(
                f"data.test {self.test} has labels {_show(test.label)}, data.train {self.train} has {_show(train.label)}. "
                "Import both with one label space (labelmill data import --split)."
            )
        return train, test


def _show(label: Any) -> str:
    classes = "" if label.num_classes is None else f" of {label.num_classes} classes"
    return f"{label.form}{classes}"
