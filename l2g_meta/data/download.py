"""Downloads: over HTTPS only, of limited size, complete and of the right kind before the file appears.

The publishers of mini-ImageNet's and tieredImageNet's pickles give no SHA-256, so none is built in. That of what came
is written beside it (``<name>.sha256``, as ``sha256sum`` does) and compared before each conversion: a file that was
changed since is noticed. One from elsewhere can be put there by hand.
"""

from __future__ import annotations

import glob
import hashlib
import os
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any, NoReturn

from l2g_meta.errors import DataError
from l2g_meta.files.locks import claim

TIMEOUT = 60.0  # seconds without any data
CHUNK = 2**20


def fetch(
    url: str,
    path: Path,
    *,
    max_bytes: int,
    check: Callable[[Path], None],
    size: int | None = None,
    sha256: str | None = None,
    opener: urllib.request.OpenerDirector | None = None,
) -> None:
    """Download ``url`` to ``path``, which appears only when it is complete and checked; its digest appears beside it.

    Args:
        url: where the file is; ``https://``, as must be every address it is forwarded to.
        path: where it goes; its folder is made.
        max_bytes: the download is given up beyond it.
        check: raises ``DataError`` for a file of another kind than it should be.
        size: bytes of the file, where they are known.
        sha256: its digest in hexadecimal, where it is known.
        opener: opens the address; by default one with the system's certificates.

    Raises:
        DataError: if the download fails, is too large, incomplete, or not what it should be.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_left(path)
        open(part, "xb").close()
        with claim(part):
            digest = _receive(opener or https_opener(), url, part, max_bytes if size is None else size, exact=size)
            if sha256 is not None and digest != sha256.lower():
                raise DataError(f"its SHA-256 is {digest}, not {sha256}")
            check(part)
            digest_path(path).unlink(missing_ok=True)  # at no time is one there that belongs to another file
            os.replace(part, path)
        digest_path(path).write_text(f"{digest}  {path.name}\n", encoding="utf-8")
    except (HTTPException, OSError, ValueError) as error:  # OSError: of files, sockets, TLS and urllib
        reason = " ".join(str(error).split())  # on one line
        raise DataError(
            f"need {path.name}, got no download of {url} ({reason}); get the file by other means, put it at {path}, "
            "pass that root (--root)"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _remove_left(path: Path) -> None:
    """What killed processes left of downloads to this path: parts that nobody holds."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with claim(part) as ours:
            if ours:
                part.unlink(missing_ok=True)


def https_opener(**options: Any) -> urllib.request.OpenerDirector:
    """Opens HTTPS addresses and none of another kind, forwarded or not; ``options`` are those of ``HTTPSHandler``."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPSHandler(**options),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.UnknownHandler(),
        _RedirectToHTTPS(),
    ):
        opener.add_handler(handler)
    return opener


class _RedirectToHTTPS(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _require_https(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _require_https(url: str) -> None:
    if not url.lower().startswith("https://"):
        raise DataError(f"need an https:// address, got {url[:200]!r}")


def _receive(opener: urllib.request.OpenerDirector, url: str, part: Path, most: int, *, exact: int | None) -> str:
    """Write what the address gives to an empty file; its digest."""
    from tqdm import tqdm

    _require_https(url)
    digest, received = hashlib.sha256(), 0
    with opener.open(url, timeout=TIMEOUT) as response:
        stated = response.headers.get("Content-Length")
        want = exact if exact is not None else int(stated) if str(stated).isdecimal() else None
        if want is not None and want > most:
            _too_large(want, most)
        with open(part, "r+b") as file, tqdm(total=want, unit="B", unit_scale=True, disable=None) as progress:
            while chunk := response.read(CHUNK):
                received += len(chunk)
                if received > most:
                    _too_large(received, most)
                file.write(chunk)
                digest.update(chunk)
                progress.update(len(chunk))
    if want is not None and received != want:
        raise DataError(f"it has {received} bytes instead of {want}")
    return digest.hexdigest()


def _too_large(size: int, most: int) -> NoReturn:
    raise DataError(f"it has {size} bytes or more, at most {most} are expected")


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
    want = beside.read_text(encoding="utf-8", errors="replace")[:64]
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != want.lower():
        raise DataError(
            f"need {path} as it was downloaded, got other content than its digest in {beside.name}; get it again, or "
            "delete the digest if you changed the file"
        )
