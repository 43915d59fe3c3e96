"""Every kind of file that the package writes, on a disk that fails: one line that names it, and nothing else changed.

``pytest tests/test_faulty_disk.py -m slow -s`` has each write of each command fail in each way, and prints the counts.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from l2g_meta.cli.main import main
from l2g_meta.data import cache, download
from l2g_meta.files import writing
from l2g_meta.paper.plan import EQUAL_TIME, RESULT

STAGES = {"open": errno.EROFS, "write": errno.ENOSPC, "sync": errno.EIO, "rename": errno.EDQUOT}
REAL = writing.replaced


class Full(io.RawIOBase):
    """A file that takes a few bytes and no more."""

    def __init__(self, file: Any) -> None:
        self.file, self.left = file, 20

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def write(self, data: Any) -> int:
        self.left -= len(bytes(data))
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)


def failing(wanted: Callable[[Path], bool], stage: str) -> Callable[[Path], Any]:
    """The one write function, with a fault at the files that are wanted."""

    @contextmanager
    def replaced(path: Path) -> Iterator[Any]:
        fault = OSError(STAGES[stage], os.strerror(STAGES[stage]))
        if not wanted(path):
            with REAL(path) as file:
                yield file
            return
        if stage == "open":
            raise fault
        with REAL(path) as file:
            yield Full(file) if stage == "write" else file
            if stage != "rename":
                raise fault
            os.remove(file.name)  # so that the renaming fails

    return replaced


def use(patch: pytest.MonkeyPatch, replaced: Callable[[Path], Any]) -> None:
    for module in (writing, cache, download):
        patch.setattr(module, "replaced", replaced)


@pytest.fixture(scope="module")
def commands(blob_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    base = tmp_path_factory.mktemp("disk")
    shutil.copytree(blob_run, base / "trained")
    data, photos = str(blob_run.parent / "data"), str(blob_run.parent / "data" / "test")
    small = "--image-size 16 --ways 3 --queries 2 --pairs 1 --iterations 2 --eval-every 2 --eval-episodes 2 --quiet"
    predict = ["predict", "--model", str(base / "trained"), "--support", photos, "--query", photos, "--quiet"]
    return base, {
        "train": ["train", "--data", "folder", "--root", data, "--out", str(base / "run"), "--device", "cpu",
                  "--backbone", "conv4-32", "--average", *small.split()],
        "resume": ["train", "--resume", str(base / "trained"), "--iterations", "3", "--force", "--quiet"],
        "export": ["export", str(base / "trained"), str(base / "model"), "--episodes", "2"],
        "predict": [*predict, "--csv", str(base / "rows.csv"), "--json", str(base / "rows.json")],
        "report": ["report", str(base / "trained"), "-o", str(base / "page.html"), "--episodes", "2"],
        "reproduce": ["reproduce", "table1", "--scale", "smoke", "--rows", "l2g-proto", "proto-time", "--out",
                      str(base / "cells"), "--quiet"],
    }  # fmt: skip


KEPT = ("rows.csv", "rows.json", "page.html")  # which are there before


def written(words: list[str], patch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that a command writes, each once."""
    names: dict[str, None] = {}
    with patch.context() as recording:
        use(recording, failing(lambda path: bool(names.setdefault(path.name)), "open"))
        assert main(words) == 0
    return list(names)


def attack(base: Path, words: list[str], name: str, stage: str, patch: pytest.MonkeyPatch, capfd: Any) -> None:
    """A command of which the writes of one name fail."""
    for old in ("run", "model", "cells", *["cache"] * (name == cache.CHECKSUMS)):
        shutil.rmtree(base / old, ignore_errors=True)
    for old in KEPT:
        (base / old).write_text("as it was")
    before = {path: path.read_bytes() for path in (base / "trained").iterdir()}
    capfd.readouterr()
    with patch.context() as faults:
        use(faults, failing(lambda path: path.name == name, stage))
        code = main(words)
    error = capfd.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("l2g: ") and "warning" not in line]
    assert code in (1, 2) and "Traceback" not in error, error
    assert any(name in line or str(base / "cache") in line for line in lines), error
    assert not [path for path in base.rglob(".*l2g-*")] and not (base / "model").exists()
    assert name not in KEPT or (base / name).read_text() == "as it was"
    sound = {path: path.read_bytes() for path in before if path.suffix == ".safetensors" and path.exists()}
    assert words[0] == "train" or sound == {path: before[path] for path in sound}


QUICK = [("train", "curve.png", "rename"), ("train", "config.json", "open"), ("train", "checksums.json", "sync"),
         ("export", "model.json", "write"), ("export", "model.safetensors", "sync"), ("predict", "rows.csv", "write"),
         ("predict", "rows.json", "rename"), ("report", "page.html", "open")]  # fmt: skip


@pytest.fixture
def place(commands: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, list[str]]]:
    monkeypatch.setenv("L2G_CACHE", str(commands[0] / "cache"))
    return commands


@pytest.mark.parametrize(("command", "name", "stage"), QUICK)
def test_one_of_each(command: str, name: str, stage: str, place: Any, monkeypatch: Any, capfd: Any) -> None:
    attack(place[0], place[1][command], name, stage, monkeypatch, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "resume", "export", "predict", "report", "reproduce"])
def test_all(command: str, place: Any, monkeypatch: Any, capfd: Any) -> None:
    base, words = place[0], place[1][command]
    shutil.copytree(base / "trained", base / "sound")
    names = written(words, monkeypatch)
    if command == "reproduce":  # what its runs write is what "train" writes
        names = [name for name in names if name.startswith("table") or name in (RESULT, EQUAL_TIME)]
    for name in names:
        for stage in STAGES:
            shutil.rmtree(base / "trained")
            shutil.copytree(base / "sound", base / "trained")
            attack(base, words, name, stage, monkeypatch, capfd)
    shutil.rmtree(base / "trained")
    (base / "sound").rename(base / "trained")
    with capfd.disabled():
        print(f"\n{command}: {len(names)} files ({', '.join(names)}), {len(names) * len(STAGES)} faults")
