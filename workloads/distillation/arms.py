"""What a job says about a way to train a student: its losses, their weights and schedules."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from labelmill.job import StrictModel
from labelmill.losses.distillation import LogitLossConfig


class Schedule(StrictModel):
    """When a term takes part."""

    weight: float = Field(1.0, ge=0)
    warmup_epochs: float = Field(0.0, ge=0, description="the weight rises linearly over so many epochs")
    off_epoch: float | None = Field(None, gt=0, description="from this epoch on the term is off")

    def at(self, epoch: float) -> float:
        """The weight at an epoch, from 0."""
        if self.off_epoch is not None and epoch >= self.off_epoch:
            return 0.0
        return self.weight * min(1.0, (epoch + 1) / self.warmup_epochs) if self.warmup_epochs else self.weight


class LogitTerm(Schedule):
    """A loss between the student's logits and the teacher's."""

    loss: LogitLossConfig


class FeatureTerm(Schedule):
    """A loss between embeddings, or between feature maps (attention, fitnet_maps).

    fitnet, cosine and crd compare the student's embedding through a linear layer, fitnet_maps its maps through a 1 x 1
    convolution; these aren't exported.
    """

    kind: Literal["fitnet", "cosine", "crd", "rkd", "sp", "attention", "fitnet_maps"]
    temperature: float = Field(0.07, gt=0, description="crd: of the cosines")
    stages: tuple[tuple[int, int], ...] = Field(
        (),
        description="attention, fitnet_maps: (student's map, teacher's map), from 0. Default: the last of each size that "
        "both have; for fitnet_maps only the last of these",
    )

    @property
    def of_maps(self) -> bool:
        """Whether it compares feature maps."""
        return self.kind in ("attention", "fitnet_maps")


class Arm(StrictModel):
    """One way to train the student."""

    ce: float = Field(1.0, ge=0, description="weight of cross-entropy on the labels")
    losses: tuple[LogitTerm, ...] = ()
    features: tuple[FeatureTerm, ...] = ()
    aux: Literal["none", "linear", "nonlinear"] = Field(
        "none", description="a second head that alone takes the logit losses; it isn't exported"
    )
    align: Literal["none", "all", "backbone"] = Field(
        "none",
        description="take from the teacher's gradient what opposes that of cross-entropy: over all parameters, or the encoder's",
    )
    cosine: bool = Field(
        False, description="log the cosine of both losses' gradients, with the other metrics; needs a dense head"
    )
    shuffled: bool = Field(False, description="a control: each sample gets another sample's teacher outputs")
    learning_rate: float | None = Field(None, gt=0, description="instead of train.learning_rate")

    @model_validator(mode="after")
    def _check(self) -> Arm:
        if self.aux != "none" and not self.losses:
            raise ValueError("aux: a second head needs losses to learn from")
        for name in ("align", "cosine"):
            if getattr(self, name) not in ("none", False) and not (self.ce and self.losses):
                raise ValueError(f"{name} compares two gradients: give ce a weight, and losses")
        if not (self.ce or self.losses or self.features):
            raise ValueError("nothing to learn from: ce is 0 and there are no losses")
        return self

    @property
    def needs_maps(self) -> bool:
        """Whether a term compares feature maps."""
        return any(term.of_maps for term in self.features)

    @property
    def taught(self) -> bool:
        """Whether a teacher is needed."""
        return bool(self.losses or self.features)


Arms = dict[str, Arm]
