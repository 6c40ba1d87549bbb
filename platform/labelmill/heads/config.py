"""What a job says about a sharded head."""

from __future__ import annotations

from pydantic import Field, model_validator

from labelmill.heads.optim import SGD, RowOptimizerConfig
from labelmill.job import StrictModel
from labelmill.losses.classification import LossConfig, Softmax
from labelmill.losses.margins import MarginConfig, NoMargin


class HeadConfig(StrictModel):
    """A class-sharded head: logit = scale * similarity(embedding, class row)."""

    loss: LossConfig = Softmax()
    margin: MarginConfig = NoMargin()
    normalize: bool = Field(True, description="similarity is the cosine; otherwise the plain inner product")
    scale: float = Field(32.0, gt=0, description="multiplies the similarity; 1 / temperature")
    sample_rate: float = Field(
        1.0, gt=0, le=1, description="share of the classes drawn each step; positives are always kept"
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

    @model_validator(mode="after")
    def _margin_needs_cosines(self) -> HeadConfig:
        if self.margin.kind != "none" and not self.normalize:
            raise ValueError(
                f"margin {self.margin.kind!r} acts on cosines: set normalize to true, or margin.kind to none"
            )
        return self
