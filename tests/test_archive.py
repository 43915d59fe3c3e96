"""A tar file of class folders is data; a member that is anything else than an image below the target is refused."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from l2g_meta.data import archive, images
from l2g_meta.data.sets import folder
from l2g_meta.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("L2G_CACHE", str(tmp_path / "cache"))


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int | None = None) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size or 0
    return info


def write(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for info, content in members:
            if not info.size:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def classes(root: Path, n: int = 6) -> Path:
    for c in range(n):
        (root / f"class {c}").mkdir(parents=True)
        for i in range(2):
            (root / f"class {c}" / f"{i}.png").write_bytes(png(10 * c + i))
    return root


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("top", ["", ".", "pets"])
@pytest.mark.parametrize(("name", "mode"), [("pets.tar", "w"), ("pets.tar.gz", "w:gz"), ("Pets.TGZ", "w:gz")])
def test_reads_as_the_folder_does(tmp_path: Path, top: str, name: str, mode: str) -> None:
    source = classes(tmp_path / "source")
    with tarfile.open(tmp_path / name, mode) as tar:  # type: ignore[call-overload]
        for path in sorted(source.iterdir()):
            tar.add(path, f"{top}/{path.name}" if top else path.name)
        tar.addfile(member("readme.txt"), None)
        tar.addfile(member(f"{top or '.'}/class 0/._0.png"), None)
    for split in ("train", "test"):
        got, want = (folder.load(split, root=r, image_size=6) for r in (tmp_path / name, source))
        assert got.class_names == want.class_names and torch.equal(got.images, want.images)
        assert got.name.lower() == "pets"


def test_splits_and_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes(tmp_path / "source" / "train", 2)
    with tarfile.open(tmp_path / "own.tar", "w") as tar:
        tar.add(tmp_path / "source" / "train", "train")
    data = folder.load("train", root=tmp_path / "own.tar", image_size=6)
    assert data.class_names == ("class 0", "class 1")
    monkeypatch.setattr(archive, "unpack", lambda *_: pytest.fail("unpacked again"))
    assert torch.equal(folder.load("train", root=tmp_path / "own.tar", image_size=6).images, data.images)


def bomb(path: Path, name: str = "a/0.png") -> None:
    """A hundred megabytes of zeros in a tenth of a megabyte."""
    with gzip.open(path, "wb") as file:
        file.write(member(name, size=100 * 2**20).tobuf())
        for _ in range(100):
            file.write(bytes(2**20))
        file.write(bytes(1024))


def long_header(path: Path) -> None:
    """A name of eight megabytes."""
    with gzip.open(path, "wb") as file:
        file.write(member("././@LongLink", tarfile.GNUTYPE_LONGNAME, size=8 * 2**20).tobuf())
        file.write(b"a" * (8 * 2**20))
        file.write(member("a/0.png").tobuf() + bytes(1024))


def sparse(path: Path) -> None:
    """A file of a terabyte with nothing in it, in the PAX format."""
    info = member("a/0.png")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**40)}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info.size = 512
        tar.addfile(info, io.BytesIO(b"0\n".ljust(512, b"\0")))


def zip_file(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("../escaped.png", png(0))


def one(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> Callable[[Path], object]:
    """After two good images, a member of this name and kind."""
    return lambda path: write(
        path, (member("a/0.png"), png(0)), (member("a/1.png"), png(1)), (member(name, kind, link), png(2))
    )


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "absolute name": (one("/tmp/escaped/a/0.png"), "may lead elsewhere"),  # noqa: S108  # a name that is refused
    "absolute name after slashes": (one("//etc/0.png"), "may lead elsewhere"),
    "parent": (one("../escaped/0.png"), "outside the destination"),
    "parent inside": (one("a/../../escaped/0.png"), "outside the destination"),
    "parent that is no image": (one("../escaped.txt"), "outside the destination"),
    "parent folder": (one("../escaped", tarfile.DIRTYPE), "outside the destination"),
    "backslashes": (one("a\\..\\..\\escaped.png"), "may lead elsewhere"),
    "drive": (one("C:/escaped/0.png"), "may lead elsewhere"),
    "line feed in a name": (one("a/0\n.png"), "may lead elsewhere"),
    "symbolic link": (one("a/link.png", tarfile.SYMTYPE, "/etc/passwd"), "absolute"),
    "symbolic link to a folder": (one("a/up", tarfile.SYMTYPE, "../.."), "outside the destination"),
    "hard link": (one("a/link.png", tarfile.LNKTYPE, "a/0.png"), "a link, a device"),
    "hard link outside": (one("a/link.png", tarfile.LNKTYPE, "/etc/passwd"), "absolute"),
    "character device": (one("a/dev.png", tarfile.CHRTYPE), "special file"),
    "block device": (one("a/dev.png", tarfile.BLKTYPE), "special file"),
    "fifo": (one("a/pipe.png", tarfile.FIFOTYPE), "special file"),
    "unknown kind": (one("a/odd.png", b"Z"), "special file"),
    "sparse file": (sparse, "a link, a device"),
    "the same name twice": (one("a/0.png"), "File exists"),
    "the same name by another way": (one("./a/./0.png"), "File exists"),
    "names that differ in case": (one("a/0.PNG"), "is there twice"),
    "classes that differ in case": (one("A/5.png"), "is there twice"),
    "composed and decomposed names": (
        lambda p: write(p, (member("\u00e9/0.png"), png(0)), (member("e\u0301/1.png"), png(0))),
        "is there twice",
    ),
    "a file as a folder": (one("a/0.png/1.png"), "need a tar file"),
    "a folder as a file": (
        lambda p: write(p, (member("t/a.png/0.png"), png(0)), (member("t/a.png"), png(1))),
        "File exists",
    ),
    "an image outside of any class": (one("0.png"), "is not in <class>/"),
    "folders in folders": (one("a/b/c/d/0.png"), "is not in <class>/"),
    "long name": (one("a/" + 300 * "x" + ".png"), "File name too long"),
    "a name that is no text": (lambda p: write(p, (member("a/\udcff.png"), png(0))), "can't decode byte"),
    "huge claimed size": (
        lambda p: p.write_bytes(member("a/0.png", size=2**50).tobuf(tarfile.GNU_FORMAT)),
        "bytes, more",
    ),
    "size beyond the end": (lambda p: p.write_bytes(member("a/0.png", size=2**27).tobuf()), "need a tar file"),
    "bomb": (bomb, "more than 20 times its size"),
    "bomb that is no image": (lambda p: bomb(p, "readme.txt"), "more than 20 times its size"),
    "endless name": (long_header, "header of more than a megabyte"),
    "truncated": (
        lambda p: p.write_bytes(write(p, (member("a/0.png"), 5000 * b"a")).read_bytes()[:3000]),
        "need a tar",
    ),
    "damaged header": (
        lambda p: p.write_bytes(write(p, (member("a/0.png"), png(0))).read_bytes()[:1024] + 512 * b"x"),
        "damaged or cut off",
    ),
    "without an end": (
        lambda p: p.write_bytes(write(p, (member("a/0.png"), png(0))).read_bytes()[:1024]),
        "damaged or cut off",
    ),
    "something after its end": (
        lambda p: p.write_bytes(write(p, (member("a/0.png"), png(0))).read_bytes() + 512 * b"x"),
        "data follow its end",
    ),
    "HTML": (lambda p: p.write_bytes(b"<!DOCTYPE html><html>" + bytes(2000)), "need a tar file"),
    "empty": (lambda p: p.write_bytes(b""), "need a tar file"),
    "a zip file": (zip_file, "need a tar file"),
    "an image": (lambda p: p.write_bytes(png(0)), "need a tar file"),
}
COMPRESSED = ("bomb", "bomb that is no image", "endless name")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(tmp_path: Path, name: str) -> None:
    make, message = HOSTILE[name]
    here = tmp_path / "here"
    here.mkdir()
    path = here / ("some.tar.gz" if name in COMPRESSED else "some.tar")
    make(path)
    before = tree(tmp_path)
    with pytest.raises(DataError, match=message):
        archive.unpacked(path)
    assert tree(tmp_path) == before and not list(tmp_path.rglob("escaped*"))
    assert not (tmp_path / "cache").exists() or os.listdir(tmp_path / "cache") == []
    assert not Path("/tmp/escaped").exists()  # noqa: S108  # the name that was refused


def test_archives_in_archives_stay_closed(tmp_path: Path) -> None:
    bomb(tmp_path / "inner.tar.gz")
    inner = (tmp_path / "inner.tar.gz").read_bytes()
    path = write(tmp_path / "outer.tar", (member("a/0.png"), png(0)), (member("b/inner.tar.gz"), inner))
    out = archive.unpacked(path)
    assert sorted(tree(tmp_path / "cache"))[0].endswith("/a/0.png") and out.name == "a"
    assert tree(out.parent).keys() == {"a/0.png", "checksums.json"} and tree(out) == {"0.png": png(0)}


def test_modes_and_owners_are_not_taken(tmp_path: Path) -> None:
    info = member("a/0.png")
    info.mode, info.uid = 0o6777, 12345
    out = archive.unpacked(write(tmp_path / "some.tar", (info, png(0)), (member("b/0.png"), png(1))))
    status = (out / "a" / "0.png").stat()
    assert not status.st_mode & 0o6111 and status.st_uid == os.getuid()


def test_what_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zip_file(tmp_path / "pets.zip")
    with pytest.raises(
        DataError, match=r"need a folder or an archive \.tar, \.tar\.gz, \.tgz, got .*pets\.zip; unpack"
    ):
        folder.load("train", root=tmp_path / "pets.zip")
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    with pytest.raises(DataError, match="bytes, more than 10"):
        archive.unpacked(write(tmp_path / "some.tar", (member("a/0.png"), png(0))))
