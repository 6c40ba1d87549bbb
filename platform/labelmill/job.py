"""The typed job: what a YAML file means, its errors, its JSON schema.

A job is data, never code. A workload declares a pydantic model that extends `Job`; the sections shared by
every workload (cluster, tracking, registration) are here, those of a component (encoder, head, training)
live beside the component.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from labelmill import masking
from labelmill.errors import JobError, did_you_mean
from labelmill.search_config import SearchConfig
from labelmill.strict import StrictModel as StrictModel

# --- sections every workload shares ---------------------------------------------------------------------

_VARIABLE = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*\*?$")
_ENV = re.compile(r"^\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}$")


def _secret_from_env(value: Any) -> Any:
    """`${env:NAME}` -> the variable's value; a missing variable is an error that names it."""
    if isinstance(value, str) and (match := _ENV.match(value)):
        name = match.group(1)
        if name not in os.environ:
            raise ValueError(f"environment variable {name} is not set")
        masking.know(name)
        return os.environ[name]
    return value


Secret = Annotated[SecretStr, BeforeValidator(_secret_from_env)]
"""A secret: written as `${env:NAME}` in the job file, shown as stars wherever the job is printed or stored."""


class ClusterConfig(StrictModel):
    """Where the run executes and what each worker gets."""

    address: str | None = Field(None, description="Ray address (`auto`, `ray-head:6379`); empty starts a local cluster")
    workers: int = Field(1, ge=1, description="training workers; each holds a shard of every sharded head")
    cpus_per_worker: float = Field(0.75, gt=0, description="CPUs reserved by a worker (a share is fine on one host)")
    gpus_per_worker: float = Field(
        0.0, ge=0, description="GPUs reserved by a worker; above 0 the run uses CUDA and NCCL"
    )
    read_cpus: float = Field(0.25, gt=0, description="CPUs reserved by one read task of the stream")
    min_workers: int | None = Field(
        None, ge=1, description="train on with as few when hosts are lost, and grow again up to `workers`; empty: never"
    )
    max_failures: int = Field(
        3, ge=0, description="restarts after failures without a new checkpoint between them; preemption doesn't count"
    )
    hang_limit_s: float | None = Field(
        600.0,
        gt=0,
        description="seconds without progress in training after which stacks are kept and workers restarted",
    )
    wait_s: float = Field(
        600.0, ge=0, description="seconds to wait for lost resources to come back before the run is given up"
    )
    resize_every_s: float = Field(
        30.0, gt=0, description="seconds between two looks for hosts that training could grow onto"
    )
    checkpoint_to: str | None = Field(
        None, min_length=1, description="folder or s3:// address that every checkpoint is copied to, in the background"
    )
    in_process: bool = Field(
        False, description="train in the calling process, without Ray: for small models and one worker; starts at once"
    )
    object_store_mb: int | None = Field(None, ge=100, description="object store of a cluster that we start, MiB")
    env: tuple[str, ...] = Field(
        (),
        description="environment variables of the calling machine that every process on a cluster gets: names, or "
        "patterns such as AWS_*; their values are stored nowhere",
    )

    @field_validator("env")
    @classmethod
    def _names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not _VARIABLE.match(name):
                raise ValueError(f"{name[:20]!r} is no name of an environment variable; give names, never values")
        return value

    @field_validator("address")
    @classmethod
    def _no_client_mode(cls, value: str | None) -> str | None:
        if value and value.startswith("ray://"):
            raise ValueError("Ray client addresses (ray://) can't host a training run; use the cluster's own address")
        return value

    @model_validator(mode="after")
    def _elastic_range(self) -> ClusterConfig:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is more than workers {self.workers}")
        return self

    @model_validator(mode="after")
    def _alone(self) -> ClusterConfig:
        if self.in_process and (self.workers > 1 or self.address or self.min_workers):
            raise ValueError(
                "in_process trains in the calling process alone: set workers to 1 and leave address and min_workers out"
            )
        return self


class TrackingConfig(StrictModel):
    """The MLflow run and registry. Empty `uri`: `$MLFLOW_TRACKING_URI`, else a local store in the output folder."""

    uri: str | None = Field(None, description="MLflow tracking URI: http(s)://..., sqlite:///...")
    experiment: str = Field("labelmill", min_length=1)
    username: Secret | None = None
    password: Secret | None = None
    token: Secret | None = None
    system_metrics: bool = Field(True, description="log CPU, memory, disk and network of the host")
    interval_s: float = Field(5.0, gt=0, description="seconds between two logs of training metrics")
    timeout_s: float = Field(10.0, gt=0, description="seconds a tracking server may take to answer the first call")
    required: bool = Field(
        True, description="a server that doesn't answer at the start stops the run; false: all is sent once it does"
    )

    @field_validator("uri")
    @classmethod
    def _no_password(cls, value: str | None) -> str | None:
        if value and masking.masked(value) != value:
            raise ValueError(
                "leave the password out of the address: the job is stored with the run. Write tracking.username and "
                "tracking.password as ${env:NAME}, or set MLFLOW_TRACKING_URI instead of this field"
            )
        return value


class Job(StrictModel):
    """What every run needs; a workload's own job type adds its sections."""

    workload: str = Field(description="the method, as `labelmill workloads` lists it")
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the run's folder and MLflow run")
    seed: int = Field(0, ge=0, lt=2**31, description="fixes sample order, sampled classes and initial weights")
    output: Path = Field(Path("runs"), description="folder of run folders and of the local tracking store")
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    register_as: str | None = Field(None, description="name in the model registry; empty registers nothing")
    search: SearchConfig | None = Field(None, description="what `labelmill tune` searches; other commands ignore it")


JobT = TypeVar("JobT", bound=Job)
SectionT = TypeVar("SectionT", bound=BaseModel)


# --- reading and checking -------------------------------------------------------------------------------


def read_job_file(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The job file's mapping with `--set` overrides applied, not yet validated.

    Raises JobError for a missing file, broken YAML, or an override that isn't `path=value`.
    """
    path = Path(path)
    if not path.is_file():
        raise JobError(f"{path}: no such job file. Give a YAML file such as workloads/*/jobs/*.yaml.")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(raw, dict):
        raise JobError(f"{path}: a job is a mapping of fields, but the file holds a {type(raw).__name__}.")
    for override in overrides:
        _apply_override(raw, override)
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise JobError(f"--set {override!r}: write it as path=value, for example --set train.learning_rate=0.01")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise JobError(f"--set {override!r}: the value is not valid YAML: {error}") from error
    set_field(raw, key.strip(), value, f"--set {override!r}")


def set_field(raw: dict[str, Any], path: str, value: Any, source: str) -> None:
    """Sets a dotted field of an unvalidated job, in place. Raises JobError, naming `source`, where it can't be."""
    parts = path.split(".")
    node: Any = raw
    for depth, part in enumerate(parts[:-1]):
        if isinstance(node, list):
            node = node[_index(node, part, source)]
            continue
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict | list):
            raise JobError(f"{source}: {'.'.join(parts[: depth + 1])} is a value, not a section.")
    if isinstance(node, list):
        node[_index(node, parts[-1], source)] = value
    else:
        node[parts[-1]] = value


def _index(items: list[Any], part: str, source: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise JobError(f"{source}: {part!r} is not an index of a list of {len(items)}.")
    return int(part)


def validate_section(raw: Mapping[str, Any], section: type[SectionT], source: str) -> SectionT:
    """Raw mapping -> typed section. Raises JobError that lists every wrong field with what to write instead."""
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(section, item) for item in error.errors(include_url=False)]
        raise JobError(
            f"{source}: " + "\n".join(lines) if len(lines) == 1 else f"{source}:\n  " + "\n  ".join(lines)
        ) from None


def validate_job(raw: Mapping[str, Any], job_type: type[JobT], source: str = "job") -> JobT:
    """Raw mapping -> typed job. Raises JobError that lists every wrong field with what to write instead."""
    job = validate_section(raw, job_type, source)
    if leaked := _first_reference(job.model_dump()):
        raise JobError(
            f"{source}: {leaked}: ${{env:...}} is for secrets only (tracking.username, tracking.password, "
            "tracking.token). Write the value, or give it with --set."
        )
    return job


def resolved(job: Job) -> dict[str, Any]:
    """The job with every default filled in and secrets masked: JSON-ready, stored with the run."""
    return json.loads(job.model_dump_json())


def references(node: Any) -> list[str]:
    """Names of the environment variables that a raw job refers to as `${env:NAME}`."""
    if isinstance(node, str):
        return [match.group(1)] if (match := _ENV.match(node)) else []
    items = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [name for item in items for name in references(item)]


def _first_reference(node: Any, path: str = "") -> str | None:
    if isinstance(node, str):
        return path if "${env:" in node else None
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()
    for key, value in items:
        if found := _first_reference(value, f"{path}.{key}" if path else str(key)):
            return found
    return None


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Every pydantic model named by an annotation, through unions, containers and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is None:
        return []
    return [model for arg in get_args(annotation) for model in models_in(arg)]


def _is_tag(models: list[type[BaseModel]], part: Any) -> bool:
    """Whether a location part is the tag of a discriminated union rather than a field."""
    return any(
        part in get_args(model.model_fields["kind"].annotation) for model in models if "kind" in model.model_fields
    )


def _explain(root: type[BaseModel], item: Any) -> str:
    """One pydantic error as `path: what is wrong, what to write`."""
    models: list[type[BaseModel]] = [root]
    shown: list[str] = []
    for part in item["loc"][:-1] if item["type"] == "extra_forbidden" else item["loc"]:
        known = [model.model_fields[part] for model in models if part in model.model_fields]
        if known:
            shown.append(str(part))
            models = [model for field in known for model in models_in(field.annotation)]
        elif _is_tag(models, part):
            models = [
                m for m in models if "kind" in m.model_fields and part in get_args(m.model_fields["kind"].annotation)
            ]
        else:
            shown.append(str(part))
    path = ".".join(shown)
    if item["type"] == "extra_forbidden":
        name = str(item["loc"][-1])
        fields = {field for model in models for field in model.model_fields}
        return f"{'.'.join([*shown, name])}: unknown field.{did_you_mean(name, fields)}"
    if item["type"] == "missing":
        return f"{path}: this field is required."
    if item["type"] == "union_tag_invalid":
        context = item["ctx"]
        tags = re.findall(r"'([^']*)'", context["expected_tags"])
        return f"{path}.kind: {context['tag']!r} is unknown.{did_you_mean(context['tag'], tags)}"
    if item["type"] == "union_tag_not_found":
        return f"{path}.kind: this field is required; it names the variant."
    message = item["msg"].removeprefix("Value error, ")
    hidden = isinstance(item.get("input"), dict | BaseModel) or any(map(masking.is_secret, shown))
    given = "" if hidden else f" (got {_short(item.get('input'))})"
    return f"{path or 'job'}: {message}{given}"


def _short(value: Any) -> str:
    text = "secret" if isinstance(value, SecretStr) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
