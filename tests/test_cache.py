"""Converted data and downloads that were interrupted, that two processes want at once, or that have no room."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from l2g_meta.data import cache, download
from l2g_meta.data.cache import cached
from l2g_meta.errors import DataError
from l2g_meta.files.locks import claim


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("L2G_CACHE", str(tmp_path))
    return tmp_path


def build(folder: Path) -> None:
    assert not any(folder.iterdir())
    (folder / "images.npy").write_bytes(b"whole")


KILLED = """
import os, signal, sys
from l2g_meta.data.cache import cached
def build(folder):
    (folder / "images.npy").write_bytes(b"a part")
    os.kill(os.getpid(), int(sys.argv[2]))
cached(sys.argv[1], {}, build)
"""


def kill(name: str, number: int) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, name, str(number)], check=False)
    assert done.returncode == -number


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_conversion_is_made_again(root: Path, number: int) -> None:
    kill("data", number)
    assert [path.read_bytes() for path in root.glob(".data-*.partial/*")] == [b"a part"]
    folder = cached("data", {}, build)
    assert (folder / "images.npy").read_bytes() == b"whole"
    assert not list(root.glob("*.partial"))


def test_what_killed_conversions_of_other_data_left_goes_too(root: Path) -> None:
    kill("dead", signal.SIGKILL)
    (held := root / ".alive-0.partial").mkdir()
    with claim(root / ".alive-0.lock") as ours:
        assert ours
        cached("data", {}, build)
        assert [path.name for path in root.glob("*.partial")] == [held.name]
    cached("data", {"another": 1}, build)
    assert not list(root.glob("*.partial"))


def test_two_at_once_convert_once(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    begun, go = threading.Event(), threading.Event()
    calls, found = [], []

    def slow(folder: Path) -> None:
        calls.append(folder)
        begun.set()
        assert go.wait(30)
        build(folder)

    threads = [threading.Thread(target=lambda: found.append(cached("data", {}, slow))) for _ in range(2)]
    threads[0].start()
    assert begun.wait(30)
    threads[1].start()
    while "waits for another process that converts data" not in capfd.readouterr().err:
        assert threads[1].is_alive()
    go.set()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and found[0] == found[1] and (found[0] / "images.npy").read_bytes() == b"whole"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_room(root: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """The room is taken before the first image is written: a full disk would end a process that writes to a map."""

    def full(*args: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", full)

    def convert(folder: Path) -> None:
        images = cache.create_images(folder, (1, 2, 2, 3))
        cache.reserve(folder)
        images[:] = 1

    with pytest.raises(DataError, match="need room for converted data, .* is full; make some, or set L2G_CACHE"):
        cached("data", {}, convert)
    assert not list(root.iterdir())


def test_other_errors_keep_their_kind(root: Path) -> None:
    def unreadable(folder: Path) -> None:
        raise FileNotFoundError(errno.ENOENT, "gone", "image.jpg")

    with pytest.raises(FileNotFoundError, match=r"image\.jpg"):
        cached("data", {}, unreadable)
    assert not list(root.glob("*.partial"))


def test_parts_of_killed_downloads_go(tmp_path: Path) -> None:
    for name in (".a.pkl.1.part", ".a.pkl.2.part", ".b.pkl.1.part"):
        (tmp_path / name).write_bytes(b"a part")
    with claim(tmp_path / ".a.pkl.2.part"):  # by a process that lives
        with pytest.raises(DataError, match="need an https:// address"):
            download.fetch("http://localhost/a.pkl", tmp_path / "a.pkl", max_bytes=9, check=lambda path: None)
        assert sorted(path.name for path in tmp_path.iterdir()) == [".a.pkl.2.part", ".b.pkl.1.part"]
