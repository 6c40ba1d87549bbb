"""What a job says about a sharded head."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from labelmill.heads.optim import SGD, RowOptimizerConfig
from labelmill.heads.plan import BlockSampling, SamplingConfig, UniformSampling
from labelmill.job import StrictModel
from labelmill.losses.classification import LossConfig, Softmax
from labelmill.losses.margins import MarginConfig, NoMargin


class InitialHead(StrictModel):
    """A saved head that a new run goes on from, as a nightly run with new classes does from last night's."""

    checkpoint: str = Field(
        min_length=1,
        description="a checkpoint, a folder of checkpoints (the newest counts), a run, a saved head, or a packaged "
        "model; a path, a URI of a checkpoint or saved head, or a registered model (models:/NAME@alias)",
    )
    classes: str | None = Field(
        None,
        description="which class goes where: names of the saved classes (.arrow, .txt, or the data set that they were "
        "trained on), a map of ids (.npy, or .csv with old,new), or `ids` if ids stay. Default: by the names noted "
        "beside the checkpoint; by ids if neither label space has names",
    )
    merge: Literal["refuse", "first", "mean"] = Field("refuse", description="classes that go to the same new class")
    optimizer: Literal["keep", "fresh"] = Field("keep", description="state of the optimizers of rows and encoder")
    encoder: Literal["keep", "fresh"] = Field("keep", description="the encoder's weights, from the same checkpoint")


class HeadConfig(StrictModel):
    """A class-sharded head: logit = scale * similarity(embedding, class row)."""

    loss: LossConfig = Softmax()
    margin: MarginConfig = NoMargin()
    normalize: bool = Field(True, description="similarity is the cosine; otherwise the plain inner product")
    scale: float = Field(32.0, gt=0, description="multiplies the similarity; 1 / temperature")
    sub_centres: int = Field(1, ge=1, description="rows a class; a sample is compared with the nearest (Deng 2020)")
    sample_rate: float = Field(
        1.0, gt=0, le=1, description="share of the classes drawn each step; positives are always kept"
    )
    sampling: SamplingConfig = UniformSampling()
    importance: bool = Field(
        False,
        description="weigh drawn negatives by 1 / probability, so that sums over all classes are right on average",
    )
    class_filter: float | None = Field(
        None, gt=0, lt=1, description="negatives with a larger cosine count as cosine 0, without gradient (same class?)"
    )
    optimizer: RowOptimizerConfig = SGD()
    lr_multiplier: float = Field(1.0, gt=0, description="class rows learn this much faster than the encoder")
    init_std: float = Field(0.01, gt=0, description="standard deviation of the first class rows")
    block_rows: int = Field(1024, ge=1, description="classes are dealt to ranks in blocks of at most this size")
    shards: int | None = Field(
        None,
        ge=1,
        description="workers that split the class axis; a divisor of cluster.workers, which then hold workers / shards "
        "replicas of the classes. Default: all workers, one replica",
    )
    memory_mb: float = Field(512.0, ge=0, description="memory for logits kept for the backward pass, MiB a rank")
    rows_dtype: Literal["fp32", "bf16", "bf16+master"] = Field(
        "fp32", description="how rows are stored: bf16 is rounded stochastically, or has a float32 master beside it"
    )
    matmul: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16 rounds what is multiplied; products are added up in float32 (needs such hardware)"
    )

    initial: InitialHead | None = Field(None, description="a saved head to go on from; default: fresh rows")

    changeable: ClassVar[frozenset[str]] = frozenset(
        {"loss", "margin", "scale", "sample_rate", "importance", "lr_multiplier"}
    )

    @model_validator(mode="after")
    def _fits_together(self) -> HeadConfig:
        if self.margin.kind != "none" and not self.normalize:
            raise ValueError(
                f"margin {self.margin.kind!r} acts on cosines: set normalize to true, or margin.kind to none"
            )
        if self.class_filter is not None and (not self.normalize or self.loss.needs_sum):
            raise ValueError(
                f"class_filter acts on cosines and not on sums of logits: loss {self.loss.kind!r} with normalize "
                f"{str(self.normalize).lower()} can't take it"
            )
        if self.sub_centres > 1 and self.loss.needs_sum:
            raise ValueError(
                f"loss {self.loss.kind!r} sums over all rows and takes one row a class: set sub_centres to 1"
            )
        if self.sub_centres > 1 and isinstance(self.sampling, BlockSampling) and self.sampling.stride > 1:
            raise ValueError("sampling.stride and sub_centres don't go together: set one of them to 1")
        return self
