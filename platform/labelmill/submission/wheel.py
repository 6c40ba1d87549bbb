"""A wheel of an installed package, written from the files that Python imports here.

Ray installs the wheels of a job with pip on every node, dependencies included. These name none, so pip fetches nothing:
the cluster's image has the dependencies. The file's name carries a hash of the content, since Ray keeps a wheel by its
name and would run yesterday's code otherwise.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import logging
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from labelmill.errors import JobError

_quiet = logging.getLogger("labelmill.quiet")
MAX_MB = 100
_SKIPPED = {"__pycache__", "node_modules"}
_COMPILED = {".so", ".pyd", ".dylib"}


@dataclass(frozen=True)
class Wheel:
    """A wheel in memory: its file name, its bytes, and what is in it, by path."""

    name: str
    content: bytes
    members: tuple[str, ...]

    def write(self, folder: Path) -> Path:
        """Writes it into a folder."""
        path = folder / self.name
        path.write_bytes(self.content)
        return path


def build(distribution: metadata.Distribution, secrets: Mapping[str, str] | None = None) -> Wheel:
    """The wheel of an installed distribution, with its entry points.

    Left out: hidden files, `__pycache__`, and what the `.rayignore` and `.gitignore` of the package's project exclude.

    Raises JobError for compiled modules, for more than MAX_MB, and for a file that holds the value of one of `secrets`.
    """
    name = distribution.metadata["Name"].replace("-", "_")
    files: dict[str, bytes] = {}
    for package in sorted(_packages(distribution)):
        for path, inside in _files(package):
            content = path.read_bytes()
            _check(name, path, content, secrets or {})
            files[inside] = content
    total = sum(map(len, files.values()))
    if total > MAX_MB << 20:
        largest = sorted(files, key=lambda inside: -len(files[inside]))[:3]
        sizes = ", ".join(f"{inside} ({len(files[inside]) / 2**20:.0f} MiB)" for inside in largest)
        raise JobError(
            f"package {name}: {total / 2**20:.0f} MiB would be sent with the job, at most {MAX_MB} are. Largest: {sizes}. "
            "Name what doesn't belong to the code in a .rayignore beside pyproject.toml."
        )
    return _wheel(name, distribution, files)


def _check(name: str, path: Path, content: bytes, secrets: Mapping[str, str]) -> None:
    if path.suffix in _COMPILED:
        raise JobError(
            f"package {name}: {path.name} is compiled for this machine. Install the package in the cluster's image "
            "instead; a job ships Python files and data only."
        )
    for variable, value in secrets.items():
        # short values such as a region's name are no secrets, and may stand anywhere
        if len(value) >= 8 and value.encode() in content:
            raise JobError(
                f"package {name}: {path} holds the value of {variable}. Take it out of the file, or name the file in a "
                ".rayignore: what is sent with a job is stored on the cluster."
            )


def _packages(distribution: metadata.Distribution) -> set[str]:
    """Names of the distribution's top-level packages and modules."""
    names = {entry.value.partition(":")[0].partition(".")[0] for entry in distribution.entry_points}
    if listed := distribution.read_text("top_level.txt"):
        names |= set(listed.split())
    for file in distribution.files or ():
        top = file.parts[0]
        if file.suffix == ".py" and top != ".." and not top.startswith("__editable__"):
            names.add(top.removesuffix(".py"))
    return {name for name in names if name.isidentifier()}


def _files(package: str) -> Iterator[tuple[Path, str]]:
    """Files of a top-level package or module, with their paths in the wheel."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return
    if not spec.submodule_search_locations:
        if spec.origin:
            yield Path(spec.origin), Path(spec.origin).name
        return
    for place in spec.submodule_search_locations:
        root = Path(place).resolve()
        ignored = _ignored(root)
        for path in sorted(root.rglob("*")):
            inside = path.relative_to(root.parent)
            hidden = any(part.startswith(".") or part in _SKIPPED for part in inside.parts)
            if not hidden and path.is_file() and not any(match(path) for match in ignored):
                yield path, inside.as_posix()


def _ignored(root: Path) -> list[Callable[[Path], bool]]:
    """What the ignore files of a package's folder and of the folders above it, up to its project's, exclude."""
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    found = []
    for folder in (root, *root.parents):
        if folder.name in ("site-packages", "dist-packages"):
            break  # an environment inside a repository is ignored there as a whole
        found += get_excludes_from_ignore_files(folder, include_gitignore=True, logger=_quiet)
        if (folder / "pyproject.toml").is_file() or (folder / ".git").exists():
            break
    return found


def _wheel(name: str, distribution: metadata.Distribution, files: Mapping[str, bytes]) -> Wheel:
    info = f"{name}-{distribution.version}.dist-info"
    described = f"Metadata-Version: 2.1\nName: {distribution.metadata['Name']}\nVersion: {distribution.version}\n"
    extra = {
        f"{info}/METADATA": described.encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: labelmill\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    if points := distribution.read_text("entry_points.txt"):
        extra[f"{info}/entry_points.txt"] = points.encode()
    content = {**files, **extra}
    digest = hashlib.sha256()
    records = []
    for inside, data in content.items():
        one = hashlib.sha256(data).digest()
        digest.update(inside.encode() + b"\0" + one)
        records.append(f"{inside},sha256={base64.urlsafe_b64encode(one).rstrip(b'=').decode()},{len(data)}")
    records.append(f"{info}/RECORD,,")
    content[f"{info}/RECORD"] = "\n".join(records).encode() + b"\n"
    # a build tag begins with a digit
    file_name = f"{name}-{distribution.version}-0{digest.hexdigest()[:16]}-py3-none-any.whl"
    return Wheel(file_name, _zip(content), tuple(content))


def _zip(content: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for inside, data in content.items():
            # equal content, equal bytes
            archive.writestr(zipfile.ZipInfo(inside, (1980, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)
    return file.getvalue()
