"""Checkpoint files: safetensors with JSON and a checksum in their header."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2g_meta.errors import CheckpointError
from l2g_meta.files.reading import open_regular
from l2g_meta.files.writing import write_bytes

FORMAT = 1  # of the files; raised when an older version could not read them
MAX_HEADER, MAX_BYTES = 2**26, 2**33


def save_tensors(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Writes tensors and JSON values to ``path``; a crash leaves the old file or the new one, never a part.

    Raises:
        CheckpointError: if the disk is full or the folder cannot be written; the old file is untouched.
    """
    from safetensors.torch import save  # at first use: a bench writes no checkpoint

    # Copies, since tied weights share memory, which the format refuses.
    data = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    text = json.dumps(dict(info))
    header = {"format": str(FORMAT), "info": text, "sha256": _digest(data, text)}
    write_bytes(path, _in_order(save(data, metadata=header)))


def _in_order(content: bytes) -> bytes:
    """A safetensors file with its metadata sorted, which it has in any order: the same values give the same bytes."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``save_tensors`` wrote, unchanged to the bit.

    Raises:
        CheckpointError: if the file is missing, damaged, of another kind or of a later version.
    """
    from safetensors.torch import load

    try:
        content, header = read_safetensors(path)
        own = header["__metadata__"]
        version, text = int(own["format"]), own["info"]
        if version > FORMAT:
            raise ValueError(f"a file of format {version} from a later version of l2g-meta, this one reads {FORMAT}")
        data = load(content)
        if _digest(data, text) != own["sha256"]:
            raise ValueError("content that does not fit its checksum")
        info = json.loads(text)
        given = info.get("given", []) if isinstance(info, dict) else None
        if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
            raise ValueError("a header of another kind")
        return data, info
    except Exception as error:  # no such file, damaged JSON, a header without these, types that PyTorch lacks, …
        reason = getattr(error, "strerror", "") or str(error) or type(error).__name__
        reason = f"a file without {reason}" if isinstance(error, KeyError) else reason
        raise CheckpointError(f"need a checkpoint in {path}, got: {reason}; use another, or train again") from error


def read_safetensors(path: Path) -> tuple[bytes, dict[str, Any]]:
    """What a file holds, and its header; the rest is read once it is as large as that says: a sparse one may claim any.

    Raises:
        OSError: if it is no regular file.
        ValueError: if its size is not what its header says.
    """
    with open_regular(path) as file:
        size, start = os.fstat(file.fileno()).st_size, file.read(8)
        length = int.from_bytes(start, "little")
        if not 0 < length <= min(MAX_HEADER, size - 8):
            raise ValueError(f"{size} bytes, a file that is cut off or of another kind")
        header = json.loads(file.read(length))
        ends = [value["data_offsets"][1] for name, value in header.items() if name != "__metadata__"]
        if size != 8 + length + max(ends, default=0) or size > MAX_BYTES:
            raise ValueError(f"{size} bytes, which is not what its header says, or more than {MAX_BYTES}")
        file.seek(0)
        return file.read(), header


def read_info(path: Path) -> dict[str, Any]:
    """The JSON values that ``save_tensors`` wrote.

    Raises:
        CheckpointError: if the file is missing, damaged, of another kind or of a later version.
    """
    return load_tensors(path)[1]


def refuse_given(info: Mapping[str, Any], path: Path, remedy: str) -> None:
    """That a run's data and model are those of its config.

    Raises:
        CheckpointError: if they were given from Python.
    """
    given = info.get("given")
    if given:
        raise CheckpointError(
            f"need a run that its config describes, {path} was given its {' and '.join(given)} from Python; {remedy}"
        )


def image_shape_of(info: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    """The shape of a run's images (C, H, W), from the header of its checkpoints.

    Raises:
        CheckpointError: if it is none that can be.
    """
    shape = info.get("image_shape")
    if not isinstance(shape, list) or not shape or not all(type(n) is int and n > 0 for n in shape):
        raise CheckpointError(f"need the images' shape in {path}, got {shape!r}; use another, or train again")
    if max(shape) > 1024 or math.prod(shape) > 2**22:  # a dry run takes some hundred times as much memory
        raise CheckpointError(f"need images of at most 1024 x 1024 pixels, {path} has {shape!r}; use another")
    return tuple(shape)


def make_folder(path: Path, need: str, remedy: str) -> None:
    """Makes a folder and those that it is in.

    Raises:
        CheckpointError: if it cannot be made, with what is needed and what to do.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"need {need}, cannot make {path}: {error.strerror}; {remedy}") from error


def load_weights(path: Path, wrapper: nn.Module) -> dict[str, Any]:
    """Puts a checkpoint's weights and step sizes into a wrapper; returns the JSON values of its header.

    Raises:
        CheckpointError: if the file is missing or damaged, or belongs to another model.
    """
    tensors, info = load_tensors(path)
    put(tensors, wrapper, path)
    return info


def put(tensors: Mapping[str, Tensor], module: nn.Module, path: Path) -> None:
    """Loads a state dict that came from ``path``.

    Raises:
        CheckpointError: if it belongs to another model.
    """
    own = module.state_dict()
    other = next((n for n, t in tensors.items() if n in own and own[n].dtype != t.dtype), None)
    if other is not None:  # loading would convert it
        raise CheckpointError(
            f"need a model of the type in {path}, {other} is {tensors[other].dtype} there and {own[other].dtype} here; "
            "call torch.set_default_dtype with the former first"
        )
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{path} belongs to another model: {' '.join(str(error).split())[:300]}") from error


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """Of everything in the file: names, types, shapes, values, JSON."""
    digest = hashlib.sha256(f"{FORMAT} {text}".encode())
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
