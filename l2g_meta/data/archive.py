"""A tar file of image folders, unpacked member by member below one new folder.

``tarfile``'s data filter refuses what leads elsewhere; more is refused here, since images need less. Nothing of a
member is used but its name and its bytes: no owner, no mode, no time, no link. Only files named as images are written;
others, archives in the archive too, are passed over unopened.
"""

from __future__ import annotations

import gzip
import shutil
import tarfile
import unicodedata
from pathlib import Path
from typing import IO, Any

from l2g_meta.data import images
from l2g_meta.data.cache import cached, file_fingerprint
from l2g_meta.errors import DataError

SUFFIXES = (".tar", ".tar.gz", ".tgz")  # others decompress with memory that the archive chooses
MAX_DEPTH = 4  # <archive>/<split>/<class>/<image>
MAX_RATIO = 20  # unpacked to packed size: images hardly compress
FREE_SIZE = 2**26  # up to which any ratio will do
HEADER = 2**20  # bytes between two members, padding and long names


def unpacked(path: Path) -> Path:
    """The folder of images in a tar file, unpacked into the cache the first time.

    A single folder around all others is left out, unless it is named like a split.

    Raises:
        DataError: if the file is no such archive, or holds what images do not need: links, devices, absolute names or
            ``..``, names that differ in case alone, files of more than ``images.MAX_BYTES``; or if it unpacks to far
            more than images do.
    """
    source = {"archive": file_fingerprint(path)}
    folder = cached(f"{stem(path)}-unpacked", source, lambda out: unpack(path, out))
    inner = images.subfolders(folder)
    return folder / inner[0] if len(inner) == 1 and inner[0] not in (*images.SPLITS, "val") else folder


def stem(path: Path) -> str:
    """The name of an archive without its suffix.

    Example:
        >>> stem(Path("data/pets.tar.gz"))
        'pets'
    """
    return path.name[: -len(next((s for s in SUFFIXES if path.name.lower().endswith(s)), path.suffix))] or "archive"


def unpack(path: Path, out: Path) -> None:
    """Write the images of a tar file below ``out``, an empty folder.

    Raises:
        DataError: as ``unpacked``; ``out`` may then hold a part of the images.
    """
    if not path.name.lower().endswith(SUFFIXES):
        raise DataError(f"need a folder or an archive {', '.join(SUFFIXES)}, got {path}; unpack it yourself")
    try:
        with gzip.open(path) if path.name.lower().endswith("gz") else open(path, "rb") as file:
            _unpack(_Metered(file, max(FREE_SIZE, MAX_RATIO * path.stat().st_size)), out)
    except Exception as error:  # tarfile and zlib raise many kinds for damaged files
        raise DataError(
            f"need a tar file of image folders, got {path} ({str(error)[:200] or type(error).__name__}); nothing of it "
            "is used: make it anew, or unpack it yourself if you trust it"
        ) from error


class _Metered:
    """Counts what is read, so that neither headers nor the whole can grow beyond what images need."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile, most: int) -> None:
        self.file, self.left, self.step = file, most, HEADER

    def read(self, n: int) -> bytes:
        data = self.file.read(n)
        self.left -= len(data)
        self.step -= len(data)
        if self.left < 0:
            raise ValueError(f"it unpacks to more than {MAX_RATIO} times its size")
        if self.step < 0:
            raise ValueError("a header of more than a megabyte")
        return data


class _Header(tarfile.TarInfo):
    """A member whose header must be sound; ``tarfile`` takes a damaged one for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise ValueError(f"damaged or cut off: {error}") from error


def _unpack(metered: Any, out: Path) -> None:
    spelling: dict[str, str] = {}  # of each path, by its letters alone: file systems may ignore case
    with tarfile.open(fileobj=metered, mode="r|", tarinfo=_Header, encoding="utf-8", errors="strict") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # it would keep them all
            parts = _parts(member, out)
            metered.step = member.size + HEADER
            if member.isdir() or parts[-1].startswith(".") or Path(parts[-1]).suffix.lower() not in images.FORMATS:
                continue
            if not 2 <= len(parts) <= MAX_DEPTH:
                raise ValueError(f"{member.name[:80]!r} is not in <class>/ or <split>/<class>/")
            for path in ("/".join(parts[:depth]) for depth in range(1, len(parts) + 1)):
                if spelling.setdefault(unicodedata.normalize("NFC", path).casefold(), path) != path:
                    raise ValueError(f"{member.name[:80]!r} is there twice, up to upper and lower case")
            target, content = out.joinpath(*parts), tar.extractfile(member)
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "xb") as image:  # a second one of this name is refused
                shutil.copyfileobj(content, image)  # type: ignore[arg-type]  # it is a file, as was checked
    metered.step = HEADER
    while rest := metered.read(2**16):  # to the end, where gzip has its checksum
        if rest.strip(b"\0"):
            raise ValueError("data follow its end")


def _parts(member: tarfile.TarInfo, out: Path) -> list[str]:
    """The parts of a member's name, if it is a name below the archive's root, of a file or folder."""
    name, safe = member.name, tarfile.data_filter(member, str(out))
    if not (member.isdir() or member.type in (tarfile.REGTYPE, tarfile.AREGTYPE)) or member.issparse():
        raise ValueError(f"{name[:80]!r} is a link, a device or another special file")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    odd = any(c in "\\:" or ord(c) < 32 or ord(c) == 127 for c in name)
    if safe.name != name or ".." in parts or odd or not (parts or member.isdir()):
        raise ValueError(f"{name[:80]!r} is a path that may lead elsewhere")
    if not 0 <= member.size <= images.MAX_BYTES:
        raise ValueError(f"{name[:80]!r} has {member.size} bytes, more than {images.MAX_BYTES}")
    return parts
