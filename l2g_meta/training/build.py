"""From a config to the things a run is made of: data, model, wrapper, tasks."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2g_meta import data
from l2g_meta.algorithm import L2GWrapper
from l2g_meta.data.augment import Augment
from l2g_meta.data.batches import Batches
from l2g_meta.data.dataset import ClassDataset
from l2g_meta.data.pairs import TaskPairs
from l2g_meta.errors import CheckpointError, FitError, L2GError, did_you_mean
from l2g_meta.files.tensors import image_shape_of, load_tensors, put
from l2g_meta.models.backbones import BACKBONES
from l2g_meta.models.heads import HEADS
from l2g_meta.models.libraries import LIBRARIES
from l2g_meta.models.linear_head import LinearHead
from l2g_meta.models.maml import SoftmaxMAML
from l2g_meta.models.meta_lstm import MetaLSTM
from l2g_meta.models.metric import MetricModel, SoftmaxClassifier, build_head, feature_shape
from l2g_meta.training.checks import LEARNERS, SUPERVISED, parsed_options
from l2g_meta.training.config import Config
from l2g_meta.training.objectives import OBJECTIVES, Objective, episodic

PARTS = ("head", "backbone")  # of a model, which a config may name as package.module:Class


def build_device(name: str) -> torch.device:
    """The device of this name, or for ``auto`` the best there is.

    Raises:
        FitError: if there is no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        if name == "meta":
            raise RuntimeError("it has no data")
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise FitError(f"cannot use --device {name}: {reason}; choose auto, cpu, cuda or mps") from error


def set_precision(precision: str) -> None:
    """Lets float32 products on CUDA use TF32 (``"tf32"``), or not; for the whole process."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def build_data(config: Config, split: str) -> ClassDataset:
    """One split of the config's data set."""
    options = {"split_seed": config.split_seed} if config.data == "folder" else {}
    return data.load(
        config.data, split, root=config.root, image_size=config.image_size, download=config.download, **options
    )


def build_model(config: Config, image_shape: tuple[int, ...], n_classes: int | None = None) -> nn.Module:
    """The config's model for images (C, H, W), initialised from ``config.seed``; PyTorch's generator is left as it was.

    An encoder with a metric head, or with a softmax for a method that adapts on the supports, or with a linear
    classifier of ``n_classes`` training classes for supervised training.

    Raises:
        FitError: if a name is unknown, an option is not the head's, or encoder and head do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        encoder = build_encoder(config.backbone, image_shape[0], parsed_options(config.backbone_options))
        shape = feature_shape(encoder, image_shape)
        if config.method in LEARNERS:
            return _build_learner(config, encoder, math.prod(shape))
        if config.method == SUPERVISED:
            if n_classes is None:
                raise FitError("need the number of training classes for supervised training, got none; give n_classes")
            classifier = LinearHead(math.prod(shape), n_classes, distance=config.distance or "cosine")
            return MetricModel(encoder, classifier, image_shape=image_shape)
        head = _named(config.head, HEADS, "head")
        return MetricModel(encoder, build_head(head, shape, **config.head_options), image_shape=image_shape)


def _build_learner(config: Config, encoder: nn.Module, dim: int) -> nn.Module:
    classifier = SoftmaxClassifier(encoder, dim, config.ways)  # type: ignore[arg-type]
    if config.method == "meta-lstm":
        return MetaLSTM(classifier, config.ways, steps=config.inner_steps)  # type: ignore[arg-type]
    return SoftmaxMAML(
        classifier,
        config.ways,  # type: ignore[arg-type]
        inner_lr=config.inner_lr,
        inner_steps=config.inner_steps,
        first_order=config.first_order,
    )


def build_objective(config: Config) -> Objective:
    """What the config's method minimises."""
    return OBJECTIVES.get(config.method, episodic)


def build_wrapper(config: Config, model: nn.Module) -> L2GWrapper:
    """The model with the config's inner step."""
    return L2GWrapper(
        model,
        config.inner_lr,
        adapt=config.adapt,
        first_order=config.first_order,
        learn_inner_lr=config.learn_inner_lr or False,  # type: ignore[arg-type]
        inner_steps=config.inner_steps,
        mix=config.mix,
        autocast=torch.bfloat16 if config.precision == "bf16" else None,
    )


def build_optimizer(config: Config, wrapper: L2GWrapper) -> torch.optim.Optimizer:
    """Adam (eq. 5), or SGD with momentum 0.9."""
    if config.optimizer == "adam":
        return torch.optim.Adam(wrapper.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(wrapper.parameters(), lr=config.lr, weight_decay=config.weight_decay, momentum=0.9)


def build_pairs(config: Config, dataset: Any, device: torch.device) -> TaskPairs | Batches:
    """The training stream of the config: pairs of tasks, or for supervised training batches of labelled images."""
    augment = Augment() if config.augment else None
    if config.method == SUPERVISED:
        return Batches(dataset, config.batch or 128, seed=config.seed, augment=augment, device=device)
    return TaskPairs(
        dataset,
        ways=config.ways,
        shots=config.shots,
        queries=config.queries,
        outer_ways=config.outer_ways,
        outer_shots=config.outer_shots,
        seed=config.seed,
        augment=augment,
        device=device,
    )


def load_run(
    run: Path | str, *, checkpoint: str = "best", device: str | None = None, trust: bool = False
) -> tuple[L2GWrapper, Config]:
    """A trained run's wrapper, on its device and in evaluation mode, and its config.

    Args:
        run: folder made by ``l2g train``.
        checkpoint: ``"best"`` on validation, ``"last"``, ``"average"``, or ``"after-N"``, see ``Config``.
        device: another device than the config's.
        trust: import the module that the run may name, ``package.module:Class``, which runs it.

    Raises:
        L2GError: if the folder is no run, the checkpoint is missing or damaged, or the run names a module and is not
            trusted.
    """
    run = Path(run)
    config = Config.load(run / "config.json")
    if not trust:
        refuse_modules(config, run)
    path = run / f"{checkpoint}.safetensors"
    tensors, info = load_tensors(path)
    if "model" in info.get("given", []):
        raise CheckpointError(
            f"{path} holds a model given from Python; build that model and call "
            "l2g_meta.files.tensors.load_weights(path, L2GWrapper(model, inner_lr))"
        )
    model = build_stored(config, image_shape_of(info, path), n_classes_of(info), tensors, path)
    wrapper = build_wrapper(config, model)
    put(tensors, wrapper, path)
    config = config if device is None else replace(config, device=device)
    set_precision(config.precision)
    return wrapper.to(build_device(config.device)).eval(), config


def build_stored(
    config: Config, image_shape: tuple[int, ...], n_classes: int | None, tensors: Mapping[str, Tensor], path: Path
) -> nn.Module:
    """As ``build_model``, for weights from ``path``; a config that asks for more memory than they take gets none.

    Raises:
        CheckpointError: if the model has more values than the file.
        FitError: as ``build_model``.
    """
    if not any(_names_module(config, kind) for kind in PARTS):  # those may draw on what is there alone
        need, got = 0, sum(t.numel() for t in tensors.values())
        with suppress(Exception), torch.device("meta"):  # a real one says so again, a library's may need memory
            need = sum(t.numel() for t in build_model(config, image_shape, n_classes).state_dict().values())
        if need > got:
            raise CheckpointError(f"{path} belongs to another model: it has {got:,} values, its config {need:,}")
    try:
        return build_model(config, image_shape, n_classes)
    except L2GError as error:
        raise type(error)(f"{path.parent}: {error}") from error


def n_classes_of(info: Mapping[str, Any]) -> int | None:
    """The training classes of a supervised run, from the header of its checkpoints.

    Raises:
        CheckpointError: if they are no number that can be.
    """
    n = info.get("n_classes")
    if n is not None and not (type(n) is int and 1 < n <= 2**20):
        raise CheckpointError(f"need the number of training classes in a checkpoint's header, got {n!r}; use another")
    return n


def refuse_modules(config: Config, path: Path, *, named: Collection[str] = ()) -> None:
    """That a stored config names this library's parts alone, or those of timm and torchvision.

    Args:
        config: as it was stored.
        path: where.
        named: of ``head`` and ``backbone`` those that the command names itself.

    Raises:
        CheckpointError: if it names a module, which would be imported and so run.
    """
    for kind in PARTS:
        if kind not in named and _names_module(config, kind):
            raise CheckpointError(
                f"{path} names a module as its {kind}, {getattr(config, kind)}, which would be run; look at it, then "
                "give --trust (trust=True in Python)"
            )


def _names_module(config: Config, kind: str) -> bool:
    name = getattr(config, kind)
    return ":" in name and not (kind == "backbone" and name.partition(":")[0] in LIBRARIES)


def _named(name: str, known: dict[str, Any], kind: str) -> Callable[..., nn.Module]:
    """A built-in part by its name, or a user's by ``package.module:Class``."""
    if name in known:
        return known[name]
    module, colon, attribute = name.partition(":")
    others = [f"{library}:NAME" for library in LIBRARIES] if kind == "backbone" else []
    if not colon:
        raise FitError(
            f"need --{kind} to be one of {', '.join([*known, *others])} or package.module:Class; got {name!r}"
            f"{did_you_mean(name, known)}"
        )
    try:
        with suppress(OSError):  # it is gone
            if (here := os.getcwd()) not in sys.path:
                sys.path.append(here)  # last: no file of the current folder stands before what is installed
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a user's module raises
        raise FitError(
            f"cannot load --{kind} {name}: {error}; the module must import without error from this folder, "
            "PYTHONPATH or an installed package"
        ) from error
    # The name may come from the config of somebody else's run: os:system is not to be called.
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        raise FitError(f"need a class derived from torch.nn.Module as --{kind}, {name} is none; wrap it in one")
    return found


def build_encoder(name: str, in_channels: int, options: Mapping[str, Any]) -> nn.Module:
    """An encoder of ours, of timm or torchvision, or a user's, for images of that many channels.

    Raises:
        FitError: if the name is unknown, or the encoder does not take the options.
    """
    library, _, model = name.partition(":")
    if library in LIBRARIES:
        return LIBRARIES[library](model, in_channels, options)
    encoder = _named(name, BACKBONES, "backbone")
    try:
        return encoder(in_channels, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, L2GError) or "can't allocate memory" in str(error):
            raise
        given = ", ".join(list(options)[:9]) or "none"
        raise FitError(f"need a Backbone(in_channels, **options), got options {given}: {error}") from error
