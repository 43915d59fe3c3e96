"""An image file that is too large, of another kind than its name says, or damaged ends in our own error."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from l2g_meta import load
from l2g_meta.data import images
from l2g_meta.errors import DataError

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def saved(file_format: str, image: Image.Image = NOISE, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, pixels: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rest = b"".join(chunks) + chunk(b"IDAT", pixels or zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + rest


def jpeg(width: int, height: int) -> bytes:
    """A JPEG of 8 × 8 pixels that says it has others."""
    data = saved("JPEG")
    start = data.index(b"\xff\xc0")
    return data[: start + 5] + struct.pack(">HH", height, width) + data[start + 9 :]


def many_scans() -> bytes:
    """A JPEG whose last scan comes again and again: a megabyte of them would take an hour to decode."""
    data = saved("JPEG", progressive=True)
    return data[:-2] + 100 * data[data.rindex(b"\xff\xda") : -2] + data[-2:]


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("../../escaped.txt", "x")
    return buffer.getvalue()


HOSTILE: dict[str, tuple[str, Callable[[], bytes]]] = {
    "PNG bomb": (".png", lambda: png(60_000, 60_000)),
    "PNG a little too large": (".png", lambda: png(50_000_001, 1)),
    "PNG of the largest size there is": (".png", lambda: png(2**31 - 1, 2**31 - 1)),
    "PNG without pixels": (".png", lambda: png(0, 5)),
    "PNG with a bomb as its profile": (
        ".png",
        lambda: png(8, 8, chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(2**27)))),
    ),
    "PNG with text bombs": (
        ".png",
        lambda: png(8, 8, *(chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(2**20))) for _ in range(70))),
    ),
    "PNG with too few pixels": (".png", lambda: png(100, 100)),
    "PNG that claims a huge chunk": (".png", lambda: saved("PNG")[:33] + b"\xff\xff\xff\xffIDAT"),
    "PNG with a false checksum": (".png", lambda: saved("PNG")[:29] + b"xxxx" + saved("PNG")[33:]),
    "PNG of 16 bits": (".png", lambda: saved("PNG", Image.fromarray(np.full((9, 9), 40_000, np.uint16)))),
    "JPEG bomb": (".jpg", lambda: jpeg(65_000, 65_000)),
    "JPEG a little too large": (".jpg", lambda: jpeg(10_000, 5_001)),
    "JPEG of many scans": (".jpg", many_scans),
    "JPEG cut off": (".jpg", lambda: saved("JPEG")[:-200]),
    "JPEG without a picture": (".jpg", lambda: b"\xff\xd8\xff\xd9"),
    "GIF": (".png", lambda: saved("GIF", NOISE.convert("P"))),
    "GIF with a script in it": (".jpg", lambda: b"GIF89a/*" + saved("GIF", NOISE.convert("P"))[8:] + b"*/=alert(1)"),
    "BMP": (".jpg", lambda: saved("BMP")),
    "TIFF": (".png", lambda: saved("TIFF")),
    "WebP header": (".png", lambda: b"RIFF\x24\0\0\0WEBPVP8 " + bytes(40)),
    "ICO": (".png", lambda: saved("ICO", NOISE.resize((16, 16)))),
    "EPS, which Ghostscript would run": (".jpg", lambda: saved("EPS")),
    "PDF": (".jpg", lambda: saved("PDF")),
    "SVG": (".png", lambda: b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>"),
    "HTML": (".jpg", lambda: b"<!DOCTYPE html><html><body>429 Too Many Requests"),
    "pickle": (".png", lambda: pickle.dumps([1, 2])),
    "zip": (".png", zipped),
    "zip before an image": (".png", lambda: zipped() + saved("PNG")),
    "program": (".jpg", lambda: b"#!/bin/sh\ntouch escaped.txt\n" + saved("JPEG")),
    "nothing": (".png", lambda: b""),
}


REMEDIES = {  # of what is no damage
    "PNG of 16 bits": "convert it to 8 bits",
    "PNG a little too large": "make it smaller",
    "JPEG a little too large": "make it smaller",
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # the error follows
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(tmp_path: Path, name: str) -> None:
    suffix, make = HOSTILE[name]
    path = tmp_path / f"some{suffix}"
    path.write_bytes(make())
    for upright in (False, True):
        remedy = REMEDIES.get(name, "restore or remove it")
        with pytest.raises(DataError, match=rf"need a readable 8-bit JPEG or PNG, got .*some\{suffix}.*; {remedy}"):
            images.read_image(str(path), upright=upright)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_what_follows_an_image_is_not_looked_at(tmp_path: Path) -> None:
    """Phones append films and tables to photos, so that this is no error."""
    for suffix, file_format in ((".jpg", "JPEG"), (".png", "PNG")):
        path = tmp_path / f"some{suffix}"
        path.write_bytes(saved(file_format) + zipped() + 200 * b"\xff\xda")
        assert images.read_image(str(path)).size == (8, 8)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_name_may_say_the_other_of_both_formats(tmp_path: Path) -> None:
    for suffix, file_format in ((".png", "JPEG"), (".jpg", "PNG")):
        path = tmp_path / f"some{suffix}"
        path.write_bytes(saved(file_format))
        assert images.read_image(str(path)).size == (8, 8)


def test_more_data_than_pixels_is_not_unpacked() -> None:
    resource = pytest.importorskip("resource", reason="this system does not tell how much memory was used")
    bomb = png(8, 8, pixels=zlib.compress(bytes(2**29), 9))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert images.read_image(bomb).size == (8, 8)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**28 / 1024


def test_size_of_the_file_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    (tmp_path / "some.png").write_bytes(saved("PNG"))
    with pytest.raises(DataError, match="bytes are more than 100"):
        images.read_image(str(tmp_path / "some.png"))
    with pytest.raises(DataError, match="bytes are more than 100"):
        images.read_image(saved("PNG"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("kind", ["pipe", "device", "link to nowhere"])
def test_what_is_no_file_is_refused_by_name(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("L2G_CACHE", str(tmp_path / "cache"))
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in (0, 2):
            (tmp_path / "train" / name / f"{number}.png").write_bytes(saved("PNG"))
    path = tmp_path / "train" / "a" / "1.png"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    with pytest.raises(DataError, match=r"a/1\.png"):
        load("folder", "train", root=tmp_path, image_size=8)
