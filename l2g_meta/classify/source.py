"""What a classifier is built around: the embedded model, a run, an exported folder, a library's encoder, a module."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from l2g_meta.algorithm import L2GWrapper
from l2g_meta.classify.calibration import Calibration
from l2g_meta.classify.photos import Preparation
from l2g_meta.data.images import IMAGENET_MEAN, IMAGENET_STD
from l2g_meta.errors import CheckpointError, L2GError
from l2g_meta.files.reading import read_text
from l2g_meta.files.sealed import opened
from l2g_meta.files.tensors import load_tensors, put, read_info, refuse_given
from l2g_meta.models.heads import PrototypicalHead
from l2g_meta.models.libraries import LIBRARIES, library_weights, preprocessing, size_option
from l2g_meta.models.metric import MetricModel
from l2g_meta.models.pretrained import put_encoder, read_state_dict
from l2g_meta.training import build
from l2g_meta.training.checks import parsed_options
from l2g_meta.training.config import MACHINE, Config

EMBEDDED = Path(__file__).parent / "embedded"  # the exported model that comes with the package
MODEL, WEIGHTS = "model.json", "model.safetensors"  # of an exported folder
FORMAT = 1  # of model.json; raised when an older version could not read it
NOT_BUILT = (*MACHINE, "weights")  # fields of a config that say nothing of its model: where it ran, how it began
IMAGENET_SETS = ("mini-imagenet", "tiered-imagenet")  # whose classes are ImageNet-1k's


@dataclass(frozen=True, eq=False)
class Source:
    """A model, and what is known of it.

    Args:
        model: ``model(task) -> scores``, in evaluation mode, on its device.
        preparation: how images become its inputs; ``None``: not known.
        calibration: from held-out episodes; ``None``: not known.
        values: an exported folder's ``model.json``.
        config: the ``Config`` that it is built from; ``None``: not known.
    """

    model: nn.Module
    preparation: Preparation | None = None
    calibration: Calibration | None = None
    values: dict[str, Any] = field(default_factory=dict)
    config: Any = None

    @cached_property
    def token(self) -> bytes:
        """Stands for the encoder and its weights: equal for equal ones that a config builds."""
        if self.config is None:
            return secrets.token_bytes(32)
        digest = hashlib.sha256(repr(sorted(architecture(self.config).items())).encode())
        for name, t in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(t.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        return digest.digest()

    @property
    def pretrained(self) -> bool:
        """Whether it is an encoder of timm or torchvision whose weights are not from a run."""
        named = self.config is not None and self.config.backbone.partition(":")[0] in LIBRARIES
        return named and bool(self.config.weights or (self.values and not self.values.get("training")))

    def seen(self, data: str, classes: Collection[str]) -> str:
        """What of some classes the weights may have been trained on, in words, or "".

        Args:
            data: name of the data set.
            classes: names of the classes that it is tested on.
        """
        known = self.values.get("classes")
        both = {*classes} & {*map(str, known)} if isinstance(known, list) else ()
        if self.pretrained and data in IMAGENET_SETS:
            verb = "have" if self.config.weights == "default" else "may have"
            return f"the weights {verb} seen ImageNet's classes, and so those of {data}"
        return f"the model was trained on {len(both)} of these {len(classes)} classes" if both else ""


def open_source(
    model: Any = None,
    device: str = "auto",
    *,
    trust: bool = False,
    weights: Path | str | None = None,
    image_size: int | None = None,
) -> Source:
    """A trained model from its folder, a pretrained encoder by its name, or a copy of a module.

    Args:
        model: a folder made by ``l2g train`` or ``l2g export``, by default the model that comes with the package;
            ``timm:NAME``, ``torchvision:NAME`` or ``package.module:Class``, an encoder, with nearest prototypes by
            cosine as its head; ``model(task) -> scores`` or its ``L2GWrapper``; or what this function has opened,
            which is returned.
        device: as ``--device``.
        trust: import the module that a folder may name as its head or backbone, which runs it.
        weights: of an encoder by its name, a file with its state dict; the library's pretrained ones by default.
        image_size: of an encoder by its name, another than its own, in pixels.

    Raises:
        L2GError: if it is none of these, or the folder is missing, damaged, of another kind, or names a module and is
            not trusted.
    """
    place = build.build_device(device)
    if isinstance(model, Source):
        model.model.to(place)
        return model
    if _is_name(model):
        return _open_encoder(model, place, weights, image_size)
    if weights is not None or image_size is not None:
        raise L2GError(f"weights and image_size belong to timm:NAME and other encoders by name, got {model}")
    if isinstance(model, nn.Module):
        module = model.module if isinstance(model, L2GWrapper) else model
        return Source(copy.deepcopy(module).eval().to(place))
    if not isinstance(model, str | os.PathLike | None):
        raise L2GError(f"need a run directory, an exported folder or a torch.nn.Module as model, got {model!r}")
    folder = EMBEDDED if model is None else Path(model)
    if (folder / MODEL).is_file():
        return _open_export(folder, place, trust)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"need a folder made by `l2g train` or `l2g export`, got {folder}; name one")
    return open_run(folder, str(place), trust=trust)


def run_of(model: Any) -> Path | None:
    """The run directory that a command's argument names, or ``None``: nothing, an exported folder, or an encoder."""
    return None if model is None or _is_name(model) or (Path(model) / MODEL).is_file() else Path(model)


def _is_name(model: Any) -> bool:
    """Whether it names an encoder, as ``timm:NAME`` or ``package.module:Class``, and no folder."""
    return isinstance(model, str) and ":" in model and not Path(model).exists()


def open_run(run: Path, device: str | None, *, checkpoint: str = "best", trust: bool = False) -> Source:
    """A trained run's model; the arguments are those of ``load_run``.

    Raises:
        L2GError: as ``load_run``, or if its data or model were given from Python.
    """
    wrapper, config = build.load_run(run, checkpoint=checkpoint, device=device, trust=trust)
    info = read_info(run / f"{checkpoint}.safetensors")
    refuse_given(info, run, "fit a FewShotClassifier around its model, l2g_meta.load_run(run)[0], with inputs as then")
    return Source(wrapper.module, Preparation.of_training(config, info["image_shape"]), config=config)


def architecture(config: Config) -> dict[str, Any]:
    """What of a config it takes to build its model again."""
    return {name: value for name, value in vars(config).items() if name not in NOT_BUILT}


def _open_encoder(name: str, device: torch.device, weights: Path | str | None, image_size: int | None) -> Source:
    """An encoder by its name, with pretrained weights, prepared for as its authors do."""
    config = Config(backbone=name, head="prototypical", distance="cosine", weights=str(weights or "default")).resolved()
    tensors = None if weights is None else read_state_dict(Path(weights))
    encoder = build.build_encoder(name, 3, {})
    if name.partition(":")[0] in LIBRARIES:
        tensors = library_weights(name, 3, {}) if tensors is None else tensors
        preparation = Preparation(**preprocessing(name, encoder, image_size))
        if image_size is not None and (options := size_option(name, encoder, image_size)):
            config = replace(config, backbone_options=options)
            encoder = build.build_encoder(name, 3, parsed_options(options))
    else:
        size = image_size or 224
        usual = Preparation(size, 3, IMAGENET_MEAN, IMAGENET_STD, resize=round(size / 0.875))
        preparation = getattr(encoder, "preparation", usual)
    if tensors is not None:
        put_encoder(tensors, encoder, str(weights or f"the pretrained weights of {name}"))
    head = PrototypicalHead(distance="cosine")
    model = MetricModel(encoder, head, image_shape=preparation.image_shape).eval().to(device)
    return Source(model, preparation, config=config)


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
        build.refuse_modules(config, folder)
    tensors, info = load_tensors(folder / WEIGHTS)
    model = build.build_stored(config, preparation.image_shape, build.n_classes_of(info), tensors, folder / WEIGHTS)
    put({n: t.float() if t.dtype == torch.float16 else t for n, t in tensors.items()}, model, folder / WEIGHTS)
    build.set_precision(config.precision)
    return Source(model.eval().to(device), preparation, calibration, values, config)


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
