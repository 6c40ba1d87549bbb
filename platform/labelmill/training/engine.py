"""The DeepSpeed engine with sharded heads beside it, as one thing to step.

Dense modules live inside the engine, whose gradients are averages over the ranks. Heads live outside: their loss
is the mean over the global batch, so they hand the embeddings a gradient multiplied by the world size and keep
their own rows' gradient as it is. Clipping uses one global norm over both.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from labelmill.data.stream import Batch
from labelmill.errors import JobError
from labelmill.heads.traffic import waiting
from labelmill.training.config import TrainConfig
from labelmill.training.device import quiet_deepspeed
from labelmill.training.objective import Losses, Objective
from labelmill.training.pulse import SAVE, STOP

_MOMENTS = ("exp_avg", "exp_avg_sq")


class _Step(nn.Module):
    """What DeepSpeed wraps: the objective, with a plain tuple as output (ZeRO-3 hooks don't look into classes)."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        losses = self.objective(batch)
        return losses.total, losses.parts


class Engine:
    """One optimizer over dense modules (DeepSpeed ZeRO 0-3, AdamW) and sharded heads (row optimizers).

    Args:
        objective: built with equal weights on every rank.
        config: the job's `train` section.
        device: of this rank.
    """

    def __init__(self, objective: Objective, config: TrainConfig, device: torch.device) -> None:
        quiet_deepspeed()
        import deepspeed

        self.objective, self.config, self.device = objective, config, device
        self.world = dist.get_world_size()
        # one rank has nothing to partition: the same numbers without ZeRO's copies of the gradients (bf16 needs them)
        self.stage = 0 if self.world == 1 and config.precision == "fp32" else config.zero_stage
        module = _Step(objective)
        decayed = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
        plain = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
        groups = [
            {"params": params, "weight_decay": decay}
            for params, decay in ((decayed, config.weight_decay), (plain, 0.0))
            if params
        ]
        if not groups:
            raise JobError(
                "nothing to train beside the class rows: the encoder has no weights (kind pixels). Take one that has, such "
                "as linear."
            )
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=self._deepspeed_config())
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.optimizer_steps = 0
        self._create_moments()

    def _deepspeed_config(self) -> dict[str, Any]:
        config = self.config
        return {
            "train_batch_size": config.global_batch,
            "train_micro_batch_size_per_gpu": config.global_batch // (self.world * config.accumulation),
            "gradient_accumulation_steps": config.accumulation,
            # the default is 1.0, which would clip the encoder alone; we clip over encoder and heads together
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": self.stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": config.precision == "bf16"},
            "steps_per_print": 2**31,
            "wall_clock_breakdown": False,
        }

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable dense parameters by name, as the objective names them."""
        return {name: p for name, p in self.objective.named_parameters() if p.requires_grad}

    def to_device(self, batch: Batch) -> Batch:
        """The batch where and how the dense modules want it."""
        return batch.to(self.device, self.dtype if self.dtype != torch.float32 else None)

    def begin(self, rate: float) -> None:
        """Announces an optimizer step and its learning rate.

        Where nothing happens to a head's gradient between its backward pass and the step (no accumulation, no clipping),
        its rows then move chunk by chunk in the backward pass. Optional: without it rows move in `step`.
        """
        if self.config.accumulation == 1 and self.config.max_grad_norm is None:
            for head in self.objective.heads.values():
                head.begin_step(rate)

    def forward(self, batch: Batch) -> Losses:
        """The loss of a micro batch. Raises NotFiniteError, on all ranks alike, for embeddings that are not finite."""
        total, parts = self._engine(batch)
        return Losses(total, parts)

    def agree(self, loss: Tensor, wish: int = 0) -> tuple[bool, int]:
        """Whether the loss is finite on every rank, and what any rank wishes (bits, `training.pulse`). Collective."""
        finite = bool(torch.isfinite(loss.detach()))
        if self.world == 1:
            return finite, wish
        seen = torch.tensor([not finite, *(bool(wish & bit) for bit in (SAVE, STOP))], device=self.device).float()
        with waiting():
            dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        bad, save, stop = seen.bool().tolist()
        return not bad, SAVE * save | STOP * stop

    def skip(self) -> None:
        """Leaves the optimizer step out: drops what its micro batches gathered. Weights, rows and counters stay."""
        for head in self.objective.heads.values():
            head.zero_pending()
        engine, zero = self._engine, self._engine.optimizer
        engine.zero_grad()
        zero.zero_grad()
        if self.stage in (1, 2):
            for group in zero.averaged_gradients:
                zero.averaged_gradients[group] = None
            for group in zero.all_grad_tensors:
                zero.all_grad_tensors[group] = None
            for group in zero.bit16_groups:
                for parameter in group:
                    parameter.grad_accum = None
        # the next micro batch is the first of a step again
        engine.micro_steps -= engine.micro_steps % self.config.accumulation
        if self.stage in (1, 2):
            zero.micro_step_id = -1

    def backward(self, losses: Losses) -> None:
        """Accumulates gradients of dense modules and head rows; the engine divides by the accumulation steps."""
        self._engine.backward(losses.total)

    def step(self, rate: float) -> float | None:
        """Ends a micro batch. At the boundary both optimizers step with `rate`; returns the gradient norm.

        The norm is over dense modules and heads, before clipping; it is only computed when the job clips.
        """
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return None
        norm, factor = self._clip()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()
        for head in self.objective.heads.values():
            head.step(rate, scale=factor)
        self.optimizer_steps += 1
        return norm

    def _clip(self) -> tuple[float, float]:
        limit = self.config.max_grad_norm
        if limit is None:
            return math.nan, 1.0
        heads = torch.zeros((), dtype=torch.float64)
        for head in self.objective.heads.values():
            heads += float(head.pending_sq_norm())
        if self.world > 1:
            heads = heads.to(self.device)
            dist.all_reduce(heads)
        dense = self._dense_sq_norm()
        norm = math.sqrt(float(heads) + dense)
        factor = min(1.0, limit / norm) if norm > 0 else 1.0
        if self.stage == 0:
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        else:
            # ZeRO divides by its own norm, so this limit makes its factor equal to ours
            self._engine.optimizer.clip_grad = factor * math.sqrt(dense) if factor < 1 else 0.0
        return norm, factor

    def _dense_sq_norm(self) -> float:
        from deepspeed.utils import safe_get_full_grad

        total = 0.0
        for parameter in self.parameters.values():
            grad = parameter.grad if self.stage == 0 else safe_get_full_grad(parameter)
            if grad is not None:
                total += float(grad.double().pow(2).sum())
        return total

    # --- state, by parameter name, independent of ZeRO stage and world size ---------------------------------

    def dense_state(self) -> dict[str, Tensor]:
        """fp32 CPU copies of every parameter and buffer. Collective under ZeRO 3; call on every rank."""
        state = {}
        for name, parameter in self.objective.named_parameters():
            state[name] = self._full(parameter).detach().float().cpu().clone()
        for name, buffer in self.objective.named_buffers():
            state[name] = buffer.detach().cpu().clone()
        return state

    def _full(self, parameter: nn.Parameter) -> Tensor:
        if self.stage and parameter.requires_grad:
            from deepspeed.utils import safe_get_full_fp32_param

            full = safe_get_full_fp32_param(parameter)
            if full is not None:
                return full
        if self.stage == 3:
            import deepspeed

            with deepspeed.zero.GatheredParameters(parameter):
                return parameter.detach().clone()
        return parameter

    def optimizer_state(self) -> dict[str, Tensor]:
        """`<moment>.<parameter>` -> fp32 CPU tensors. Collective; call on every rank."""
        state = {}
        for name, parameter in self.parameters.items():
            for moment in _MOMENTS:
                state[f"{moment}.{name}"] = self._moment(parameter, moment).detach().float().cpu().clone()
        return state

    def _moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        if self.stage == 0:
            return self._engine.optimizer.state[parameter][moment]
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, moment)

    def _create_moments(self, steps: int = 0) -> None:
        """Zero moments for every partition. Torch makes them in its first step only, and for a partition of padding never."""
        zero, stage = self._engine.optimizer, self.stage
        inner = zero if stage == 0 else zero.optimizer
        flats = (
            zero.fp32_partitioned_groups_flat if stage == 3 else [p for g in inner.param_groups for p in g["params"]]
        )
        for flat in flats:
            inner.state[flat] = {moment: torch.zeros_like(flat) for moment in _MOMENTS}
            inner.state[flat]["step"] = torch.tensor(float(steps))
        if stage in (1, 2):
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def load_optimizer(self, moments: dict[str, Tensor], steps: int) -> None:
        """Restores what `optimizer_state` gave, on any ZeRO stage. The weights are loaded before construction."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self.optimizer_steps = steps
        self._create_moments(steps)
        for name, parameter in self.parameters.items():
            for moment in _MOMENTS:
                value = moments[f"{moment}.{name}"].to(self.device)
                if self.stage == 0:
                    self._engine.optimizer.state[parameter][moment].copy_(value)
                else:
                    safe_set_full_optimizer_state(parameter, value, moment)


@torch.no_grad()
def load_dense(objective: Objective, dense: dict[str, Tensor]) -> None:
    """Loads `Engine.dense_state` into a fresh objective, before it goes into an engine.

    Raises ValueError when names or shapes differ.
    """
    expected = dict(objective.named_parameters()) | dict(objective.named_buffers())
    if set(expected) != set(dense):
        missing, extra = sorted(set(expected) - set(dense)), sorted(set(dense) - set(expected))
        raise ValueError(f"the checkpoint is of another model: it lacks {missing[:5]} and has {extra[:5]} besides")
    for name, target in expected.items():
        if target.shape != dense[name].shape:
            raise ValueError(
                f"{name}: the checkpoint has shape {tuple(dense[name].shape)}, the model {tuple(target.shape)}"
            )
        target.copy_(dense[name])
