"""What the methods for noisy labels refuse before anything trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec
from labelmill.data.writer import ShardWriter
from labelmill.encoders import CharNgramsConfig
from labelmill.errors import DataError, JobError
from labelmill.job import validate_job
from labelmill.losses.sample_state import ldr_kl
from labelmill.workload import Workload
from workloads.noisy import confident, ldr, nested_coteaching, rcal
from workloads.noisy.nested_coteaching import Compression, CoTeaching, CoTeachingSection

METHODS: dict[str, tuple[Workload, dict[str, Any]]] = {
    "noisy.confident": (confident.confident, {}),
    "noisy.ldr": (ldr.ldr, {}),
    "noisy.nested_coteaching": (nested_coteaching.nested_coteaching, {"coteaching": {"rate": 0.3}}),
    "noisy.rcal": (rcal.rcal, {}),
}


@pytest.mark.parametrize("name", METHODS)
def test_several_labels_a_sample_are_refused(tmp_path: Path, name: str) -> None:
    fields, label = {"text": FieldSpec(kind="text", ext="txt")}, LabelSpec(form="multi", num_classes=3)
    with ShardWriter(tmp_path / "data", "many", fields, label, layout="packed", samples_per_shard=10) as writer:
        for i in range(12):
            writer.write(f"s{i}", {"text": f"word {i}"}, {"label": [i % 3, (i + 1) % 3]})
    method, sections = METHODS[name]
    raw = {
        "workload": name, "name": "many", "output": str(tmp_path / "runs"), "cluster": {"in_process": True},
        "data": {"train": str(tmp_path / "data"), "test": str(tmp_path / "data")}, "tracking": {"system_metrics": False},
        "noise": {"kind": "symmetric", "rate": 0.2}, "encoder": {"kind": "char_ngrams", "dim": 8},
        "train": {"global_batch": 4, "steps": 2}, **sections,
    }  # fmt: skip
    with pytest.raises(JobError, match=rf"{name} takes a single label a sample; 'many' has labels of form multi"):
        method.run(validate_job(raw, method.job_type), None)  # type: ignore[arg-type]  # nothing has begun


def test_a_net_that_does_not_tell_its_channels_is_refused(tmp_path: Path) -> None:
    save_file({"classes.weight": torch.zeros(3, 8)}, tmp_path / "dense.safetensors")
    with pytest.raises(DataError, match="doesn't say how many channels it uses"):
        CoTeaching(
            CharNgramsConfig(dim=8),
            3,
            Compression(),
            [str(tmp_path / "dense.safetensors")] * 2,
            CoTeachingSection(rate=0.2),
            4,
            0,
        )


def test_half_precision_scores_are_taken_as_float32() -> None:
    f = torch.tensor([[2.0, 1.0, -1.0]])
    lam = torch.tensor([0.01])
    want = ldr_kl(f, torch.tensor([1]), lam, 0.1)
    for dtype in (torch.float16, torch.bfloat16):
        found = ldr_kl(f.to(dtype), torch.tensor([1]), lam, 0.1)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, want)
