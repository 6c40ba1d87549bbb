"""`labelmill doctor`: what works on this machine, and what to do about what doesn't."""

from __future__ import annotations

import os
import platform as system
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

_TESTED = {
    "torch": "2.13",
    "ray": "2.60",
    "deepspeed": "0.19",
    "mlflow": "3.17",
    "transformers": "5.",
    "pyarrow": "25.",
}


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    state: Literal["ok", "note", "fail"]
    part: str
    text: str
    advice: str = ""


def examine() -> list[Finding]:
    """Everything, in the order a run meets it. Starts a local Ray session and a tiny DeepSpeed engine for real."""
    findings = [_python(), *_packages(), _torch()]
    if findings[-1].state != "fail":
        findings.append(_devices())
    findings += [_memory(), _disk()]
    if not any(f.state == "fail" for f in findings):
        findings += [_ray(), _deepspeed()]
    return [*findings, _mlflow(), _s3(), _compiler(), *_workloads()]


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _python() -> Finding:
    text = f"Python {system.python_version()}, {system.system()} {system.machine()}"
    return Finding("ok", "python", text)


def _packages() -> list[Finding]:
    findings = []
    for name, tested in _TESTED.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            findings.append(
                Finding("fail", name, "not installed", "run `make env`, or pip install -c constraints.txt .")
            )
            continue
        if not found.startswith(tested):
            findings.append(
                Finding("note", name, f"{found}; tested with {tested}x", "constraints.txt has the tested one")
            )
    return findings or [Finding("ok", "packages", ", ".join(f"{name} {version(name)}" for name in _TESTED))]


def _torch() -> Finding:
    try:
        import torch
    except Exception as error:
        return Finding("fail", "torch", f"import fails: {error}", "install the pinned torch again")
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        return Finding("fail", "torch", "no gloo backend", "install a torch build with distributed support")
    nccl = "gloo and nccl" if dist.is_nccl_available() else "gloo"
    return Finding("ok", "torch", f"{torch.__version__}, collectives: {nccl}")


def _devices() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return Finding("ok", "devices", f"{torch.cuda.device_count()} GPU(s): {', '.join(sorted(names))}")
    if shutil.which("nvidia-smi"):
        return Finding(
            "note", "devices", "a GPU driver, but torch sees no GPU", "`make env TORCH=cuda` installs the CUDA build"
        )
    return Finding("ok", "devices", f"{os.cpu_count()} CPUs, no GPU")


def _memory() -> Finding:
    try:
        import psutil
    except ImportError as error:
        return Finding("fail", "memory", _last_line(error), "run `make env`, or pip install -c constraints.txt .")
    free, total = psutil.virtual_memory().available / 2**30, psutil.virtual_memory().total / 2**30
    text = f"{free:.1f} of {total:.1f} GiB free"
    return Finding("ok", "memory", text) if free > 4 else Finding("note", "memory", text, "the demo needs about 8 GiB")


def _disk() -> Finding:
    free = shutil.disk_usage(".").free / 2**30
    shm = shutil.disk_usage("/dev/shm").free / 2**30 if os.path.isdir("/dev/shm") else 0.0
    text = f"{free:.0f} GiB free here, {shm:.1f} GiB in /dev/shm"
    if free < 5:
        return Finding("note", "disk", text, "the demo writes about 3 GiB")
    if shm < 1:
        return Finding("note", "disk", text, "Ray's object store wants 1 GiB of shared memory (docker: --shm-size=2g)")
    return Finding("ok", "disk", text)


def _ray() -> Finding:
    from labelmill.cluster import connect
    from labelmill.job import ClusterConfig

    try:
        with connect(ClusterConfig(cpus_per_worker=0.1, read_cpus=0.1, object_store_mb=100)):
            import ray

            module = ray.get(ray.remote(num_cpus=0.1)(_platform_file).remote())
            cpus = ray.cluster_resources().get("CPU", 0)
    except Exception as error:
        return Finding(
            "fail", "ray", f"a local session failed: {error}", "see the newest session under Ray's temp folder"
        )
    if "labelmill" in module:
        return Finding("fail", "ray", f"`import platform` gives {module} in workers", "delete platform/__init__.py")
    return Finding("ok", "ray", f"a local session with {cpus:g} CPUs ran a task")


def _platform_file() -> str:
    import platform

    return str(platform.__file__)


def _deepspeed() -> Finding:
    try:
        from labelmill.training.local import spawn

        spawn(_tiny_engine, 1)
    except Exception as error:
        return Finding("fail", "deepspeed", _last_line(error), "install the pinned deepspeed again")
    return Finding("ok", "deepspeed", "an engine on ZeRO 1 made a step")


def _tiny_engine(rank: int, world: int) -> int:
    import torch

    from labelmill.training.device import quiet_deepspeed

    quiet_deepspeed()
    import deepspeed

    net = torch.nn.Linear(4, 2)
    config = {
        "train_batch_size": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(net.parameters())
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
    engine.backward(engine(torch.ones(2, 4)).sum())
    engine.step()
    return rank


def _mlflow() -> Finding:
    from labelmill.errors import UserError
    from labelmill.job import TrackingConfig
    from labelmill.tracking.config import Store, check_server, import_mlflow

    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    try:
        import_mlflow()
        store = Store.of(TrackingConfig())
        if store.is_server:
            check_server(store)
    except UserError as error:
        return Finding("fail", "mlflow", str(error), "mend or unset MLFLOW_TRACKING_URI")
    except Exception as error:
        return Finding("fail", "mlflow", f"import fails: {_last_line(error)}", "install the pinned mlflow again")
    if store.is_server:
        return Finding("ok", "mlflow", f"the server at {uri} answers")
    return Finding("ok", "mlflow", f"tracking to {uri}" if uri else "tracking to a local store under the output folder")


def _s3() -> Finding:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    keys = "AWS_ACCESS_KEY_ID" in os.environ or os.path.exists(os.path.expanduser("~/.aws/credentials"))
    if not keys:
        return Finding("ok", "s3", "no credentials set; local disk only")
    try:
        from pyarrow.fs import S3FileSystem

        S3FileSystem()
    except Exception as error:
        return Finding("note", "s3", f"client fails: {error}", "check the AWS environment variables")
    return Finding("ok", "s3", f"credentials found{f', endpoint {endpoint}' if endpoint else ''}")


def _compiler() -> Finding:
    if shutil.which("cc") or shutil.which("gcc"):
        return Finding("ok", "compiler", "found; not needed to run labelmill")
    return Finding("ok", "compiler", "none, and none is needed")


def _workloads() -> list[Finding]:
    from labelmill.workload import find_workload, workload_names

    names, findings = workload_names(), []
    for name in names:
        try:
            find_workload(name)
        except Exception as error:
            findings.append(Finding("fail", "workloads", f"{name}: {error}", "reinstall the package that announces it"))
    if not names:
        return [Finding("fail", "workloads", "none is announced", "install the package: pip install -e .")]
    return findings or [Finding("ok", "workloads", f"{len(names)} found")]
