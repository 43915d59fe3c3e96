"""Any change of a valid file reads as something valid or is refused by our own error, in little memory."""

from __future__ import annotations

import io
import json
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from l2g_meta.algorithm import L2GWrapper
from l2g_meta.data import images, pickles
from l2g_meta.data.cache import create_images, open_dataset, write_classes
from l2g_meta.data.dataset import ClassDataset
from l2g_meta.data.sets import mini_imagenet, tiered_imagenet
from l2g_meta.errors import L2GError
from l2g_meta.files.tensors import load_tensors, save_tensors
from l2g_meta.training import checkpoints as state
from l2g_meta.training.build import load_run
from l2g_meta.training.config import Config

MAX_MEMORY = 500 * 2**20  # bytes, most of it libraries; the files have a few kilobytes
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 5, 5, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scratch folder whose converted data is thrown away after each example."""
    monkeypatch.setenv("L2G_CACHE", str(tmp_path / "cache"))
    return tmp_path


# Valid files


@cache
def encoded(file_format: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS[0]).save(buffer, file_format)
    return buffer.getvalue()


def mini(protocol: int) -> bytes:
    return pickle.dumps({"image_data": PIXELS, "class_dict": {"a": [0, 2], "b": [1, 3]}}, protocol=protocol)


LABELS = {
    "label_specific": np.array([0, 0, 1, 1]),
    "label_specific_str": ["a", "b"],
    "label_general": np.array([0, 0, 1, 1]),
    "label_general_str": ["x", "y"],
}


def tiered(protocol: int) -> bytes:
    png = np.frombuffer(encoded("PNG"), np.uint8)
    return pickle.dumps([png, png, png, png], protocol=protocol)


class Mean(torch.nn.Module):
    """The smallest model that can be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))


def trained() -> tuple[L2GWrapper, torch.optim.Optimizer]:
    wrapper = L2GWrapper(Mean(), 0.1)
    optimizer = torch.optim.Adam(wrapper.parameters())
    wrapper.module.weight.grad = torch.ones(3)
    optimizer.step()
    return wrapper, optimizer


def checkpoint(out: Path) -> None:
    info = {"iteration": 1, "best": 0.5, "best_iteration": 1, "skipped": 0, "pending": None, "config": {}}
    state.save(out, *trained(), {**info, "image_shape": [3, 8, 8], "given": []})


def resume(folder: Path) -> int:
    path, tensors, info = state.newest(folder)
    state.restore(tensors, *trained(), path)
    return info["iteration"]


# Changed files


@st.composite
def changed(draw: st.DrawFn, valid: bytes) -> bytes:
    """A file with bytes replaced, inserted, deleted, repeated, or its end cut off."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["replace", "insert", "delete", "repeat", "cut", "extreme"]))
        length = draw(st.integers(1, 16))
        if kind == "replace":
            data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "delete":
            del data[at : at + length]
        elif kind == "repeat":
            data[at:at] = data[at : at + length]
        elif kind == "cut":
            del data[at:]
        else:
            data[at : at + 4] = draw(
                st.sampled_from([b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", bytes(4), b"\0\0\0\x80"])
            )
    return bytes(data)


ATOMS = (
    st.none() | st.booleans() | st.integers(-2, 5) | st.sampled_from([2**31, 2**63, 2**64, -(2**63), 2**999])
    | st.floats() | st.text(max_size=3) | st.binary(max_size=3)
    | st.sampled_from([PIXELS, PIXELS[0], PIXELS[:0], np.array([0, 0, 1, 1]), np.array(["a", "b"]), np.int64(3)])
)  # fmt: skip
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=8,
)
ROWS = st.lists(st.integers(0, 4), max_size=4) | VALUES
MINI = st.fixed_dictionaries(
    {"image_data": st.just(PIXELS) | VALUES, "class_dict": st.dictionaries(st.text(max_size=2), ROWS) | VALUES}
)
TIERED = st.fixed_dictionaries({}, optional={key: st.just(value) | VALUES for key, value in LABELS.items()})
# Programs for the pickle machine: its instructions, some with an argument that suits them.
INSTRUCTIONS = st.lists(
    st.sampled_from([bytes([code]) for code in range(256)])
    | st.sampled_from(
        [
            b"(", b"t", b"R", b"b", b"s", b"u", b"a", b"e", b"d", b"l", b"0", b"2", b"}", b"]", b")", b"N", b"\x85",
            b"\x86", b"\x87", b"\x94", b"K\x03", b"K\x00", b"I99999999999\n", b"Vu1\n", b"VO8\n", b"VS9\n", b"V|\n",
            b"Vlatin1\n", b"C\x03abc", b"U\x03abc", b"q\x00", b"h\x00", b"cnumpy\ndtype\n", b"cnumpy\nndarray\n",
            b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy.core.multiarray\nscalar\n", b"c_codecs\nencode\n",
            b"cnumpy.core.numeric\n_frombuffer\n", b"cnumpy\ndtype\n(Vu1\nI00\nI01\ntR", b"cos\nsystem\n",
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntC\x01btR", b"(I1\n(I3\nt",
        ]
    ),
    max_size=25,
).map(lambda parts: b"".join(parts) + b".")  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
INFO = st.fixed_dictionaries(
    {},
    optional={
        "iteration": st.just(1) | JSON,
        "best": JSON,
        "image_shape": st.lists(st.integers(-1, 20) | st.just(2**40), max_size=4) | JSON,
        "given": JSON,
        "best_iteration": st.none() | JSON,
        "skipped": st.just(0) | JSON,
        "pending": st.none() | JSON,
        "config": st.just({}) | JSON,
    },
)
CONFIG = st.dictionaries(
    st.sampled_from(list(asdict(Config()))), JSON | st.sampled_from(["os:system", "os:_exit", "-"])
)


# Readers: each is called with a folder and a drawn value, and may raise our own error alone


def read_pickle(folder: Path, data: bytes) -> None:
    (folder / "some.pkl").write_bytes(data)
    pickles.load_pickle(folder / "some.pkl")


def read_mini(folder: Path, data: bytes) -> None:
    (folder / "mini-imagenet-cache-train.pkl").write_bytes(data)
    check(mini_imagenet.load("train", root=folder, image_size=4))


def read_tiered(folder: Path, files: tuple[bytes, bytes]) -> None:
    for name, data in zip(("train_images_png.pkl", "train_labels.pkl"), files, strict=True):
        (folder / name).write_bytes(data)
    check(tiered_imagenet.load("train", root=folder, image_size=4))


def read_image(folder: Path, image: tuple[bytes, str]) -> None:
    data, suffix = image
    path = folder / f"some{suffix}"
    path.write_bytes(data)
    for upright in (False, True):
        decoded = images.read_image(str(path), upright=upright)
        assert decoded.mode == "RGB" and decoded.width * decoded.height <= images.MAX_PIXELS


def read_cache(folder: Path, change: tuple[str, bytes]) -> None:
    create_images(folder, PIXELS.shape)[:] = PIXELS  # type: ignore[arg-type]
    write_classes(folder, [0, 0, 1, 1], ["a", "b"])
    (folder / change[0]).write_bytes(change[1])
    check(open_dataset(folder, name="some", split="train"))


def read_checkpoint(folder: Path, change: tuple[str, bytes]) -> None:
    checkpoint(folder)
    (folder / change[0]).write_bytes(change[1])
    load_tensors(folder / change[0])
    assert resume(folder) >= 0


def read_info(folder: Path, info: dict[str, Any]) -> None:
    checkpoint(folder)
    for name in ("last.safetensors", "resume-1.safetensors"):
        save_tensors(folder / name, load_tensors(folder / name)[0], info)
    try:
        assert resume(folder) >= 0
    finally:
        Config(backbone="conv4-32").resolved().save(folder / "config.json")
        with pytest.raises(L2GError):  # these are another model's weights at best
            load_run(folder, checkpoint="last")


def read_config(folder: Path, values: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(values))
    config = Config.load(folder / "config.json")
    assert config == config.resolved()


def check(data: ClassDataset) -> None:
    assert data.images.dtype == torch.uint8 and data.gather([0, len(data) - 1]).isfinite().all()
    assert all(isinstance(name, str) for name in data.class_names) and len(data.index) == data.n_classes


@cache
def cache_file(name: str) -> bytes:
    buffer = io.BytesIO()
    if name == "classes.json":
        return b'["a", "b"]'
    np.save(buffer, PIXELS if name == "images.npy" else np.array([0, 0, 1, 1]))
    return buffer.getvalue()


def one_of(names: list[str], valid: Callable[[str], bytes]) -> st.SearchStrategy[tuple[str, bytes]]:
    return st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), changed(valid(name))))


@cache
def checkpoint_file(name: str) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint(Path(scratch))
        return (Path(scratch) / name).read_bytes()


PROTOCOLS = st.integers(0, 5)
FORMATS = st.sampled_from([("PNG", ".png"), ("JPEG", ".jpg"), ("PNG", ".jpg"), ("GIF", ".png"), ("TIFF", ".jpeg")])
READERS: dict[str, tuple[Callable[[Path, Any], None], st.SearchStrategy[Any], int]] = {
    "pickle instructions": (read_pickle, INSTRUCTIONS, 300),
    "pickle bytes": (read_pickle, PROTOCOLS.flatmap(lambda p: changed(mini(p))), 200),
    "mini-ImageNet bytes": (read_mini, PROTOCOLS.flatmap(lambda p: changed(mini(p))), 60),
    "mini-ImageNet values": (read_mini, MINI.map(pickle.dumps), 100),
    "tieredImageNet bytes": (
        read_tiered,
        PROTOCOLS.flatmap(lambda p: st.tuples(changed(tiered(p)), st.just(pickle.dumps(LABELS)))),
        60,
    ),
    "tieredImageNet values": (read_tiered, st.tuples(st.just(tiered(4)), TIERED.map(pickle.dumps)), 100),
    "images": (read_image, FORMATS.flatmap(lambda f: st.tuples(changed(encoded(f[0])), st.just(f[1]))), 200),
    "converted data": (read_cache, one_of(["images.npy", "labels.npy", "classes.json"], cache_file), 150),
    "checkpoint bytes": (
        read_checkpoint,
        one_of(["last.safetensors", "resume-1.safetensors"], checkpoint_file),
        100,
    ),
    "checkpoint header": (read_info, INFO, 60),
    "config": (read_config, CONFIG, 150),
}


def fuzz(name: str, folder: Path, *, factor: int, derandomize: bool) -> None:
    reader, strategy, examples = READERS[name]
    count = 0

    def scratch() -> Path:
        nonlocal count
        count += 1
        (folder / str(count)).mkdir()
        return folder / str(count)

    @settings(
        max_examples=factor * examples,
        derandomize=derandomize,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate] if derandomize else [Phase.generate, Phase.shrink],  # shrinking knows no bound
    )
    @given(strategy)
    def law(value: Any) -> None:
        try:
            reader(scratch(), value)
        except L2GError as error:
            assert len(str(error)) < 4000

    law()


@pytest.fixture
def little_memory() -> Iterator[None]:
    resource = pytest.importorskip("resource", reason="this system does not tell how much memory was used")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MAX_MEMORY / (1 if sys.platform == "darwin" else 1024), f"{grown} more"


@pytest.mark.filterwarnings("ignore")  # of Pillow and NumPy about damaged files
@pytest.mark.parametrize("name", READERS)
def test_changed_files(name: str, folder: Path, little_memory: None) -> None:
    fuzz(name, folder, factor=1, derandomize=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_many_changed_files(name: str, folder: Path) -> None:
    fuzz(name, folder, factor=20, derandomize=False)
