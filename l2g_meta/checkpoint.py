"""Checkpoints: safetensors with JSON in their header, written beside their place and renamed into it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from l2g_meta.errors import CheckpointError


def save_tensors(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Writes tensors and JSON values to ``path``; a crash leaves the old file or the new one, never a part."""
    # Copies, since tied weights share memory, which the format refuses.
    data = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(safetensors.torch.save(data, metadata={"info": json.dumps(dict(info))}))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    """Writes a text beside its place and renames it into it; several processes may do so at once."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``save_tensors`` wrote.

    Raises:
        CheckpointError: if the file is missing, damaged or of another kind.
    """
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    return tensors, read_info(path)


def read_info(path: Path) -> dict[str, Any]:
    """The JSON values that ``save_tensors`` wrote, without the tensors.

    Raises:
        CheckpointError: if the file is missing, damaged or of another kind.
    """
    with _opened(path) as file:
        info = json.loads((file.metadata() or {}).get("info", "{}"))
        given = info.get("given", []) if isinstance(info, dict) else None
        if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
            raise ValueError("its header is of another kind")
        return info


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except Exception as error:  # damaged JSON, types that PyTorch lacks, ...
        raise CheckpointError(f"need a checkpoint in {path}, got: {error}; use another, or train again") from error


def save_training(folder: Path, wrapper: nn.Module, optimizer: torch.optim.Optimizer, info: Mapping[str, Any]) -> None:
    """``last.safetensors`` (the wrapper's state dict) and, beside it, what resuming needs besides.

    The second file is written first under a name of its own, which the first one's header refers to: renaming
    ``last.safetensors`` into place switches both at once.
    """
    resume = f"resume-{info['iteration']}.safetensors"
    state = optimizer.state_dict()
    tensors = {
        f"optimizer.{index}.{key}": torch.as_tensor(value)
        for index, values in state["state"].items()
        for key, value in values.items()
    }
    save_tensors(folder / resume, {**tensors, "generator": torch.get_rng_state()}, {})
    save_tensors(folder / "last.safetensors", wrapper.state_dict(), {**info, "resume": resume})
    for old in folder.glob("resume-*.safetensors"):
        if old.name != resume:
            old.unlink()


def load_training(folder: Path, wrapper: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Puts wrapper, optimizer and PyTorch's generator back as ``save_training`` found them; returns its ``info``.

    Raises:
        CheckpointError: if a file is missing or damaged, or belongs to another model.
    """
    path = folder / "last.safetensors"
    info = load_weights(path, wrapper)
    iteration, best, resume = (info.get(name) for name in ("iteration", "best", "resume"))
    if type(iteration) is not int or iteration < 0 or not isinstance(best, int | float):
        raise CheckpointError(f"need the state of a run in {path}, got iteration {iteration!r} and best {best!r}")
    if not isinstance(resume, str) or not re.fullmatch(r"resume-[0-9]{1,18}\.safetensors", resume):  # no path elsewhere
        raise CheckpointError(f"need the name of a file beside {path} in it, got {str(resume)[:80]!r}; train again")
    _restore(folder / resume, optimizer)
    return info


def _restore(path: Path, optimizer: torch.optim.Optimizer) -> None:
    tensors, _ = load_tensors(path)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    try:
        generator = tensors.pop("generator")
        for name, value in tensors.items():
            _, index, key = name.split(".")
            if key != "step" and value.shape != parameters[int(index)].shape:
                raise ValueError(f"{name} has the shape {tuple(value.shape)}")
            state.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        torch.set_rng_state(generator)
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} belongs to another run: {error}; train again") from error


def load_weights(path: Path, wrapper: nn.Module) -> dict[str, Any]:
    """Puts a checkpoint's weights and step sizes into a wrapper; returns the JSON values of its header.

    Raises:
        CheckpointError: if the file is missing or damaged, or belongs to another model.
    """
    tensors, info = load_tensors(path)
    try:
        wrapper.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{path} belongs to another model: {error}") from error
    return info
