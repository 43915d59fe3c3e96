"""What a classifier is built around: a run directory, an exported folder, or a module."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from l2g_meta.algorithm import L2GWrapper
from l2g_meta.classify.calibration import Calibration
from l2g_meta.classify.photos import Preparation
from l2g_meta.errors import CheckpointError, L2GError
from l2g_meta.files.reading import read_text
from l2g_meta.files.sealed import opened
from l2g_meta.files.tensors import load_tensors, put, read_info
from l2g_meta.training.build import build_device, build_stored, load_run, n_classes_of, refuse_modules, set_precision
from l2g_meta.training.config import MACHINE, Config

MODEL, WEIGHTS = "model.json", "model.safetensors"  # of an exported folder
FORMAT = 1  # of model.json; raised when an older version could not read it
NOT_BUILT = (*MACHINE, "weights")  # fields of a config that say nothing of its model: where it ran, how it began


@dataclass(frozen=True, eq=False)
class Source:
    """A model, and what is known of it.

    Args:
        model: ``model(task) -> scores``, in evaluation mode, on its device.
        preparation: how images become its inputs; ``None``: not known.
        calibration: from held-out episodes; ``None``: not known.
        values: an exported folder's ``model.json``.
    """

    model: nn.Module
    preparation: Preparation | None = None
    calibration: Calibration | None = None
    values: dict[str, Any] = field(default_factory=dict)


def open_source(model: Any, device: str = "auto", *, trust: bool = False) -> Source:
    """A trained model from its folder, or a copy of a module.

    Args:
        model: a folder made by ``l2g train`` or ``l2g export``; ``model(task) -> scores`` or its ``L2GWrapper``; or
            what this function has opened, which is returned.
        device: as ``--device``.
        trust: import the module that a folder may name as its head or backbone, which runs it.

    Raises:
        L2GError: if it is none of these, or the folder is missing, damaged, of another kind, or names a module and is
            not trusted.
    """
    place = build_device(device)
    if isinstance(model, Source):
        model.model.to(place)
        return model
    if isinstance(model, nn.Module):
        module = model.module if isinstance(model, L2GWrapper) else model
        return Source(copy.deepcopy(module).eval().to(place))
    if not isinstance(model, str | os.PathLike):
        raise L2GError(f"need a run directory, an exported folder or a torch.nn.Module as model, got {model!r}")
    folder = Path(model)
    if (folder / MODEL).is_file():
        return _open_export(folder, place, trust)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"need a folder made by `l2g train` (with config.json) or by `l2g export` (with {MODEL}), got {folder}; "
            "name one"
        )
    wrapper, config = load_run(folder, device=str(place), trust=trust)
    info = read_info(folder / "best.safetensors")
    if "data" in info.get("given", []):
        raise CheckpointError(
            f"{folder} was given its data from Python, so that how its images were prepared is not known; pass its "
            "model instead, l2g_meta.training.build.load_run(folder)[0], with inputs as in training"
        )
    return Source(wrapper.module, Preparation.of_training(config, info["image_shape"]))


def architecture(config: Config) -> dict[str, Any]:
    """What of a config it takes to build its model again."""
    return {name: value for name, value in vars(config).items() if name not in NOT_BUILT}


def _open_export(folder: Path, device: torch.device, trust: bool) -> Source:
    values = read_values(folder)
    try:
        preparation = Preparation.from_json(values.get("preparation") or {})
        calibration = None if values.get("calibration") is None else Calibration.from_json(values["calibration"])
        config = Config.from_json(values["architecture"]).resolved()
    except L2GError as error:
        raise CheckpointError(f"{folder / MODEL}: {error}") from error
    except Exception as error:  # names and values of any kind
        raise CheckpointError(f"need an architecture in {folder / MODEL}, got: {error!r}; export again") from error
    if not trust:
        refuse_modules(config, folder)
    tensors, info = load_tensors(folder / WEIGHTS)
    model = build_stored(config, preparation.image_shape, n_classes_of(info), tensors, folder / WEIGHTS)
    put({n: t.float() if t.dtype == torch.float16 else t for n, t in tensors.items()}, model, folder / WEIGHTS)
    set_precision(config.precision)
    return Source(model.eval().to(device), preparation, calibration, values)


def read_values(folder: Path) -> dict[str, Any]:
    """The JSON object in an exported folder's ``model.json``.

    Raises:
        CheckpointError: if it is something else, or of a later version.
    """
    path = folder / MODEL
    try:
        values = opened(json.loads(read_text(path)))
        if not isinstance(values, dict) or type(values.get("format")) is not int:
            raise ValueError("no object with a format")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"need an exported model in {path}, got: {error}; export the run again") from error
    if values["format"] > FORMAT:
        raise CheckpointError(f"{path} has format {values['format']}, this version of l2g-meta reads {FORMAT}; upgrade")
    return values
