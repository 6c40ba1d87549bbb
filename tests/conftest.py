"""Shared by all tests: one Ray session for those that need it, small data sets, no user settings leaking in."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

for _name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "RAY_ADDRESS"):
    os.environ.pop(_name, None)

from labelmill.cluster import set_environment  # noqa: E402
from tests.faults import FaultServer  # noqa: E402
from tests.s3 import faulty, localbucket, moto, no_settings, s3_store  # noqa: E402, F401  (fixtures)

no_settings()
set_environment()


def s3_environment(server: FaultServer) -> dict[str, str]:
    """What points a process at that server."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    return {"AWS_ENDPOINT_URL": server.url, "AWS_REGION": "us-east-1", **dict.fromkeys(names, "any")}


@pytest.fixture(scope="session")
def ray_storage() -> Iterator[FaultServer]:
    """The S3 server that Ray workers of the shared session know by their environment (`s3_environment`)."""
    with FaultServer() as server:
        yield server


@pytest.fixture(scope="session")
def ray_session(ray_storage: FaultServer) -> Iterator[None]:
    """A local Ray cluster, started once: starting one costs seconds."""
    import ray

    from labelmill.cluster import start
    from labelmill.job import ClusterConfig

    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_environment(ray_storage).items():
            patch.setenv(name, value)
        start(ClusterConfig(object_store_mb=300))
    yield
    ray.shutdown()


@pytest.fixture
def make_text_data(tmp_path: Path) -> Callable[..., object]:
    """Writes a packed text data set with single labels: sample i has text `word-i` and label i mod classes."""
    import pyarrow as pa

    from labelmill.data.labels import LabelSpec
    from labelmill.data.manifest import FieldSpec
    from labelmill.data.writer import ShardWriter

    def make(
        samples: int, per_shard: int, classes: int = 7, name: str = "texts", named: tuple[str, ...] = ()
    ) -> object:
        fields = {"text": FieldSpec(kind="text", ext="txt")}
        label = LabelSpec(form="single", num_classes=classes)
        with ShardWriter(
            tmp_path / name, name, fields, label, layout="packed", rows_per_member=16, samples_per_shard=per_shard
        ) as writer:
            for i in range(samples):
                writer.write(f"s{i:05d}", {"text": f"word-{i}"}, {"label": i % classes})
            return writer.close(pa.table({"name": named}) if named else None)

    return make
