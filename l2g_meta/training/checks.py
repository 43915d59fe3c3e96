"""What the settings of a run may be, and which exclude each other; see ``Config.resolved``."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from l2g_meta.errors import L2GError
from l2g_meta.training.objectives import OBJECTIVES
from l2g_meta.training.options import Names, Sizes, flag, parsed_options, types_of

LEARNERS = ("maml-softmax", "meta-lstm")  # classify by adapting on the supports; trained by the episodic objective
SUPERVISED = "supervised"  # the encoder with a linear classifier of the training classes: `l2g pretrain`
METHODS = (*OBJECTIVES, *LEARNERS, SUPERVISED)
NOT_SUPERVISED = (  # fields that mean nothing to SUPERVISED
    "method", "head", "dims", "temperature", "learn_temperature", "reduction", "outer_ways", "outer_shots",
    "inner_lr", "inner_steps", "first_order", "learn_inner_lr", "adapt",
    "pairs", "cuda_graph", "mix",
)  # fmt: skip
HEAD_FLAGS = ("distance", "dims", "temperature", "learn_temperature", "reduction")
TYPES: dict[Any, tuple[type, ...]] = {
    int: (int,),
    float: (int, float),
    str: (str,),
    bool: (bool,),
    Sizes: (int, tuple),
    Names: (tuple,),
}


def check(config: Any) -> None:
    """That the values of a resolved ``Config`` can be, and go together.

    Raises:
        L2GError: naming the flag, what it needs and what it got.
    """
    types = types_of(type(config))
    for f in fields(config):
        kind, value, choices = types[f.name], getattr(config, f.name), f.metadata.get("choices")
        if value is not None and type(value) not in TYPES[kind]:
            names = " or ".join(of.__name__.replace("tuple", "list") for of in TYPES[kind])
            raise L2GError(f"need {flag(f.name)} to be of type {names}, got {value!r}")
        if choices and value is not None and value not in choices:
            raise L2GError(f"need {flag(f.name)} to be one of {', '.join(choices)}; got {value!r}")
        counted = kind in (int, Sizes) and f.name not in ("seed", "split_seed")
        sizes = value if isinstance(value, tuple) else (value,)
        if counted and value is not None and not all(type(size) is int and size >= 1 for size in sizes or (0,)):
            raise L2GError(f"need {flag(f.name)} to be at least 1, got {value}")
    if max(config.seed, config.split_seed) >= 2**63:
        raise L2GError("need --seed and --split-seed below 2**63")
    if "\0" in (config.root or ""):
        raise L2GError("need --root to be a path, got one with a zero byte")
    if config.seed < 0 or config.split_seed < 0:
        raise L2GError("need --seed and --split-seed to be at least 0")
    if config.temperature is not None and not 0 < config.temperature < math.inf:
        raise L2GError(f"need --temperature above 0 and finite, got {config.temperature}")
    if not 0 < config.lr < math.inf:
        raise L2GError(f"need --lr above 0 and finite, got {config.lr}")
    if not 0 <= config.inner_lr < math.inf:
        raise L2GError(f"need --inner-lr of at least 0 and finite, got {config.inner_lr}")
    if config.clip_norm is not None and not 0 < config.clip_norm < math.inf:
        raise L2GError(f"need --clip-norm above 0 and finite, got {config.clip_norm}")
    if config.clip_norm is not None and config.cuda_graph:
        by_default = ", the default of --method meta-lstm" if config.method == "meta-lstm" else ""
        raise L2GError(f"--cuda-graph does not clip, got --clip-norm {config.clip_norm:g}{by_default}; leave one out")
    if not 0 <= config.mix < 1:
        raise L2GError(f"need --mix of at least 0 and below 1, got {config.mix}")
    if config.method not in ("l2g", "maml") and config.mix:
        raise L2GError(f"--mix belongs to l2g and maml, got --method {config.method}")
    if not 0 <= config.weight_decay < math.inf:
        raise L2GError(f"need --weight-decay of at least 0 and finite, got {config.weight_decay}")
    if config.resized_crop is not None and not (config.augment and 0 < config.resized_crop <= 1):
        got = f"{config.resized_crop} {'with' if config.augment else 'without'} --augment"
        raise L2GError(f"need --augment and a --resized-crop above 0 and at most 1, got {got}")
    _check_learner(config)
    _check_supervised(config)
    _check_names(config)
    if config.tasks_per_update is not None and config.method == "l2g":
        raise L2GError("need --pairs for --method l2g, got --tasks-per-update; an update has 2 × pairs tasks")
    if config.cuda_graph and (config.tasks_per_update or 0) % 2:
        raise L2GError(f"need an even --tasks-per-update with --cuda-graph, got {config.tasks_per_update}")


def _check_names(config: Any) -> None:
    for name in ("adapt", "backbone_options"):
        value = getattr(config, name)
        if value is not None and not (value and all(isinstance(text, str) for text in value)):
            raise L2GError(f"need {flag(name)} to be one or more texts, got {value!r}")
    parsed_options(config.backbone_options)
    if config.adapt is not None and config.method not in ("l2g", "maml"):
        raise L2GError(f"--adapt belongs to --method l2g and maml, got --method {config.method}; leave it out")
    if config.weight_decay and config.learn_inner_lr:
        raise L2GError("--weight-decay would shrink learned step sizes too; leave it or --learn-inner-lr out")


def _check_supervised(config: Any) -> None:
    if config.method != SUPERVISED:
        if config.batch is not None or config.head == "linear":
            raise L2GError(f"--batch and --head linear belong to --method supervised, got --method {config.method}")
        return
    filled = ("method", "head", "outer_ways", "outer_shots", "inner_lr", "inner_steps", "pairs")
    given = [name for name in NOT_SUPERVISED if name not in filled and getattr(config, name)]
    if given or config.head != "linear":
        flags = ", ".join(map(flag, given if config.head == "linear" else ["head"]))
        raise L2GError(f"--method supervised does not take {flags}; leave it out")


def _check_learner(config: Any) -> None:
    if config.method not in LEARNERS:
        if config.head == "softmax":
            raise L2GError(
                f"--head softmax belongs to --method {' or '.join(LEARNERS)}, got --method "
                f"{config.method}, which classifies unseen classes without adapting"
            )
        return
    if config.head != "softmax":
        raise L2GError(f"--method {config.method} has no metric head, got --head {config.head}; leave it out")
    given = [name for name in HEAD_FLAGS if getattr(config, name)]
    if config.method == "meta-lstm" and config.first_order:
        given.append("first_order")
    if given:
        flags = ", ".join(map(flag, given))
        raise L2GError(f"--method {config.method} does not take {flags}; leave them out")
    if config.learn_inner_lr:
        raise L2GError(f"--learn-inner-lr belongs to l2g and maml, got --method {config.method}")
    for name in ("ways", "outer_ways"):
        if getattr(config, name) != config.ways or not isinstance(config.ways, int):
            raise L2GError(
                f"--method {config.method} has one output per class and needs one number of ways, got --ways "
                f"{config.ways} and --outer-ways {config.outer_ways}"
            )
