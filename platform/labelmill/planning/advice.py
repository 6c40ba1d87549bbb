"""What doesn't fit and what to change; what takes the time and what would be faster. Words with numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from labelmill.errors import JobError
from labelmill.heads.optim import SGD, Adagrad
from labelmill.planning.estimate import Estimate, Machine, Setup, change, estimate

GAIN = 0.95  # a change is worth a line when the step takes at most this share of the time
Lever = tuple[str, Setup]


@dataclass(frozen=True)
class Advice:
    """A change to the job, in words, with the plan that it gives."""

    text: str
    plan: Estimate


def verdict(plan: Estimate) -> str:
    """Whether the job fits, by how much, and what takes most of the memory and of the time."""
    need, have = plan.total_memory / 1e9, plan.spec.memory / 1e9
    largest = sorted(plan.memory.items(), key=lambda item: -item[1])[:3]
    share = ", ".join(f"{name} {value / 1e9:.1f} GB" for name, value in largest)
    if plan.fits:
        slowest, seconds = max(plan.seconds.items(), key=lambda item: item[1])
        return (
            f"Fits: {need:.1f} GB of {have:.1f} GB a worker ({share}). A step takes {_ms(plan.step_seconds)}, most of it "
            f"{slowest} ({100 * seconds / plan.step_seconds:.0f}%)."
        )
    return f"Doesn't fit: {need:.1f} GB needed of {have:.1f} GB a worker, {need - have:.1f} GB too much ({share})."


def advise(setup: Setup, machine: Machine) -> list[Advice]:
    """Changes that make the job fit, or make it faster; the strongest of each kind, with their plans."""
    plan = estimate(setup, machine)
    return faster(setup, machine, plan) if plan.fits else fitting(setup, machine, plan)


# --- memory -------------------------------------------------------------------------------------------------


def fitting(setup: Setup, machine: Machine, plan: Estimate) -> list[Advice]:
    """For each lever its smallest change that fits; without any, all of them together, then more workers."""
    alone, partial = [], []
    strongest = setup
    for lever in (_shards, _row_state, _row_type, _rate, _kept_logits, _zero, _precision, _accumulation):
        tried = [(text, estimate(changed, machine)) for text, changed in lever(setup)]
        found = next((item for item in tried if item[1].fits), None)
        if found:
            alone.append(Advice(f"{found[0]}: {_result(found[1])}", found[1]))
        elif tried:
            text, best = min(tried, key=lambda item: item[1].total_memory)
            saved = (plan.total_memory - best.total_memory) / 1e9
            if saved > 0.01 * plan.total_memory / 1e9:
                partial.append(Advice(f"{text}: saves {saved:.1f} GB, not enough alone", best))
        changed = [c for _, c in lever(strongest)]
        if changed:
            strongest = min(changed, key=lambda c: estimate(c, machine).total_memory)
    if alone:
        return alone
    together = estimate(strongest, machine)
    if together.fits:
        return [*partial, Advice(f"all of these together: {_result(together)}", together)]
    return [*partial, *_more_workers(setup, machine), *_more_workers(strongest, machine, "with all of these, ")][:8]


def _more_workers(setup: Setup, machine: Machine, prefix: str = "") -> list[Advice]:
    if machine.gloo:  # this machine has no more
        return []
    for factor in (2, 4, 8, 16, 32, 64):
        plan = estimate(_scaled(setup, factor), machine)
        if plan.fits:
            text = f"{prefix}{plan.setup.workers} workers, batch a worker as now: {_result(plan)}"
            return [Advice(text, plan)]
    return []


def _scaled(setup: Setup, factor: int) -> Setup:
    shards = setup.head.shards * factor if setup.head.shards else None
    batch = setup.train.global_batch * factor
    return change(setup, workers=setup.workers * factor, global_batch=batch, shards=shards)


def _shards(setup: Setup) -> Iterator[Lever]:
    for shards in divisors(setup.workers):
        if shards > setup.shards:
            yield f"head.shards {shards} instead of {setup.shards}", change(setup, shards=shards)


def _row_state(setup: Setup) -> Iterator[Lever]:
    optimizer = setup.head.optimizer
    if optimizer.kind == "sgd" and not optimizer.momentum:
        return
    if optimizer.kind != "adagrad":
        yield f"head.optimizer.kind adagrad instead of {optimizer.kind}", change(setup, optimizer=Adagrad())
    if optimizer.kind == "sgd":
        plain = SGD(momentum=0.0, weight_decay=optimizer.weight_decay)
        yield "head.optimizer.momentum 0", change(setup, optimizer=plain)


def _row_type(setup: Setup) -> Iterator[Lever]:
    if setup.head.rows_dtype != "bf16":
        yield f"head.rows_dtype bf16 instead of {setup.head.rows_dtype}", change(setup, rows_dtype="bf16")


def _rate(setup: Setup) -> Iterator[Lever]:
    rate = setup.head.sample_rate
    for smaller in (0.5, 0.2, 0.1, 0.05, 0.02, 0.01):
        if smaller < rate:
            yield f"head.sample_rate {smaller:g} instead of {rate:g}", change(setup, sample_rate=smaller)


def _kept_logits(setup: Setup) -> Iterator[Lever]:
    if setup.head.memory_mb:
        text = f"head.memory_mb 0 instead of {setup.head.memory_mb:g} (logits are computed twice)"
        yield text, change(setup, memory_mb=0.0)


def _zero(setup: Setup) -> Iterator[Lever]:
    for stage in range(setup.train.zero_stage + 1, 4):
        yield f"train.zero_stage {stage} instead of {setup.train.zero_stage}", change(setup, zero_stage=stage)


def _precision(setup: Setup) -> Iterator[Lever]:
    if setup.train.precision == "fp32":
        stage = max(1, setup.train.zero_stage)
        also = f" with train.zero_stage {stage}" if stage != setup.train.zero_stage else ""
        yield f"train.precision bf16{also}", change(setup, precision="bf16", zero_stage=stage)


def _accumulation(setup: Setup) -> Iterator[Lever]:
    now = setup.train.accumulation
    for factor in divisors(setup.batch)[1:]:
        text = f"train.accumulation {now * factor} instead of {now}, micro batch {setup.batch // factor} a worker"
        yield text, change(setup, accumulation=now * factor)


# --- time ---------------------------------------------------------------------------------------------------


def faster(setup: Setup, machine: Machine, plan: Estimate) -> list[Advice]:
    """Changes that fit and shorten the step by 5% or more, the best of each kind, strongest first."""
    found = []
    layouts = [
        (f"head.shards {s} ({setup.workers // s} replicas)", change(setup, shards=s)) for s in divisors(setup.workers)
    ]
    kinds: list[list[Lever]] = [layouts, list(_zero(setup)), list(_precision(setup)), list(_lower_stage(setup))]
    kinds += [list(_more_kept(setup)), list(_head_precision(setup)), list(_rate(setup))]
    for levers in kinds:
        tried = []
        for text, changed in levers:
            try:
                tried.append((text, estimate(changed, machine)))
            except JobError:  # the cluster has no rate for that precision
                continue
        better = [item for item in tried if item[1].fits and item[1].step_seconds < GAIN * plan.step_seconds]
        if better:
            text, best = min(better, key=lambda item: item[1].step_seconds)
            found.append(Advice(f"{text}: {_result(best)} instead of {_ms(plan.step_seconds)}", best))
    return sorted(found, key=lambda advice: advice.plan.step_seconds)


def _lower_stage(setup: Setup) -> Iterator[Lever]:
    least = 1 if setup.train.precision == "bf16" else 0
    for stage in range(least, setup.train.zero_stage):
        yield f"train.zero_stage {stage} instead of {setup.train.zero_stage}", change(setup, zero_stage=stage)


def _more_kept(setup: Setup) -> Iterator[Lever]:
    if setup.kept < 1:
        needed = -(-setup.samples * setup.step_rows * 4 // 2**20)
        yield f"head.memory_mb {needed:.0f} (logits are kept, not computed twice)", change(setup, memory_mb=needed)


def _head_precision(setup: Setup) -> Iterator[Lever]:
    if setup.head_precision in (None, "fp32") and setup.head.matmul == "fp32":
        text = "head.matmul bf16 (on a GPU its products are in tf32)"
        yield text, change(setup, matmul="bf16", head_precision=None)


def best_layout(setup: Setup, machine: Machine) -> Estimate:
    """The fastest layout that fits, else the one that needs the least memory."""
    plans = [estimate(change(setup, shards=shards), machine) for shards in divisors(setup.workers)]
    fits = [plan for plan in plans if plan.fits]
    return min(fits, key=lambda p: p.step_seconds) if fits else min(plans, key=lambda p: p.total_memory)


def divisors(number: int) -> list[int]:
    """In ascending order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _result(plan: Estimate) -> str:
    return f"{plan.total_memory / 1e9:.1f} GB, {_ms(plan.step_seconds)} a step"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.{0 if seconds >= 0.1 else 1}f} ms"
