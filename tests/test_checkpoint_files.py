"""A run directory from somebody else is data: it names no file elsewhere, and calls nothing but a module's class."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from l2g_meta.errors import CheckpointError, FitError, L2GError
from l2g_meta.files.tensors import load_tensors, save_tensors
from l2g_meta.training import checkpoints as state
from l2g_meta.training.build import build_model, build_wrapper, load_run
from l2g_meta.training.config import Config

CONFIG = Config(backbone="conv4-32").resolved()
INFO: dict[str, Any] = {"iteration": 1, "best": 0.5, "best_iteration": 1, "skipped": 0, "pending": None}
INFO |= {"image_shape": [1, 28, 28], "given": [], "config": asdict(CONFIG)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    wrapper = build_wrapper(CONFIG, build_model(CONFIG, (1, 28, 28)))
    optimizer = torch.optim.Adam(wrapper.parameters())
    for p in wrapper.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    state.save(folder, wrapper, optimizer, INFO)
    CONFIG.save(folder / "config.json")
    return folder


def resume(folder: Path) -> dict[str, Any]:
    wrapper = build_wrapper(CONFIG, build_model(CONFIG, (1, 28, 28)))
    path, tensors, info = state.newest(folder)
    state.restore(tensors, wrapper, torch.optim.Adam(wrapper.parameters()), path)
    return info


def test_a_sound_run_is_read(run: Path) -> None:
    assert resume(run)["iteration"] == 1
    load_run(run, checkpoint="last")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iteration": "1"}, "need the state of a run"),
        ({"iteration": -1}, "need the state of a run"),
        ({"best": [1]}, "need the state of a run"),
        ({"best_iteration": -2}, "need the state of a run"),
        ({"pending": [1]}, "need the state of a run"),
        ({"pending": {"iteration": 1, "loss": "a", "tasks": 1, "seconds": 1.0}}, "need the state of a run"),
        ({"pending": {"iteration": 1, "loss": 1.0, "tasks": 1, "seconds": -1}}, "need the state of a run"),
        ({"pending": {"iteration": 1, "loss": 1.0, "tasks": 1, "seconds": 1, "odd": 1}}, "need the state of a run"),
        ({"best": float("nan")}, "need the state of a run"),
        ({"iteration": 10**30}, "need the state of a run"),
        ({"config": {"odd": 1}}, "need the state of a run"),
        ({"config": None}, "need the state of a run"),
        ({"given": 3}, "of another kind"),
    ],
    ids=str,
)
def test_headers_of_checkpoints(run: Path, change: dict[str, Any], message: str) -> None:
    path = run / "resume-1.safetensors"
    tensors, info = load_tensors(path)
    save_tensors(path, tensors, {**info, **change})
    with pytest.raises(CheckpointError, match=message):
        resume(run)


@pytest.mark.parametrize(
    "shape",
    [None, 3, [], [0, 28, 28], [1, 2**20, 2**20], [2**22, 1, 1], [1, 1, 4096], ["a"], {"a": 1}, [1.5, 2, 2]],
    ids=str,
)
def test_shapes_of_checkpoints(run: Path, shape: Any) -> None:
    path = run / "last.safetensors"
    tensors, info = load_tensors(path)
    save_tensors(path, tensors, {**info, "image_shape": shape})
    with pytest.raises(CheckpointError, match="need the images' shape|need images of at most"):
        load_run(run, checkpoint="last")


@pytest.mark.parametrize(
    "tensors",
    [
        {"generator.cpu": None},
        {"generator.cpu": torch.ones(3)},
        {"optimizer.0.exp_avg": torch.ones(2)},
        {"optimizer.99.exp_avg": torch.ones(2)},
        {"optimizer.odd": torch.ones(2)},
        {"optimizer.0.exp_avg": None},
        {"optimizer.0.step": torch.ones(2)},
    ],
)
def test_the_other_half_of_checkpoints(run: Path, tensors: dict[str, torch.Tensor]) -> None:
    sound, info = load_tensors(run / "resume-1.safetensors")
    changed = {name: t for name, t in {**sound, **tensors}.items() if t is not None}
    save_tensors(run / "resume-1.safetensors", changed, info)
    with pytest.raises(CheckpointError, match="belongs to another run"):
        resume(run)


@pytest.mark.parametrize(
    "name", ["os:system", "os:_exit", "subprocess:Popen", "builtins:print", "torch:load", "json:x"]
)
@pytest.mark.parametrize("kind", ["backbone", "head"])
def test_a_config_calls_no_function(run: Path, kind: str, name: str) -> None:
    (run / "config.json").write_text(json.dumps({**asdict(CONFIG), kind: name}))
    with pytest.raises(CheckpointError, match=f"names a module as its {kind}, {name}, which would be run"):
        load_run(run, checkpoint="last")
    with pytest.raises(FitError, match=f"need a class derived from torch.nn.Module as --{kind}|cannot load"):
        load_run(run, checkpoint="last", trust=True)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[]",
        "{",
        '{"odd": 1}',
        '{"queries": []}',
        '{"root": 3}',
        "\xff",
        '{"seed": 1' + 40 * "0" + "}",
        '{"root": "\\u0000"}',
    ],
)
def test_odd_configs(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(L2GError):
        Config.load(tmp_path / "config.json")


def test_a_pickled_checkpoint_is_refused(run: Path) -> None:
    torch.save({"weight": torch.ones(2)}, run / "resume-1.safetensors")
    with pytest.raises(CheckpointError, match="need a checkpoint in"):
        resume(run)


META = '{"__metadata__":{"format":"1","info":"{}","sha256":"0"}'
TENSOR = META + ',"a":{"dtype":"F32","shape":%s,"data_offsets":%s}}'


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("{}", 2**64 - 1),
        ("{}", 2**63),
        ("[" * 10**6, None),
        ('{"a":' * 10**5, None),
        ("[]", None),
        ('{"__metadata__":[]}', None),
        (META.replace('"1"', '"' + "9" * 10**5 + '"') + "}", None),
        (META.replace("{}", "9" * 10**5) + "}", None),
        (TENSOR % ([2**40, 2**40], [0, 4]), None),
        (TENSOR % ([0, 2**40], [0, 0]), None),
        (TENSOR % ([1], [-4, 0]), None),
        (TENSOR % ([1], [0, 2**40]), None),
        (TENSOR % ([1], [0, 4]) + ",", None),
        (META + "," + META[1:] + "}", None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_absurd_headers(tmp_path: Path, text: str, size: int | None) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text.encode() + b"1234")
    with pytest.raises(CheckpointError) as error:
        load_tensors(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_sparse_file_is_not_read(tmp_path: Path) -> None:
    """It has the size that it claims, and no content: reading it would take that much memory."""
    path = tmp_path / "best.safetensors"
    save_tensors(path, {"a": torch.zeros(2)}, {})
    for size in (path.stat().st_size + 2**36, 2**40):
        os.truncate(path, size)
        with pytest.raises(CheckpointError, match=f"{size} bytes, which is not what its header says"):
            load_tensors(path)


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    tensors = {name: torch.randn(3) for name in "abc"}
    written = set()
    for k in range(20):
        save_tensors(tmp_path / str(k), tensors, INFO | {"text": "α", "tensors": ["ü"]})
        written.add((tmp_path / str(k)).read_bytes())
    assert len(written) == 1
    found, info = load_tensors(tmp_path / "0")
    assert info["text"] == "α" and all(torch.equal(found[name], t) for name, t in tensors.items())
