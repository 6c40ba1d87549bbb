"""How a model is trained: the `train` section of a job."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from labelmill.errors import JobError
from labelmill.heads.config import HeadConfig
from labelmill.heads.ranks import check_shards
from labelmill.job import Job, StrictModel


class TrainConfig(StrictModel):
    """Batches, optimizer of the dense modules, schedule, precision, ZeRO stage, checkpoints.

    Sharded heads have their own optimizer (`head.optimizer`); its rate is `learning_rate * head.lr_multiplier`, on
    the same schedule.
    """

    global_batch: int = Field(ge=1, description="samples of one optimizer step, over all workers")
    epochs: float | None = Field(None, gt=0, description="passes over the training data; or give `steps`")
    steps: int | None = Field(None, ge=1, description="optimizer steps; or give `epochs`")
    accumulation: int = Field(1, ge=1, description="micro batches of one optimizer step")
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0, description="decoupled; not on biases and norm scales")
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps with a linearly rising rate")
    max_grad_norm: float | None = Field(None, gt=0, description="global norm over dense modules and heads together")
    max_skipped_steps: int = Field(
        0, ge=0, description="optimizer steps that may be left out because a loss or an embedding was NaN or infinite"
    )
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoint_every: int = Field(0, ge=0, description="optimizer steps between checkpoints; 0: only at the end")
    checkpoint_every_s: float | None = Field(None, gt=0, description="seconds between checkpoints, besides the steps")
    max_failed_checkpoints: int = Field(
        3, ge=0, description="checkpoints in a row that may fail (a full disk) before training stops"
    )
    keep_checkpoints: int = Field(2, ge=1)
    checkpoint_async: bool = Field(True, description="checkpoints are written while training goes on")
    checkpoint_memory_mb: float = Field(
        256.0, gt=0, description="class rows kept for an unfinished checkpoint, MiB a worker and head"
    )
    log_every: int = Field(10, ge=1, description="optimizer steps between two metric records")
    evaluate_every: int = Field(
        0, ge=0, description="optimizer steps between two evaluations on held-out samples (metrics eval/...); 0: none"
    )
    evaluate_samples: int = Field(2048, ge=1, description="held-out samples of an evaluation, the same each time")

    changeable: ClassVar[frozenset[str]] = frozenset(
        {"learning_rate", "weight_decay", "betas", "schedule", "warmup", "max_grad_norm", "max_skipped_steps"}
    )

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of `epochs` and `steps`")
        if self.global_batch % self.accumulation:
            raise ValueError(f"global_batch {self.global_batch} is not divisible by accumulation {self.accumulation}")
        return self

    def total_steps(self, samples: int) -> int:
        """Optimizer steps over a data set of `samples`; a partial last batch joins the next epoch or is left."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * samples / self.global_batch))

    def rate(self, step: int, total: int) -> float:
        """Learning rate of optimizer step `step` (from 0) of `total`."""
        warm = int(self.warmup * total)
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - warm) / max(1, total - warm)
        if self.schedule == "linear":
            return self.learning_rate * (1 - done)
        import math

        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


class TrainJob(Job):
    """A job that trains: the checks that involve the cluster, the batch and the heads."""

    train: TrainConfig
    continued_heads: ClassVar[tuple[str, ...]] = ()
    """Sections of heads whose `initial` the workload follows."""

    def class_count(self) -> int | None:
        """Classes of the head, for `labelmill plan`; None when only the data can tell."""
        return None

    def label_count(self) -> int:
        """The most labels of a sample, for `labelmill plan`."""
        return 1

    @model_validator(mode="after")
    def _divisible(self) -> TrainJob:
        workers, micro = self.cluster.workers, self.train.global_batch // self.train.accumulation
        if micro % workers:
            raise ValueError(
                f"train.global_batch {self.train.global_batch} / train.accumulation {self.train.accumulation} = {micro} "
                f"is not divisible by cluster.workers {workers}; a multiple of {workers * self.train.accumulation} is"
            )
        if self.train.precision == "bf16" and self.train.zero_stage == 0:
            raise ValueError("train.precision bf16 keeps fp32 master weights in ZeRO: use train.zero_stage 1, 2 or 3")
        return self

    @model_validator(mode="after")
    def _whole_replicas(self) -> TrainJob:
        for _, section in self:
            if isinstance(section, HeadConfig) and section.shards:
                try:
                    check_shards(section.shards, self.cluster.workers)
                except JobError as error:
                    raise ValueError(str(error)) from None
        return self

    @model_validator(mode="after")
    def _follows_initial(self) -> TrainJob:
        for name, section in self:
            if isinstance(section, HeadConfig) and section.initial and name not in self.continued_heads:
                raise ValueError(f"{name}.initial: the classes of workload {self.workload} are made anew by each run")
        return self
