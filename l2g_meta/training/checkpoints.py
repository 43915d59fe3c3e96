"""The state of a run between two updates, saved such that a run goes on to the same bits, whatever happened to it.

``resume-N.safetensors`` holds everything after N updates: weights, Adam's moments, generators, and in its header the
config, the best accuracy and what else is no tensor. The newest few are kept; if the newest is damaged, the one before
it is as good, since tasks are functions of (seed, position) and the updates after it give the same again.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from l2g_meta.errors import CheckpointError
from l2g_meta.files.tensors import load_tensors, put, save_tensors
from l2g_meta.training.config import Config
from l2g_meta.training.log import COLUMNS

PREFIX = "resume"
AVERAGE = "average"
KEPT = 2  # states; the older one serves if the newest is damaged


def collect(
    wrapper: nn.Module, optimizer: torch.optim.Optimizer, average: AveragedModel | None = None
) -> dict[str, Tensor]:
    """All tensors of a run's state, by name; not copies. PyTorch's generators are what a model's dropout draws from."""
    device, tensors = _device(wrapper), {"generator.cpu": torch.get_rng_state()}
    tensors |= {f"wrapper.{name}": t for name, t in wrapper.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in values.items()}
    if average is not None:
        tensors |= {f"{AVERAGE}.{name}": t for name, t in average.state_dict().items()}
    return tensors | ({"generator.cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore(
    tensors: Mapping[str, Tensor],
    wrapper: nn.Module,
    optimizer: torch.optim.Optimizer,
    path: Path,
    average: AveragedModel | None = None,
) -> None:
    """Puts what ``collect`` found back; ``path`` is where it was stored. An average that was not kept begins here.

    Raises:
        CheckpointError: if it belongs to another model.
    """
    put(_of_wrapper(tensors), wrapper, path)
    kept = {name.removeprefix(f"{AVERAGE}."): t for name, t in tensors.items() if name.startswith(f"{AVERAGE}.")}
    if average is not None and kept:
        put(kept, average, path)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    try:
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                if value.shape != (torch.Size() if key == "step" else parameters[int(index)].shape):
                    raise ValueError(f"{name} has the shape {tuple(value.shape)}")
                state.setdefault(int(index), {})[key] = value
        adam = isinstance(optimizer, torch.optim.Adam)
        needed = {"step", "exp_avg", "exp_avg_sq"} if adam else {"momentum_buffer"}
        if any(found.keys() != needed for found in state.values()):
            raise ValueError(f"a moment of {type(optimizer).__name__}'s is missing")
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        torch.set_rng_state(tensors["generator.cpu"])
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} belongs to another run: {error}") from error
    device = _device(wrapper)
    if device.type == "cuda" and "generator.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["generator.cuda"], device)


def save(
    folder: Path,
    wrapper: nn.Module,
    optimizer: torch.optim.Optimizer,
    info: Mapping[str, Any],
    *,
    average: AveragedModel | None = None,
) -> None:
    """Saves the state after ``info["iteration"]`` updates; weights alone also as ``last`` and ``average.safetensors``.

    The newest ``KEPT`` states stay; older ones go when this one is on the disk.

    Raises:
        CheckpointError: if the disk is full or the folder cannot be written; older files are untouched.
    """
    n = info["iteration"]
    save_tensors(_path(folder, n), collect(wrapper, optimizer, average), info)
    save_tensors(folder / "last.safetensors", wrapper.state_dict(), info)
    if average is not None:
        save_tensors(folder / f"{AVERAGE}.safetensors", average.module.state_dict(), info)
    there = numbers(folder)
    for old in set(there) - set([k for k in there if k <= n][-KEPT:]):  # later ones were passed over as damaged
        _path(folder, old).unlink(missing_ok=True)


def numbers(folder: Path) -> list[int]:
    """After how many updates the states in a folder were saved, ascending."""
    names = (re.fullmatch(rf"{PREFIX}-(\d+)\.safetensors", path.name) for path in folder.glob(f"{PREFIX}-*"))
    return sorted(int(name[1]) for name in names if name)


def newest(folder: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """The newest state that is sound; each damaged one is named in a warning.

    Raises:
        CheckpointError: if there is none, with all that were tried.
    """
    tried: list[str] = []
    for path in (_path(folder, n) for n in reversed(numbers(folder))):
        try:
            found = load(path)
        except CheckpointError as error:
            tried.append(str(error))
            continue
        for message in tried:
            warnings.warn(f"{message}; going on from {path.name}", stacklevel=2)
        return path, *found
    raise CheckpointError(
        f"need a state to go on from in {folder}, got: {'; '.join(tried) or 'none'}; put a copy of one there, or begin "
        "another run with another --out"
    )


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a state.

    Raises:
        CheckpointError: if it is damaged, or its header is not one of a run.
    """
    tensors, info = load_tensors(path)
    try:
        counts = [info[name] for name in ("iteration", "skipped")] + [info["best_iteration"] or 0]
        sound = all(type(n) is int and 0 <= n < 2**63 for n in counts) and -1 <= info["best"] <= 100
        row = info["pending"]
        if row is not None:
            sound = sound and {"loss", "tasks", "seconds"} < row.keys() <= set(COLUMNS) and row["seconds"] >= 0
            sound = (
                sound
                and row["iteration"] == info["iteration"]
                and all(isinstance(v, int | float) for v in row.values())
            )
        Config.from_json(info["config"])
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"need the state of a run in {path}, got a header with: {error}") from error
    if not sound:
        raise CheckpointError(f"need the state of a run in {path}, got a header that is none of a run")
    return tensors, info


def weights_after(folder: Path, n: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The wrapper's state dict after n updates and the header, if that state was kept and is sound."""
    try:
        tensors, info = load(_path(folder, n))
    except CheckpointError:
        return None
    return _of_wrapper(tensors), info


def _of_wrapper(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("wrapper."): t for name, t in tensors.items() if name.startswith("wrapper.")}


def _path(folder: Path, n: int) -> Path:
    return folder / f"{PREFIX}-{n}.safetensors"


def _device(wrapper: nn.Module) -> torch.device:
    return next((p.device for p in wrapper.parameters()), torch.device("cpu"))
