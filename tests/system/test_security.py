"""What must not happen: secrets that are kept or shown, data that runs, files that lead elsewhere, open doors.

What a job on a cluster does with secrets is in test_submit.py.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
import yaml

from labelmill.encoders import build_encoder
from labelmill.errors import DataError, JobError
from labelmill.heads.index import build_index, load_index
from labelmill.heads.storage import save_range
from labelmill.job import Job, TrackingConfig, read_job_file, resolved, validate_job, validate_section
from labelmill.masking import masked
from labelmill.submission import wheel
from labelmill.tracking.model import load_model, note_index, write_model
from labelmill.tracking.report import Report
from labelmill.workload import load_job

ROOT = Path(__file__).resolve().parents[2]
PLANTED = "planted-6f1e2d3c4b5a"


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


# --- secrets ------------------------------------------------------------------------------------------------


def test_secrets_of_a_job_are_stars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED", PLANTED)
    section = {"username": "me", "password": "${env:PLANTED}"}
    job = validate_job({"workload": "w", "name": "n", "tracking": section}, Job)
    assert job.tracking.password is not None
    assert job.tracking.password.get_secret_value() == PLANTED
    assert PLANTED not in json.dumps(resolved(job)) + repr(job) + str(job)

    for wrong in ({"password": 12345678}, {"token": [PLANTED]}, {"uri": f"https://me:{PLANTED}@host"}):
        with pytest.raises(JobError) as caught:
            validate_section(wrong, TrackingConfig, "job")
        assert "12345678" not in str(caught.value)
        assert PLANTED not in str(caught.value).replace(f"https://me:{PLANTED}@host", "")
    with pytest.raises(JobError, match=r"tracking.username"):
        validate_section({"uri": "https://me:hunter2@host"}, TrackingConfig, "job")


def test_texts_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abc/def+123456")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://mlflow:s3cr3t-w0rd@db:5432/x")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsehood")
    text = "key abc/def+123456, s3cr3t-w0rd, http://u:other@host/x, falsehood, s3://bucket/a@b, a@b.c"
    assert masked(text) == "key ***, ***, http://u:***@host/x, falsehood, s3://bucket/a@b, a@b.c"


METHOD = '''"""Fails with what it knows."""
import os
from labelmill.job import Job
from labelmill.workload import workload

@workload("mine.telling", Job)
def telling(job, run):
    raise RuntimeError("the server said no to " + job.tracking.password.get_secret_value())
'''


def test_a_run_that_fails_keeps_no_secret(tmp_path: Path) -> None:
    info = tmp_path / "mine" / "mine-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[labelmill.workloads]\nmine.telling = telling_method\n")
    (tmp_path / "mine" / "telling_method.py").write_text(METHOD)
    tracking = {"username": "me", "password": "${env:HUSH}", "system_metrics": False}
    job = {"workload": "mine.telling", "name": "t", "output": str(tmp_path / "out"), "tracking": tracking}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    env = os.environ | {"PYTHONPATH": f"{tmp_path / 'mine'}:{os.environ.get('PYTHONPATH', '')}", "HUSH": PLANTED}
    env |= {"TMPDIR": str(tmp_path), "PYTHONPATH": f"{tmp_path / 'mine'}:{ROOT / 'platform'}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "labelmill.cli", "run", "job.yaml"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "RuntimeError: the server said no to ***" in done.stderr
    assert PLANTED not in done.stdout + done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert tmp_path / "out" / "mlflow.db" in written
    assert "said no to ***" in (tmp_path / "out" / "t" / "run.log").read_text()
    assert not [path for path in written if PLANTED.encode() in path.read_bytes()]


def test_an_archive_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden and ignored files stay here; a file with the value of a variable that is handed over is refused."""
    from importlib import metadata

    package = tmp_path / "packaged"
    package.mkdir()
    for name in ("__init__.py", ".env", "keys.pem", "large.bin", "notes.txt"):
        (package / name).write_text(PLANTED if name in (".env", "keys.pem") else "")
    (tmp_path / ".rayignore").write_text("*.bin\nkeys.*\n")
    (tmp_path / "pyproject.toml").write_text("")
    info = tmp_path / "packaged-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: packaged\nVersion: 1\nRequires-Dist: torch\n")
    (info / "top_level.txt").write_text("packaged\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    built = wheel.build(metadata.distribution("packaged"), {"HUSH": PLANTED})
    assert {name for name in built.members if "dist-info" not in name} == {"packaged/__init__.py", "packaged/notes.txt"}
    assert PLANTED.encode() not in built.content
    assert built.content == wheel.build(metadata.distribution("packaged")).content, "equal files, equal archive"
    with __import__("zipfile").ZipFile(built.write(tmp_path)) as archive:
        assert "Requires-Dist" not in archive.read("packaged-1.dist-info/METADATA").decode(), "pip fetches nothing"

    (package / "notes.txt").write_text(f"key = '{PLANTED}'")
    with pytest.raises(JobError, match=r"notes.txt holds the value of HUSH"):
        wheel.build(metadata.distribution("packaged"), {"HUSH": PLANTED})
    (package / "notes.txt").unlink()
    (package / "fast.so").write_bytes(b"")
    with pytest.raises(JobError, match=r"fast.so is compiled for this machine"):
        wheel.build(metadata.distribution("packaged"))


# --- code that comes as data -------------------------------------------------------------------------------


def test_job_files_run_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for text in (
        f"workload: !!python/object/apply:os.system ['touch {mark}']",
        f"workload: !!python/object/apply:subprocess.check_output [[touch, {mark}]]",
        f"!!python/object/new:os.system ['touch {mark}']",
        "workload: !!python/name:os.system",
    ):
        path = tmp_path / "job.yaml"
        path.write_text(text)
        with pytest.raises(JobError, match="could not determine a constructor"):
            read_job_file(path)
    path.write_text("workload: os\nname: n\n")
    with pytest.raises(JobError, match="--set"):
        read_job_file(path, [f"name=!!python/object/apply:os.system ['touch {mark}']"])
    for name in ("os", "os:system", "labelmill.cli", "../job"):
        with pytest.raises(JobError, match="is not known"):
            load_job(path, [f"workload={name}"])
    with pytest.raises(JobError, match="for secrets only"):
        validate_job({"workload": "w", "name": "n", "register_as": "${env:HOME}"}, Job)
    with pytest.raises(JobError, match="names, never values"):
        validate_job({"workload": "w", "name": "n", "cluster": {"env": ["A=b"]}}, Job)
    assert not mark.exists()


def _called(node: ast.Call) -> str:
    parts, function = [], node.func
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    return ".".join([function.id if isinstance(function, ast.Name) else "", *reversed(parts)])


# call -> the argument that makes it safe; None: there is none
_RULES: dict[str, tuple[str, Any] | None] = {
    "eval": None,
    "exec": None,
    "compile": None,
    "os.system": None,
    "os.popen": None,
    "pickle.load": None,
    "pickle.loads": None,
    "cloudpickle.load": None,
    "cloudpickle.loads": None,
    "joblib.load": None,
    "marshal.loads": None,
    "yaml.load": None,
    "yaml.unsafe_load": None,
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
}


def test_the_source_has_no_unsafe_loader() -> None:
    found = []
    for path in [*(ROOT / "platform").rglob("*.py"), *(ROOT / "workloads").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = _called(node)
            given = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
            rule = _RULES.get(name, ("", ""))
            if rule is None or (rule[0] and given.get(rule[0]) is not rule[1]):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
            if name.endswith((".extractall", ".extract")) or given.get("shell") or given.get("trust_remote_code"):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert not found


def test_planted_pickles_stay_asleep(tmp_path: Path) -> None:
    from labelmill.data.records import decode_npy
    from labelmill.heads import insightface

    mark = tmp_path / "mark"
    file = io.BytesIO()
    np.save(file, np.array([Bomb(mark)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        decode_npy(file.getvalue())
    torch.save({"weight": Bomb(mark)}, tmp_path / "rank_0_softmax_weight.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb(mark)))
    for name in ("rank_0_softmax_weight.pt", "plain.pt"):
        with pytest.raises(DataError):
            insightface.read_weight(tmp_path / name)
    assert not mark.exists()


# --- files that aren't what was written, or lead elsewhere -------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    torch.manual_seed(0)
    encoder = build_encoder({"kind": "char_ngrams", "dim": 8, "buckets": 64, "hidden": 0})
    words = ["red", "green", "blue"]
    rows_CD = F.normalize(encoder.embed(words), dim=1)
    for start, stop in ((0, 2), (2, 3)):
        save_range(folder, "rows", {"rows": rows_CD[start:stop]}, start, stop, {})
    write_model(folder, encoder=encoder, input_kind="text", classes=pa.table({"name": words}))
    return folder


@pytest.mark.parametrize("name", ["encoder.safetensors", "classes.arrow", "rows-0-2.safetensors"])
def test_a_changed_file_of_a_model_is_refused(model: Path, name: str) -> None:
    assert load_model(model).predict(["red"], 1)["class"].to_pylist() == ["red"]
    (path,) = model.glob(name.replace("0-2", "*0-*2"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path.name}: its content isn't what was written"):
        load_model(model).predict(["red"], 1)


def test_an_index_is_the_one_that_its_model_names(model: Path) -> None:
    pytest.importorskip("faiss")
    build_index(model)
    note_index(model)
    load_index(model)
    info = json.loads((model / "index.json").read_text())
    other = (model / "index.faiss").read_bytes()[:-1] + b"x"
    (model / "index.faiss").write_bytes(other)
    # whoever changes the index can change its own description, too
    (model / "index.json").write_text(json.dumps(info | {"sha256": hashlib.sha256(other).hexdigest()}))
    with pytest.raises(DataError, match=r"index.faiss: isn't the index that .*model.json names"):
        load_index(model)


def test_a_model_names_only_its_own_files(model: Path, tmp_path: Path) -> None:
    spec = json.loads((model / "model.json").read_text())
    for changed in (
        {"shards": [spec["shards"][0] | {"file": "../model/rows.safetensors"}]},
        {"files": {"../secret.txt": "0" * 64}},
        {"files": {"/etc/passwd": "0" * 64}},
    ):
        (tmp_path / "secret.txt").write_text("x")
        (model / "model.json").write_text(json.dumps(spec | changed))
        with pytest.raises(DataError, match=r"isn't in the model's folder|should match pattern"):
            load_model(model)


def test_a_report_names_only_its_own_files(tmp_path: Path) -> None:
    Report("r", {}).save(tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    for path in ("../../secret.png", "/etc/passwd"):
        (tmp_path / "report.json").write_text(json.dumps(content | {"figures": {"x": path}}))
        with pytest.raises(DataError, match="leads out of the report's folder"):
            Report.load(tmp_path)


def test_data_sets_lead_nowhere(make_text_data: Callable[..., object], tmp_path: Path) -> None:
    from labelmill.data.manifest import load_manifest

    make_text_data(20, 10)
    folder = tmp_path / "texts"
    content = json.loads((folder / "manifest.json").read_text())
    load_manifest(folder)
    for field, path in (("path", "../elsewhere/a.tar"), ("path", "a/../../b.tar"), ("index", "../../b.arrow")):
        shards = [content["shards"][0] | {field: path}]
        (folder / "manifest.json").write_text(json.dumps(content | {"shards": shards}))
        with pytest.raises(DataError, match="leads out of the data set's folder"):
            load_manifest(folder)
    # bytes that aren't the manifest's
    (folder / "manifest.json").write_text(json.dumps(content))
    shard = folder / content["shards"][0]["path"]
    damaged = bytearray(shard.read_bytes())
    damaged[600] ^= 1
    shard.write_bytes(damaged)
    done = subprocess.run(
        [sys.executable, "-m", "labelmill.cli", "data", "verify", str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert shard.name in done.stdout + done.stderr


def test_members_of_a_tar_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "evil.tar", "w") as tar:
        for name in ("../../escaped", "/tmp/labelmill-escaped", "plain"):
            for ext, data in (("txt", b"text"), ("cls", b"0")):
                member = tarfile.TarInfo(f"{name}.{ext}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    before = {path for path in tmp_path.parent.rglob("*") if tmp_path not in path.parents}
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "labelmill.cli", "data", "import", "webdataset", "in/evil.tar", "--out", "out"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert {path for path in tmp_path.parent.rglob("*") if tmp_path not in path.parents} == before
    assert not Path("/tmp/labelmill-escaped.txt").exists()
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} <= {tmp_path / "in", tmp_path / "out"}
    assert b"root:" not in b"".join(path.read_bytes() for path in (tmp_path / "out").glob("*"))


# --- open doors --------------------------------------------------------------------------------------------


def test_a_cluster_of_our_own_is_ours_alone(ray_session: None) -> None:
    """Ray listens on all interfaces, so it asks for a token that only this process and its children have."""
    import ray

    address = ray.get_runtime_context().gcs_address
    script = f"import ray; ray.init(address={address!r}); print('in')"
    answers = {}
    raylet: Any = ray._raylet
    token = raylet.AuthenticationTokenLoader.instance().get_raw_token(ignore_auth_mode=True)
    assert token not in json.dumps(dict(os.environ)), "other programs don't inherit it"
    for name, change in (
        ("ours", {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}),
        ("without a token", {"RAY_AUTH_MODE": "disabled"}),
        ("with another", {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}),
    ):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"RAY_NUM_REDIS_GET_RETRIES": "1"} | change,  # no second try
            capture_output=True,
            text=True,
            timeout=90,
        )
        answers[name] = done.stdout.strip()
    assert answers == {"ours": "in", "without a token": "", "with another": ""}
    assert not ray._private.worker.global_worker.node.webui_url, "no dashboard"
