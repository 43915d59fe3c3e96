"""Downloads: over HTTPS only, of limited size, complete and of the right kind before the file appears.

The publishers of mini-ImageNet's and tieredImageNet's pickles give no SHA-256, so none is built in. That of what came
is written beside it (``<name>.sha256``, as ``sha256sum`` does) and compared before each conversion: a file that was
changed since is noticed. One from elsewhere can be put there by hand.
"""

from __future__ import annotations

import hashlib
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO
from urllib.parse import urljoin

from l2g_meta.data.cache import file_digest
from l2g_meta.errors import DataError
from l2g_meta.files.locks import turn
from l2g_meta.files.reading import open_regular
from l2g_meta.files.writing import replaced

TIMEOUT = 60.0  # seconds without any data


def fetch(
    url: str,
    path: Path,
    *,
    max_bytes: int,
    check: Callable[[Path], None],
    sha256: str | None = None,
    certificates: str | None = None,
) -> None:
    """Download ``url`` to ``path``, which appears only when it is complete and checked; its digest appears beside it.

    Args:
        url: where the file is; ``https://``, as must be every address it is forwarded to.
        path: where it goes; its folder is made.
        max_bytes: the download is given up beyond it.
        check: raises ``DataError`` for a file of another kind than it should be.
        sha256: its digest in hexadecimal, where it is known.
        certificates: a file of the authorities that are trusted, instead of the usual ones.

    Raises:
        DataError: if the download fails, is too large, incomplete, or not what it should be.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with turn(path.with_name(f".{path.name}.lock"), f"downloads {path.name}"):
            partial.unlink(missing_ok=True)  # left by a killed process
            with replaced(path, partial) as file:
                digest = _receive(url, file, max_bytes, certificates)
                if sha256 is not None and digest != sha256.lower():
                    raise DataError(f"its SHA-256 is {digest}, not {sha256}")
                file.flush()
                check(partial)
                digest_path(path).unlink(missing_ok=True)  # at no time is one there that belongs to another file
            with replaced(digest_path(path)) as file:
                file.write(f"{digest}  {path.name}\n".encode())
    except (OSError, ValueError) as error:  # of files, sockets, TLS and requests, and our own
        reason = " ".join(str(error).split())  # on one line
        raise DataError(
            f"need {path.name}, got no download of {url} ({reason}); get the file by other means, put it at {path}, "
            "pass that root (--root)"
        ) from error


def _receive(url: str, file: BinaryIO, most: int, certificates: str | None) -> str:
    """Write what the address gives to a file; its digest."""
    from pooch import HTTPDownloader

    digest, received, stated = hashlib.sha256(), 0, ""

    def answered(response: Any, **_: Any) -> None:  # before its body is read, or the address that it names is opened
        nonlocal stated
        _require_https(urljoin(response.url, response.headers.get("Location", "")))
        stated = response.headers.get("Content-Length", "")

    def write(chunk: bytes) -> None:
        nonlocal received
        received += len(chunk)
        if received > most:
            raise DataError(f"it has {received} bytes or more, at most {most} are expected")
        file.write(chunk)
        digest.update(chunk)

    _require_https(url)
    options = {"hooks": {"response": answered}, "headers": {"Accept-Encoding": "identity"}, "timeout": TIMEOUT}
    download = HTTPDownloader(sys.stderr.isatty(), 2**20, verify=certificates or True, **options)
    download(url, SimpleNamespace(write=write, flush=file.flush), None)
    if stated.isdecimal() and received != int(stated):
        raise DataError(f"it has {received} bytes instead of {stated}")
    return digest.hexdigest()


def _require_https(url: str) -> None:
    if not url.lower().startswith("https://"):
        raise DataError(f"need an https:// address, got {url[:200]!r}")


def is_html(path: Path) -> bool:
    """Whether a file starts like an HTML or XML page, as no pickle does."""
    with open(path, "rb") as file:
        return file.read(512).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<")


def check_pickle(path: Path) -> None:
    """Whether a file begins and ends as a pickle does, without reading it.

    Raises:
        DataError: if not.
    """
    with open(path, "rb") as file:
        first = file.read(1)
        file.seek(max(0, path.stat().st_size - 1))
        last = file.read(1)
    if is_html(path):
        raise DataError("an HTML page, no pickle")
    if first not in (b"\x80", b"(", b"c", b"]", b"}", b"l", b"d") or last != pickle.STOP:
        raise DataError("no pickle, or a part of one")


def digest_path(path: Path) -> Path:
    """Where the digest of a file is kept."""
    return path.with_name(f"{path.name}.sha256")


def check_digest(path: Path) -> None:
    """Compare a file with the SHA-256 in ``<name>.sha256`` beside it, if there is one.

    Raises:
        DataError: if they differ.
    """
    beside = digest_path(path)
    if not beside.is_file():
        return
    with open_regular(beside) as file:
        stated = file.read(64)  # of a file that may be of any size
    if file_digest(path).encode() != stated.lower():
        raise DataError(
            f"need {path} as it was downloaded, got other content than its digest in {beside.name}; get it again, or "
            "delete the digest if you changed the file"
        )
