"""Downloads from a server in this process, over real TLS: a file appears complete and checked, or not at all."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from l2g_meta.data import download
from l2g_meta.data.download import check_digest, check_pickle, fetch
from l2g_meta.errors import DataError

BODY = pickle.dumps(list(range(1000)))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"
    plain = ""  # address of the server without TLS

    def do_GET(self) -> None:
        moved = {
            "/moved": "/good.pkl",
            "/away": f"{self.plain}/good.pkl",
            "/later": "/away",
            "/file": "file:///etc/passwd",
            "/loop": "/loop",
        }
        if self.path in moved:
            self.send_response(302)
            self.send_header("Location", moved[self.path])
            self.end_headers()
            return
        body = {
            "/page.pkl": b"<!DOCTYPE html><html>gone",
            "/cut.pkl": BODY[:-1],
            "/text.pkl": b"hello.",
            "/bomb.pkl": gzip.compress(bytes(10**7)),
        }.get(self.path, BODY)
        self.send_response(404 if self.path == "/missing.pkl" else 200)
        if self.path == "/bomb.pkl":  # which nobody asked for
            self.send_header("Content-Encoding", "gzip")
        if self.path != "/endless.pkl":
            self.send_header("Content-Length", str(len(body) + 1000 * (self.path == "/short.pkl")))
        self.end_headers()
        if self.path == "/slow.pkl":
            time.sleep(2)
        for _ in range(1000 if self.path == "/endless.pkl" else 1):
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


class Quiet(ThreadingHTTPServer):
    def handle_error(self, *args: Any) -> None:
        """A client that hangs up is what is tested."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Address of an HTTPS server, and its certificate."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl to make a certificate with")
    key, certificate = (tmp_path_factory.mktemp("tls") / name for name in ("key.pem", "certificate.pem"))
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate], check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    servers = [Quiet(("localhost", 0), Handler) for _ in range(2)]
    Handler.plain = f"http://localhost:{servers[1].server_address[1]}"
    servers[0].socket = context.wrap_socket(servers[0].socket, server_side=True)
    for each in servers:
        threading.Thread(target=each.serve_forever, daemon=True).start()
    yield f"https://localhost:{servers[0].server_address[1]}", str(certificate)
    for each in servers:
        each.shutdown()
        each.server_close()


def get(server: tuple[str, str], name: str, path: Path, **options: Any) -> None:
    options = {"max_bytes": 10_000, "check": check_pickle, "certificates": server[1], **options}
    fetch(f"{server[0]}/{name}", path, **options)


@pytest.mark.parametrize("name", ["good.pkl", "moved"])
def test_complete_and_checked(server: Any, tmp_path: Path, name: str) -> None:
    path, digest = tmp_path / "new" / "a.pkl", hashlib.sha256(BODY).hexdigest()
    get(server, name, path, sha256=digest.upper())
    assert path.read_bytes() == BODY and (tmp_path / "new" / "a.pkl.sha256").read_text() == f"{digest}  a.pkl\n"
    assert len(list((tmp_path / "new").iterdir())) == 2
    check_digest(path)
    path.write_bytes(BODY + b"changed")
    with pytest.raises(DataError, match=r"got other content than its digest in a\.pkl\.sha256; get it again"):
        check_digest(path)
    (tmp_path / "new" / "a.pkl.sha256").unlink()
    check_digest(path)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "missing.pkl": ({}, "404"),
    "page.pkl": ({}, "an HTML page, no pickle"),
    "cut.pkl": ({}, "no pickle, or a part of one"),
    "text.pkl": ({}, "no pickle, or a part of one"),
    "short.pkl": (
        {},
        f"(instead of {len(BODY) + 1000}|{len(BODY)} bytes read, 1000 more expected)",
    ),
    "good.pkl?1": ({"max_bytes": 100}, f"it has {len(BODY)} bytes or more, at most 100 are expected"),
    "good.pkl?2": ({"max_bytes": len(BODY) - 1}, "bytes or more, at most"),
    "good.pkl?3": ({"sha256": 64 * "0"}, "its SHA-256 is "),
    "endless.pkl": ({"max_bytes": 500_000}, "at most 500000 are expected"),
    "bomb.pkl": ({"max_bytes": 500_000}, "at most 500000 are expected"),
    "away": ({}, "need an https:// address, got 'http://localhost"),
    "later": ({}, "need an https:// address, got 'http://localhost"),
    "file": ({}, "need an https:// address, got 'file:///etc/passwd'"),
    "loop": ({}, "Exceeded 30 redirects"),
    "slow.pkl": ({}, "timed out"),
    "good.pkl?4": ({"certificates": None}, "certificate verify failed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    options, message = REFUSED[name]
    monkeypatch.setattr(download, "TIMEOUT", 0.5 if name == "slow.pkl" else 20)
    (tmp_path / "a.pkl").write_bytes(b"as it was")
    with pytest.raises(DataError, match=rf"need a\.pkl, got no download of .*{message}.*; get the file by other means"):
        get(server, name, tmp_path / "a.pkl", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pkl"] and (tmp_path / "a.pkl").read_bytes() == b"as it was"


@pytest.mark.parametrize(
    "url", ["http://localhost/a.pkl", "file:///etc/passwd", "ftp://localhost/a", "data:,x", "a.pkl"]
)
def test_other_addresses_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(requests, "get", lambda *args, **options: pytest.fail("opened"))
    with pytest.raises(DataError, match="need an https:// address"):
        fetch(url, tmp_path / "a.pkl", max_bytes=10, check=check_pickle)


def test_a_link_in_the_way_is_not_followed(server: Any, tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.pkl").symlink_to(tmp_path / "precious")
    get(server, "good.pkl", tmp_path / "root" / "a.pkl")
    assert (tmp_path / "precious").read_bytes() == b"precious" and (tmp_path / "root" / "a.pkl").read_bytes() == BODY
