"""What the README files tell people to type is real: commands, options, targets, methods, job files.

Blocks opened with ```bash run are executed, in order, in a folder of their own.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main

from labelmill.cli import app
from labelmill.workload import find_workload, load_job

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^ *```(?P<info>[^\n`]*)\n(?P<body>.*?)^ *```\s*$", re.MULTILINE | re.DOTALL)
_HEREDOC = re.compile(r"<<-?\s*(['\"]?)(?P<end>\w+)\1")
_INLINE = re.compile(r"`((?:labelmill|make) [^`\n]+)`")
_ASSIGNMENT = re.compile(r"^([A-Za-z_]\w*)=(.*)$", re.DOTALL)
_SEPARATORS = {"&&", "||", "|", ";", "&", "(", ")"}


def readmes() -> list[str]:
    """Every README.md of the repository, by its path in it."""
    found = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*README.md"]
    listed = subprocess.run(found, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(path for path in listed if (ROOT / path).is_file())


@dataclass(frozen=True)
class Block:
    """A fenced block of a README: its language, whether it is to be executed, its text."""

    language: str
    executed: bool
    body: str


def blocks(markdown: str) -> list[Block]:
    found = []
    for match in _FENCE.finditer(markdown):
        language, *flags = match["info"].split() or [""]
        found.append(Block(language, "run" in flags, match["body"]))
    return found


def lines_of(body: str) -> Iterator[tuple[str, list[str]]]:
    """The shell lines of a block, continuations joined, each with the lines of its here-document."""
    waiting = iter(body.splitlines())
    for line in waiting:
        while line.endswith("\\"):
            line = line[:-1] + next(waiting, "")
        document: list[str] = []
        if heredoc := _HEREDOC.search(line):
            for row in waiting:
                if row.strip() == heredoc["end"]:
                    break
                document.append(row)
        yield line.strip().removeprefix("$ "), document


def commands_of(line: str) -> list[list[str]]:
    """The simple commands of a shell line as words; comments and leading assignments are left out."""
    line = re.sub(r"<([A-Z][A-Z_-]*)>", r"\1", line)  # a placeholder, not a redirection
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, "#"
    found: list[list[str]] = [[]]
    for word in lexer:
        if word in _SEPARATORS:
            found.append([])
        elif found[-1] or not _ASSIGNMENT.match(word):
            found[-1].append(word)
    return [words for words in found if words]


def check_labelmill(words: list[str], folders: list[Path], mention: bool = False) -> None:
    """Parses a call with the command line's own parser, without running it, and looks at what it names.

    A mention in running text may leave out arguments. Raises ValueError.
    """
    command: Any = typer.main.get_command(app)
    path, rest = ["labelmill"], words[1:]
    while hasattr(command, "commands"):
        if not rest or rest[0] == "--help":
            return
        name, *rest = rest
        if name not in command.commands:
            raise ValueError(f"{' '.join(path)} has no command {name!r}")
        command = command.commands[name]
        path.append(name)
    if "--help" in rest:
        return
    try:
        given = command.make_context(" ".join(path), list(rest)).params
    except Exception as error:  # the parser's own classes
        if mention and type(error).__name__ == "MissingParameter":
            return
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        raise ValueError(message) from error
    method = given.get("workload") or given.get("name")
    if path[-1] in ("schema", "workloads") and method and not (mention and method.isupper()):
        find_workload(method)
    if path[-1] in ("run", "validate", "tune") and not (mention and str(given["job"]).isupper()):
        places = [folder / given["job"] for folder in folders]
        load_job(next((p for p in places if p.is_file()), given["job"]), given["overrides"] or [])


def check_make(words: list[str]) -> None:
    """Targets and variables of a `make` line are in the Makefile or the scripts behind it. Raises ValueError."""
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([A-Za-z0-9_-]+):", makefile, re.MULTILINE))
    scripts = makefile + "".join(path.read_text() for path in (ROOT / "ci").glob("*.sh"))
    for word in words[1:]:
        if assignment := _ASSIGNMENT.match(word):
            if not re.search(rf"\b{assignment[1]}\b", scripts):
                raise ValueError(f"no script reads the variable {assignment[1]}")
        elif not word.startswith("-") and word not in targets:
            raise ValueError(f"make has no target {word!r}; there are {sorted(targets)}")


def problems(text: str, folder: Path) -> list[str]:
    """What is wrong with the commands of a README; files that its here-documents write are put into `folder`."""
    found = []
    calls: list[tuple[str, list[str], bool]] = []
    for block in blocks(text):
        if block.language != "bash":
            continue
        for line, document in lines_of(block.body):
            if document and (target := re.search(r"(?<!<)>\s*([\w./-]+)", line)):
                path = folder / target[1]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("\n".join(document) + "\n")
            calls += [(line, words, False) for words in commands_of(line)]
    prose = _FENCE.sub("", text)
    for line in _INLINE.findall(prose):
        calls += [(line, words, True) for words in commands_of(line)]
    for line, words, mention in calls:
        try:
            if words[0] == "labelmill":
                check_labelmill(words, [folder, ROOT], mention)
            elif words[0] == "make":
                check_make(words)
            elif words[0].startswith("ci/") and not os.access(ROOT / words[0], os.X_OK):
                raise ValueError("no such script")
        except Exception as error:
            found.append(f"{line}\n    {error}")
    return found


@pytest.mark.parametrize("readme", readmes())
def test_every_command_is_real(readme: str, tmp_path: Path) -> None:
    found = problems((ROOT / readme).read_text(encoding="utf-8"), tmp_path)
    assert not found, f"{readme}:\n" + "\n".join(found)


@pytest.mark.parametrize("readme", readmes())
def test_blocks_marked_run_do_run(readme: str, tmp_path: Path) -> None:
    script = "".join(b.body for b in blocks((ROOT / readme).read_text(encoding="utf-8")) if b.executed)
    if not script:
        return
    for name in (".venv", "workloads", "platform"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-x", "-c", script],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, f"{readme}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_wrong_commands_are_found(tmp_path: Path) -> None:
    text = """
Say `labelmill models shw`, `labelmill run JOB`, `labelmill run` or `make nothing`.

```bash run
cat > job.yaml <<'YAML'
workload: discrimination.partial_fc
labelmill not a command
YAML
labelmill validate --oops job.yaml  # comment
labelmill data import idx --images a \\
    --out b && labelmill data nothing
X=1 labelmill schema discrimination.nothing | head
labelmill run nowhere.yaml
make demo TORCH=cpu COLOUR=red
```

```python
labelmill(not, shell)
```
"""
    found = problems(text, tmp_path)
    wanted = (
        "--oops",
        "data has no command 'nothing'",
        "discrimination.nothing",
        "nowhere.yaml: no such job file",
        "COLOUR",
        "models has no command 'shw'",
        "no target 'nothing'",
    )
    assert len(found) == len(wanted), found
    for problem, part in zip(found, wanted, strict=True):
        assert part in problem
    assert (tmp_path / "job.yaml").read_text().startswith("workload: discrimination.partial_fc\n")
