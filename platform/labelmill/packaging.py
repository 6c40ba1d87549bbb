"""The folder of a packaged model (`tracking.model`) from what a fit left."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import save_file

from labelmill import __version__
from labelmill.data.manifest import Manifest
from labelmill.encoders import build_encoder
from labelmill.errors import UserError
from labelmill.heads.index import IndexConfig, IndexInfo, build_index
from labelmill.job import Job, resolved
from labelmill.stages import Fitted, second_name
from labelmill.tracking.model import ClassPrior, write_model


def build_package(
    job: Job,
    package: Path,
    fitted: Fitted,
    encoder: Any,
    head: Any,
    data: Manifest,
    predictor: str = "topk",
    prior: ClassPrior | None = None,
    index: IndexConfig | None = None,
) -> IndexInfo | None:
    """Makes the folder `package`; what is there goes first. Returns what was built for `index`, if anything.

    `head` is the section of a sharded head named `classes`; None where `classes` is a dense layer with a bias.

    Raises UserError for an input that a registered model can't take.
    """
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    classes = None
    if predictor != "embed":
        assert data.label.num_classes is not None
        if head is None:
            layer = fitted.dense("classes.")
            rows_CD = torch.cat([layer["weight"], layer["bias"][:, None]], dim=1)
            save_file({"rows": rows_CD.float().contiguous()}, package / f"rows-0-{len(rows_CD)}.safetensors")
        for entry in fitted.head_shards("classes") if head else ():
            # the rows are large and final: a second name for the same bytes
            second_name(fitted.folder / "export" / "head-classes" / entry["file"], package / entry["file"])
        bare = pa.table({"name": [str(i) for i in range(data.label.num_classes)]}) if not data.classes else None
        classes = data.load_classes() if bare is None else bare
    kind = data.fields[encoder.field].kind
    if kind == "bytes" or kind == "safetensors" or kind == "arrow":  # written so for mypy
        raise UserError(f"field {encoder.field!r} is {kind}: a registered model takes text, images or arrays.")
    info = None
    if index is not None and classes is not None:  # before model.json, which holds the hash of every file
        info = build_index(package, index.kind, index.factory, index.probes)
    write_model(
        package,
        encoder=build_encoder(encoder),
        input_kind=kind,
        input_shape=data.fields[encoder.field].shape if kind == "array" else None,
        predictor=predictor,
        classes=classes,
        state=fitted.dense("encoder."),
        normalized=head is not None and head.normalize,
        bias=head is None,
        prior=prior,
        scale=1.0 if head is None else head.scale,
        label_form=data.label.form,
        manifest_digest=data.digest,
        code_version=__version__,
        extra={"job": resolved(job)},
    )
    return info
