"""Converted data and downloads that were interrupted, that two processes want at once, or that have no room."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from l2g_meta.data import cache, download
from l2g_meta.data.cache import cached
from l2g_meta.errors import DataError
from l2g_meta.files.locks import claim
from l2g_meta.files.writing import replaced


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("L2G_CACHE", str(tmp_path))
    return tmp_path


def build(folder: Path) -> None:
    assert not any(folder.iterdir())
    for name in cache.FILES:
        (folder / name).write_bytes(b"whole")


KILLED = """
import os, signal, sys
from l2g_meta.data.cache import cached
def build(folder):
    (folder / "images.npy").write_bytes(b"a part")
    os.kill(os.getpid(), int(sys.argv[2]))
cached(sys.argv[1], {}, build)
"""


def kill(name: str, number: int) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, name, str(int(number))], check=False)
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
    for name in (".a.pkl.partial", ".b.pkl.partial"):
        (tmp_path / name).write_bytes(b"a part")
    with pytest.raises(DataError, match="need an https:// address"):
        download.fetch("http://localhost/a.pkl", tmp_path / "a.pkl", max_bytes=9, check=lambda path: None)
    assert [path.name for path in tmp_path.iterdir()] == [".b.pkl.partial"]


def test_a_download_writes_through_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / ".a.pkl.partial").symlink_to(tmp_path / "precious")
    monkeypatch.setattr(download, "_receive", lambda url, file, *_: str(file.write(b"downloaded")))
    path = tmp_path / "root" / "a.pkl"
    download.fetch("https://localhost/a.pkl", path, max_bytes=9, check=lambda path: None)
    assert path.read_bytes() == b"downloaded" and (tmp_path / "precious").read_bytes() == b"precious"


def converted(root: Path, pixel: int = 7) -> tuple[Path, list[int]]:
    """A converted data set of eight images, and a list that counts its conversions."""
    calls: list[int] = []

    def convert(folder: Path) -> None:
        calls.append(1)
        cache.create_images(folder, (8, 4, 4, 3))[:] = pixel
        cache.write_classes(folder, [0, 0, 0, 0, 1, 1, 1, 1], ["a", "b"])

    return cached("data", {}, convert), calls


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def shuffle_labels(folder: Path) -> None:
    np.save(folder / "labels.npy", np.array([0, 1, 0, 1, 0, 1, 0, 1]), allow_pickle=False)


def same_times(folder: Path) -> None:
    """As a disk does that has forgotten what was written."""
    before = (folder / "images.npy").stat()
    flip(folder / "images.npy", 300)
    os.utime(folder / "images.npy", ns=(before.st_atime_ns, before.st_mtime_ns))


CORRUPTIONS: dict[str, Callable[[Path], object]] = {
    "zeros": lambda f: (f / "images.npy").write_bytes(bytes((f / "images.npy").stat().st_size)),
    "zeros at the end": lambda f: (f / "images.npy").write_bytes((f / "images.npy").read_bytes()[:-50] + bytes(50)),
    "a flipped bit": lambda f: flip(f / "images.npy", 200),
    "a flipped bit, the time as it was": same_times,
    "a flipped bit of the header": lambda f: flip(f / "images.npy", 30),
    "cut off": lambda f: os.truncate(f / "images.npy", 200),
    "empty": lambda f: os.truncate(f / "labels.npy", 0),
    "shuffled labels": shuffle_labels,
    "renamed classes": lambda f: (f / "classes.json").write_text('["b", "a"]'),
    "a file less": lambda f: (f / "labels.npy").unlink(),
    "a file that is a folder": lambda f: ((f / "labels.npy").unlink(), (f / "labels.npy").mkdir()),
    "no checksums": lambda f: (f / "checksums.json").unlink(),
    "torn checksums": lambda f: os.truncate(f / "checksums.json", 40),
    "checksums of no file": lambda f: (f / "checksums.json").write_text("{}"),
    "checksums of fewer files": lambda f: (f / "checksums.json").write_text(
        json.dumps({n: v for n, v in json.loads((f / "checksums.json").read_text()).items() if n != "labels.npy"})
    ),
    "checksums without end": lambda f: (f / "checksums.json").write_text("[" * 10**6),
    "other checksums": lambda f: (f / "checksums.json").write_text('{"images.npy": [1], "labels.npy": {}}'),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_what_is_torn_or_changed_is_made_again(root: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    folder, _ = converted(root)
    whole = {name: (folder / name).read_bytes() for name in cache.FILES}
    CORRUPTIONS[name](folder)
    again, calls = converted(root)
    assert again == folder and calls == [1]
    assert {name: (folder / name).read_bytes() for name in cache.FILES} == whole
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"l2g: {folder} is made again: ")
    assert converted(root)[1] == []


def test_files_are_read_again_only_if_they_were_touched(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = converted(root)
    with monkeypatch.context() as context:
        context.setattr(cache, "file_digest", lambda path: pytest.fail(f"reads {path}"))
        assert converted(root)[1] == []
        (folder / ".l2g-0").write_bytes(b"left by a killed process")
        assert converted(root)[1] == []
        context.setattr(cache, "read_text", lambda path: pytest.fail("reads the checksums again"))
        assert converted(root)[1] == []
    moved = (folder / "images.npy").rename(folder / "moved")  # a copy from elsewhere: the same content, another inode
    shutil.copy(moved, folder / "images.npy")
    moved.unlink()
    read: list[str] = []
    whole = cache.file_digest
    with monkeypatch.context() as context:
        context.setattr(cache, "file_digest", lambda path: read.append(path.name) or whole(path))
        assert converted(root)[1] == [] and read == ["images.npy"]
        assert converted(root)[1] == [] and read == ["images.npy"]  # its new stamp is kept


def test_a_later_process_reads_the_stamps_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = converted(root)
    copy = folder.with_name("copy")  # whose inodes and times are others
    shutil.copytree(folder, copy)
    shutil.rmtree(folder)
    copy.rename(folder)
    assert converted(root)[1] == []
    monkeypatch.setattr(cache, "_sound", {})
    monkeypatch.setattr(cache, "file_digest", lambda path: pytest.fail(f"reads {path}"))
    assert converted(root)[1] == []


def test_a_cache_that_cannot_be_written_is_read_once_a_process(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = converted(root)
    os.utime(folder / "images.npy", ns=(0, 0))

    def full(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(cache, "replaced", full)
    assert converted(root)[1] == []
    monkeypatch.setattr(cache, "file_digest", lambda path: pytest.fail(f"reads {path}"))
    assert converted(root)[1] == []


def test_an_empty_variable_does_not_name_the_current_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for name in ("L2G_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
    assert cache.cache_root() == Path("/home/me/.cache/l2g-meta")


def test_all_is_on_the_disk_before_it_has_its_name(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    sync, rename = cache.sync, Path.rename
    monkeypatch.setattr(cache, "sync", lambda path: (synced.append(path.name), sync(path)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (synced.append("renamed"), rename(self, to))[1])
    folder, _ = converted(root)
    at = synced.index("renamed")
    assert {"images.npy", "labels.npy", "classes.json"} < set(synced[:at]) and synced[at + 1 :] == [root.name]


def test_a_folder_s_name_does_not_steer_the_terminal(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flip(cached("a\x1b[2J", {}, build) / "images.npy", 0)
    cached("a\x1b[2J", {}, build)
    (line,) = capfd.readouterr().err.splitlines()
    assert "\x1b" not in line and r"a\x1b[2J" in line


@pytest.mark.parametrize("target", ["", "somewhere"])
def test_new_files_follow_no_link(root: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    (root / "precious").write_bytes(b"precious")
    (root / "file").symlink_to(root / "precious")
    with replaced(root / "file") as file:
        file.write(b"new")
    assert (root / "precious").read_bytes() == b"precious" and (root / "file").read_bytes() == b"new"
    monkeypatch.setattr(secrets, "token_hex", lambda n: "0")
    (root / ".l2g-0").symlink_to(root / (target or "precious"))
    with pytest.raises(OSError, match="File exists"), replaced(root / "file") as file:
        file.write(b"other")
    assert (root / "precious").read_bytes() == b"precious" and not (root / "somewhere").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("make", [os.mkfifo, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_folder_in_the_place_of_one_goes(make, root: Path) -> None:
    folder = cached("data", {}, build)
    shutil.rmtree(folder)
    make(folder)
    assert (cached("data", {}, build) / "images.npy").read_bytes() == b"whole" and not folder.is_symlink()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["images.npy", "checksums.json"])
def test_a_named_pipe_in_the_cache_keeps_nobody_waiting(root: Path, name: str) -> None:
    folder = cached("data", {}, build)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert (cached("data", {}, build) / "images.npy").read_bytes() == b"whole"
