"""The standard methods of unlearning, each an objective under the engine.

All share one interface, `unlearn.unlearn(model, retain, forget, budget) -> model`. A batch holds retained and forgotten
samples in fixed numbers; `Marked.forgotten` tells them apart. Losses are means over all ranks' samples of a kind.

Shape legend: B samples of this rank, C classes, D embedding width, P parameters.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from labelmill.data.keys import key_hashes
from labelmill.data.stream import Batch
from labelmill.errors import JobError
from labelmill.job import StrictModel
from labelmill.losses.unlearning import kl_to_teacher, other_label
from workloads.unlearning.fisher import Dampening, DampeningUnlearner, FisherNoise, FisherNoiseUnlearner
from workloads.unlearning.laf import LafConfig
from workloads.unlearning.model import Dense, Method, Unlearner, frozen


class Retrain(Method):
    """From scratch on the retained samples with the model's own recipe: what the others are measured by."""

    kind: Literal["retrain"] = "retrain"


class Finetune(Method):
    """CE on D_r (Golatkar et al., CVPR 2020, baseline)."""

    kind: Literal["finetune"] = "finetune"


class Ascent(Method):
    """-CE on D_f: gradient ascent (Graves et al., AAAI 2021; Thudi et al., EuroS&P 2022)."""

    kind: Literal["ascent"] = "ascent"


class NegGradPlus(Method):
    """alpha CE(D_r) - (1 - alpha) CE(D_f) (Kurmanji et al., NeurIPS 2023, NegGrad+)."""

    kind: Literal["neggrad_plus"] = "neggrad_plus"
    alpha: float = Field(0.95, ge=0, le=1, description="1 is fine-tuning, 0 is gradient ascent")


class RandomLabels(Method):
    """CE on D_f with labels drawn once among the wrong ones, + CE on D_r (Graves et al., AAAI 2021, amnesiac)."""

    kind: Literal["random_labels"] = "random_labels"


class BoundaryShrink(Method):
    """CE on D_f with the nearest other class, found by a step of FGSM on the original (Chen et al., CVPR 2023)."""

    kind: Literal["boundary_shrink"] = "boundary_shrink"
    step: float = Field(0.1, gt=0, description="of the prepared input, along the sign of the gradient")


class BadTeacher(Method):
    """KL(random net || model) on D_f + KL(original || model) on D_r (Chundawat et al., AAAI 2023)."""

    kind: Literal["bad_teacher"] = "bad_teacher"
    temperature: float = Field(1.0, gt=0)


class Scrub(Method):
    """Turns of: maximise KL(original || model) on D_f; minimise alpha KL on D_r + gamma CE on D_r (Kurmanji et al. 2023)."""

    kind: Literal["scrub"] = "scrub"
    alpha: float = Field(0.5, ge=0)
    gamma: float = Field(1.0, ge=0)
    maximise: float = Field(0.5, ge=0, le=1, description="share of the training in which it is maximised at all")
    temperature: float = Field(4.0, gt=0)
    rewind: bool = Field(
        False,
        description="SCRUB+R: the checkpoint whose D_f error is nearest to that on held-out samples of its classes",
    )


class LastLayers(Method):
    """CF-k and EU-k: the last k layers learn on D_r, from where they are or afresh; the others stay (Goel et al. 2022)."""

    kind: Literal["last_layers"] = "last_layers"
    k: int = Field(1, ge=1, description="layers, the class rows being the last one")
    fresh: bool = Field(False, description="EU-k: from fresh weights")


class Unsir(Method):
    """Noise that maximises the loss of the forgotten classes impairs them, then D_r repairs (Tarun et al., TNNLS 2023)."""

    kind: Literal["unsir"] = "unsir"
    noise: int = Field(64, ge=1, description="noise samples of a class")
    noise_steps: int = Field(40, ge=1)
    noise_rate: float = Field(0.1, gt=0)
    penalty: float = Field(0.1, ge=0, description="on the squared length of the noise")
    impair: float = Field(0.5, gt=0, lt=1, description="share of the training that impairs")


class RemoveClasses(Method):
    """Class rows of forgotten classes end: they can't be answered any more; the encoder stays. For any number of classes."""

    kind: Literal["remove_classes"] = "remove_classes"
    repair: int = Field(0, ge=0, description="steps in which rows of neighbouring classes settle on retained samples")
    neighbours: int = Field(8, ge=1, description="nearest classes of a removed one whose samples take part in that")


class Sisa(StrictModel):
    """The constituents that saw a forgotten sample learn again, from the last slice without one (Bourtoule et al., S&P 2021).

    By the recipe of the model: `train` isn't used.
    """

    kind: Literal["sisa"] = "sisa"


MethodConfig = Annotated[
    Retrain
    | Finetune
    | Ascent
    | NegGradPlus
    | RandomLabels
    | BoundaryShrink
    | BadTeacher
    | Scrub
    | Dampening
    | FisherNoise
    | LastLayers
    | Unsir
    | LafConfig,
    Field(discriminator="kind"),
]
"""A method by `kind`."""


class FinetuneUnlearner(Unlearner):
    uses = (True, False)

    def loss(self, batch: Batch, z_BC: Tensor, y_B: Tensor, r_B: Tensor, f_B: Tensor) -> Tensor:
        return self.cross_entropy(z_BC, y_B, r_B)


class AscentUnlearner(Unlearner):
    uses = (False, True)

    def loss(self, batch: Batch, z_BC: Tensor, y_B: Tensor, r_B: Tensor, f_B: Tensor) -> Tensor:
        return -self.cross_entropy(z_BC, y_B, f_B)


class NegGradPlusUnlearner(Unlearner):
    def loss(self, batch: Batch, z_BC: Tensor, y_B: Tensor, r_B: Tensor, f_B: Tensor) -> Tensor:
        alpha = self.config.alpha
        return alpha * self.cross_entropy(z_BC, y_B, r_B) - (1 - alpha) * self.cross_entropy(z_BC, y_B, f_B)


class RandomLabelsUnlearner(Unlearner):
    def loss(self, batch: Batch, z_BC: Tensor, y_B: Tensor, r_B: Tensor, f_B: Tensor) -> Tensor:
        hashes = key_hashes([f"{self.seed}|{key}" for key in batch.keys])[0] >> 1  # fits into int64
        hash_B = torch.from_numpy(hashes.astype("int64")).to(y_B.device)
        drawn_B = torch.where(f_B, other_label(y_B, hash_B, z_BC.shape[1]), y_B)
        return self.cross_entropy(z_BC, drawn_B, r_B | f_B)


class BoundaryShrinkUnlearner(Unlearner):
    uses = (False, True)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.teacher = self.original()

    def nearest(self, inputs: Tensor, y_B: Tensor) -> Tensor:
        """The likeliest class other than the own one after a step up the loss of the original, (B,)."""
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            raise JobError("boundary_shrink moves inputs along a gradient: it takes images or arrays, not texts.")
        with torch.enable_grad():
            x = inputs.detach().clone().requires_grad_(True)
            (grad,) = torch.autograd.grad(F.cross_entropy(self.teacher(x), y_B, reduction="sum"), x)
        with torch.no_grad():
            z_BC = self.teacher(inputs + self.config.step * grad.sign())
            return z_BC.scatter(1, y_B[:, None], -torch.inf).argmax(1)

    def loss(self, batch: Batch, z_BC: Tensor, y_B: Tensor, r_B: Tensor, f_B: Tensor) -> Tensor:
        return self.cross_entropy(z_BC, self.nearest(batch.inputs, y_B), f_B)


class BadTeacherUnlearner(Unlearner):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.good, self.bad = self.original(), frozen(self.original().forget_everything(self.seed + 7))

    def loss(self, batch: Batch, z_BC: Tensor, y_B: Tensor, r_B: Tensor, f_B: Tensor) -> Tensor:
        good_BC, bad_BC = self.good(batch.inputs), self.bad(batch.inputs)
        teacher_BC = torch.where(f_B[:, None], bad_BC, good_BC)
        return self.mean(kl_to_teacher(z_BC, teacher_BC, self.config.temperature), r_B | f_B)


class ScrubUnlearner(Unlearner):
    phase_rates = (1.0, 1.0)  # maximise, minimise

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.teacher = self.original()

    def loss(self, batch: Batch, z_BC: Tensor, y_B: Tensor, r_B: Tensor, f_B: Tensor) -> Tensor:
        config = self.config
        kl_B = kl_to_teacher(z_BC, self.teacher(batch.inputs), config.temperature)
        if self.step % 2 == 0 and self.step < config.maximise * self.total:
            return -self.mean(kl_B, f_B)
        return config.alpha * self.mean(kl_B, r_B) + config.gamma * self.cross_entropy(z_BC, y_B, r_B)


class LastLayersUnlearner(Unlearner):
    uses = (True, False)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        layers, k = self.model.layers(), self.config.k
        if k > len(layers):
            raise JobError(f"method.k: {k} layers of the {len(layers)} that the model has.")
        if self.config.fresh:
            fresh = Dense(self.package).forget_everything(self.seed + 11).layers()
            for layer, new in zip(layers[-k:], fresh[-k:], strict=True):
                for parameter, value in zip(layer, new, strict=True):
                    parameter.data.copy_(value.data)
        for parameter in (p for layer in layers[:-k] for p in layer):
            parameter.requires_grad_(False)

    def loss(self, batch: Batch, z_BC: Tensor, y_B: Tensor, r_B: Tensor, f_B: Tensor) -> Tensor:
        return self.cross_entropy(z_BC, y_B, r_B)


class UnsirUnlearner(Unlearner):
    uses = (True, False)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if not self.classes:
            raise JobError("method.kind unsir forgets whole classes: no class is forgotten whole by this request.")
        self.teacher = self.original()
        self._noise: Tensor | None = None

    def noise(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs of high loss for the forgotten classes, learnt once against the original, and their classes.

        They depend on the seed and the shape of an input alone, so every rank has the same.
        """
        if not isinstance(like, Tensor) or not like.is_floating_point():
            raise JobError("unsir learns noise in the place of inputs: it takes images or arrays, not texts.")
        y_B = torch.tensor(self.classes).repeat_interleave(self.config.noise).to(like.device)
        if self._noise is None:
            generator = torch.Generator().manual_seed(self.seed)
            start = torch.randn(len(y_B), *like.shape[1:], generator=generator).to(like.device)
            with torch.enable_grad():
                x = start.requires_grad_(True)
                optimizer = torch.optim.Adam([x], lr=self.config.noise_rate)
                for _ in range(self.config.noise_steps):
                    optimizer.zero_grad()
                    length = x.square().flatten(1).sum(1).mean()
                    (self.config.penalty * length - F.cross_entropy(self.teacher(x), y_B)).backward()
                    optimizer.step()
            self._noise = x.detach()
        return self._noise, y_B

    def loss(self, batch: Batch, z_BC: Tensor, y_B: Tensor, r_B: Tensor, f_B: Tensor) -> Tensor:
        retain = self.cross_entropy(z_BC, y_B, r_B)
        if self.step >= self.config.impair * self.total:
            return retain
        x, noise_y = self.noise(batch.inputs)
        return retain + F.cross_entropy(self.model(x.to(batch.inputs.dtype)), noise_y)


UNLEARNERS: dict[str, type[Unlearner]] = {
    "finetune": FinetuneUnlearner,
    "ascent": AscentUnlearner,
    "neggrad_plus": NegGradPlusUnlearner,
    "random_labels": RandomLabelsUnlearner,
    "boundary_shrink": BoundaryShrinkUnlearner,
    "bad_teacher": BadTeacherUnlearner,
    "scrub": ScrubUnlearner,
    "last_layers": LastLayersUnlearner,
    "unsir": UnsirUnlearner,
    "dampening": DampeningUnlearner,
    "fisher_noise": FisherNoiseUnlearner,
}
