"""One flipped bit in any file that the package writes and reads: the same result, or one line that names the file.

``pytest tests/test_flipped_bytes.py -m slow -s`` flips a bit of each byte of headers and of 10,000 bytes of bodies, and
prints what followed for each kind of file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from l2g_meta.classify import exported
from l2g_meta.classify.source import read_values
from l2g_meta.data import load
from l2g_meta.data.download import check_digest, digest_path
from l2g_meta.errors import L2GError
from l2g_meta.files.sealed import sealed
from l2g_meta.files.tensors import load_tensors
from l2g_meta.paper.cells import write_json
from l2g_meta.paper.plan import EQUAL_TIME, RESULT, Cell, plan
from l2g_meta.training.checkpoints import load as load_state
from l2g_meta.training.config import Config
from l2g_meta.training.log import read_log
from l2g_meta.training.loop import train


class Kind(NamedTuple):
    """A file, who reads it, and how many of its bytes are its header (all of a text)."""

    path: Path
    read: Callable[[], Any]
    header: int


def tensors(path: Path) -> Any:
    found, info = load_tensors(path)
    return {name: (t.dtype, tuple(t.shape), t.numpy().tobytes()) for name, t in found.items()}, info


def state(path: Path) -> Any:
    load_state(path)
    return tensors(path)


def rows(run: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_log(run)


def images(root: Path, split: str) -> Any:
    data = load("folder", split, root=root, image_size=8)
    return data.class_names, np.asarray(data.labels).tolist(), data.images.numpy().tobytes()


def header_of(path: Path) -> int:
    with open(path, "rb") as file:
        start = file.read(8)
    if path.suffix == ".safetensors":
        return 8 + int.from_bytes(start, "little")
    return 128 if path.suffix == ".npy" else path.stat().st_size


@pytest.fixture(scope="module")
def kinds(blob_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    """Every kind of file that is written to be read again."""
    base = tmp_path_factory.mktemp("flipped")
    config = replace(Config.load(blob_run / "config.json"), backbone="conv4-32", average=True)
    train(config, run := base / "run", progress=False, keep_weights=True)
    exported.export(run, model := base / "model", episodes=2)
    found: dict[str, tuple[Path, Callable[[], Any]]] = {
        "config.json": (run / "config.json", lambda: Config.load(run / "config.json")),
        "log.csv": (run / "log.csv", lambda: rows(run)),
        "model.json": (model / "model.json", lambda: {**read_values(model), "sha256": 0}),
    }
    for path in (run / f"{name}.safetensors" for name in ("last", "best", "average", "after-2")):
        found[path.name] = path, lambda path=path: tensors(path)
    found["resume-2.safetensors"] = run / "resume-2.safetensors", lambda: state(run / "resume-2.safetensors")
    found["model.safetensors"] = model / "model.safetensors", lambda: tensors(model / "model.safetensors")

    cell = Cell(plan("table1", "smoke", base / "reproduce"), "glyphs", "5w1s", "proto-time", 0)
    cell.folder.mkdir(parents=True)
    write_json(cell.folder / EQUAL_TIME, sealed({"updates": 3, "ratio": 1.5}))
    result = {"tests": {"running": {"accuracy_mean": 50.5, "accuracies": [50.0, 51.0]}}}
    write_json(cell.folder / RESULT, sealed(result))
    cell.config().save(cell.folder / "config.json")
    found[RESULT] = cell.folder / RESULT, lambda: cell.result
    found[EQUAL_TIME] = cell.folder / EQUAL_TIME, lambda: cell.decided

    (pickle := base / "a.pkl").write_bytes(bytes(1000))
    digest_path(pickle).write_text(f"{hashlib.sha256(bytes(1000)).hexdigest()}  a.pkl\n")
    found["a.pkl.sha256"] = digest_path(pickle), lambda: check_digest(pickle)
    found["a.pkl"] = pickle, lambda: check_digest(pickle)

    for place in (f"test/class0{c}/{k}.png" for c in range(2) for k in range(4)):
        (base / "photos" / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(config.root or "") / place, base / "photos" / place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("L2G_CACHE", str(base / "cache"))
        images(base / "photos", "test")
    (converted,) = (base / "cache").glob("photos-test-*")
    for path in converted.iterdir():
        found[f"cache: {path.name}"] = path, lambda: images(base / "photos", "test")
    return {name: Kind(path, read, header_of(path)) for name, (path, read) in found.items()}


NAMES = [
    "config.json", "log.csv", "last.safetensors", "best.safetensors", "average.safetensors", "after-2.safetensors",
    "resume-2.safetensors", "model.json", "model.safetensors", RESULT, EQUAL_TIME, "a.pkl", "a.pkl.sha256",
    "cache: images.npy", "cache: labels.npy", "cache: classes.json", "cache: checksums.json",
]  # fmt: skip


def places(kind: Kind, headers: int, bodies: int) -> np.ndarray:
    """So many places of a file's header, and of its body; each once."""
    draw, size = np.random.default_rng(0), kind.path.stat().st_size
    head, body = draw.permutation(kind.header)[:headers], kind.header + draw.permutation(size - kind.header)[:bodies]
    return np.sort(np.concatenate([head, body]))


def flip_all(name: str, kind: Kind, headers: int, bodies: int, capfd: Any) -> dict[str, int]:
    """What followed of each flipped bit: the same, refused by name, rows dropped, or made again; or it fails."""
    content, sound = kind.path.read_bytes(), kind.read()
    capfd.readouterr()
    counts = dict.fromkeys(("header", "body", "same", "refused", "dropped", "made again"), 0)
    for k, place in enumerate(places(kind, headers, bodies).tolist()):
        changed = bytearray(content)
        changed[place] ^= 1 << (5 * k + place) % 8
        kind.path.write_bytes(changed)
        counts["header" if place < kind.header else "body"] += 1
        try:
            found = kind.read()
        except L2GError as error:
            assert str(kind.path).removesuffix(".sha256") in str(error), (place, error)
            assert "\n" not in str(error) and len(str(error)) < 1500, (place, error)
            counts["refused"] += 1
            continue
        if name == "log.csv" and found != sound:
            assert all(row in sound for row in found) and len(found) >= len(sound) - 2, place
            counts["dropped"] += 1
            continue
        if isinstance(sound, dict):  # the name "sha256" may have another letter: a value that nobody asks for
            found = {key: found[key] for key in sound}
        assert found == sound, place
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("l2g")]
        assert len(lines) <= 1 and all("is made again" in line for line in lines), (place, lines)
        counts["made again" if lines else "same"] += 1
        if not lines:
            kind.path.write_bytes(content)
            if name.startswith("cache"):
                kind.read()  # which keeps its new time
        content = kind.path.read_bytes()
    kind.path.write_bytes(content)
    return counts


@pytest.fixture
def quick_disk(name: str, kinds: dict[str, Kind], monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of converted data is this module's; nothing waits for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setenv("L2G_CACHE", str(kinds["cache: images.npy"].path.parents[1]))


@pytest.mark.parametrize("name", NAMES)
def test_some_bytes(name: str, kinds: dict[str, Kind], quick_disk: None, capfd: Any) -> None:
    assert kinds.keys() == set(NAMES)
    flip_all(name, kinds[name], *((4, 3) if name.startswith("cache") else (25, 10)), capfd)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_all_headers_and_10_000_of_bodies(name: str, kinds: dict[str, Kind], quick_disk: None, capfd: Any) -> None:
    counts = flip_all(name, kinds[name], 10**9, 10_000, capfd)
    with capfd.disabled():
        print(f"\n| `{name}` | {' | '.join(f'{n:,}' for n in counts.values())} |")
