"""What the settings of a run may be, and which exclude each other; see ``Config.resolved``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import field, fields
from typing import Any, get_type_hints

from l2g_meta.errors import L2GError
from l2g_meta.training.objectives import OBJECTIVES

LEARNERS = ("maml-softmax", "meta-lstm")  # classify by adapting on the supports; trained by the episodic objective
SUPERVISED = "supervised"  # the encoder with a linear classifier of the training classes: `l2g pretrain`
METHODS = (*OBJECTIVES, *LEARNERS, SUPERVISED)
HEAD_OF = {**dict.fromkeys(LEARNERS, "softmax"), SUPERVISED: "linear"}  # the others have a metric head
HEAD_FLAGS = ("distance", "dims", "temperature", "learn_temperature", "reduction")
NOT_BILEVEL = ("batch", "mix", "adapt")
UNUSED = {  # fields that a method does not take
    "l2g": ("batch", "tasks_per_update"),
    "maml": ("batch",),
    "episodic": NOT_BILEVEL,
    "maml-softmax": (*NOT_BILEVEL, *HEAD_FLAGS, "learn_inner_lr"),
    "meta-lstm": (*NOT_BILEVEL, *HEAD_FLAGS, "learn_inner_lr", "first_order"),
    SUPERVISED: (*NOT_BILEVEL[1:], *HEAD_FLAGS[1:], "learn_inner_lr", "first_order"),
}
NOT_SUPERVISED = (  # with those that have a default
    *UNUSED[SUPERVISED], "method", "head", "outer_ways", "outer_shots", "inner_lr", "inner_steps", "pairs",
)  # fmt: skip
Sizes = int | tuple[int, ...]  # a number, or several to draw from for each task
Names = tuple[str, ...]
# Kinds of settings.
WORDS: dict[Any, str] = {
    int: "int", float: "float", str: "str", bool: "bool", Sizes: "int or list", Names: "texts"
}  # fmt: skip

Value = bool | int | float | str | None | tuple[Any, ...]
NAMED_VALUES: dict[str, Value] = {"true": True, "false": False, "none": None}


def setting(default: Any, help: str, **rules: Any) -> Any:
    """A field of a dataclass of settings, which is also a flag of the command line.

    Args:
        default: its value, if none is given.
        help: of the flag.
        rules: ``choices``, or the bounds of numbers: ``least`` or ``above``, and ``below`` or ``most`` (whole numbers
            are at least 1 unless told otherwise); ``nargs`` and ``metavar`` of the flag.
    """
    return field(default=default, metadata={"help": help, **rules})


def kinds(settings: type) -> dict[str, Any]:
    """The kind of each field of such a dataclass, one of ``WORDS``: its type, ``None`` left out.

    Example:
        >>> from l2g_meta.training.config import Config
        >>> kinds(Config)["ways"] == Sizes, kinds(Config)["adapt"] == Names, kinds(Config)["clip_norm"]
        (True, True, <class 'float'>)
    """
    hints = get_type_hints(settings)
    return {f.name: next(kind for kind in WORDS if hints[f.name] in (kind, kind | None)) for f in fields(settings)}


def check_settings(config: Any) -> None:
    """That each value of a dataclass of ``setting`` is of its kind, and within its bounds; ``None`` is none.

    Raises:
        L2GError: naming the flag, what it needs and what it got.
    """
    kind_of, hints = kinds(type(config)), get_type_hints(type(config))
    for f in fields(config):
        value, kind, rules, name = getattr(config, f.name), kind_of[f.name], f.metadata, flag(f.name)
        if value is None and hints[f.name] != kind:  # it may be
            continue
        fitting = {float: (int, float), Sizes: (int, tuple), Names: (tuple,)}.get(kind, (kind,))
        if type(value) not in fitting:
            raise L2GError(f"need {name} to be of type {WORDS[kind]}, got {value!r}")
        if "choices" in rules and value not in rules["choices"]:
            raise L2GError(f"need {name} to be one of {', '.join(rules['choices'])}; got {value!r}")
        if kind in (int, Sizes):
            least, most = rules.get("least", 1), rules.get("most")
            sizes = value if isinstance(value, tuple) else (value,)
            if not sizes or not all(type(size) is int and least <= size <= (most or 2**63 - 1) for size in sizes):
                bound = "" if most is None else f" and at most {most:,}"
                raise L2GError(f"need {name} to be at least {least}{bound}, got {value}")
        if kind is float:
            least, above, below = (rules.get(bound) for bound in ("least", "above", "below"))
            low = value > above if least is None else value >= least
            finite = abs(value) < 2**63 if type(value) is int else math.isfinite(value)
            if not (low and finite and (below is None or value < below)):
                first = f"above {above}" if least is None else f"of at least {least}"
                last = "finite" if below is None else f"below {below}"
                raise L2GError(f"need {name} {first} and {last}, got {value}")


def check(config: Any) -> None:
    """That the values of a resolved ``Config`` can be, and go together.

    Raises:
        L2GError: naming the flag, what it needs and what it got.
    """
    check_settings(config)
    if "\0" in (config.root or ""):
        raise L2GError("need --root to be a path, got one with a zero byte")
    head = HEAD_OF.get(config.method)
    if config.head != head and (head is not None or config.head in HEAD_OF.values()):
        need = "a metric head" if head is None else f"no --head, its own being {head},"
        raise L2GError(f"need {need} for --method {config.method}, got --head {config.head}; leave it out")
    if unused := [flag(name) for name in UNUSED[config.method] if getattr(config, name)]:
        raise L2GError(f"--method {config.method} does not take {', '.join(unused)}; leave that out")
    if config.method in LEARNERS and not (isinstance(config.ways, int) and config.ways == config.outer_ways):
        raise L2GError(
            f"--method {config.method} has one output per class and needs one number of ways, got --ways "
            f"{config.ways} and --outer-ways {config.outer_ways}"
        )
    for name in ("adapt", "backbone_options"):
        value = getattr(config, name)
        if value is not None and not (value and all(isinstance(text, str) for text in value)):
            raise L2GError(f"need {flag(name)} to be one or more texts, got {value!r}")
    parsed_options(config.backbone_options)
    if config.weight_decay and config.learn_inner_lr:
        raise L2GError("--weight-decay would shrink learned step sizes too; leave it or --learn-inner-lr out")


def flag(name: str) -> str:
    """A field as the command line has it.

    Example:
        >>> flag("inner_lr")
        '--inner-lr'
    """
    return "--" + name.replace("_", "-")


def parsed_options(given: Sequence[str] | None) -> dict[str, Value]:
    """Python values of ``NAME=VALUE`` texts: numbers, true, false, none, several by commas, else the text.

    Raises:
        L2GError: for a text of another form, or a name given twice.

    Example:
        >>> parsed_options(["widths=64,128", "drop_rate=0.1", "act=gelu", "bias=false"])
        {'widths': (64, 128), 'drop_rate': 0.1, 'act': 'gelu', 'bias': False}
    """
    found: dict[str, Value] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier() or name in found:
            raise L2GError(f"need options as NAME=VALUE, each name once, got {text!r}; for example drop_rate=0.1")
        found[name] = tuple(map(_value, value.split(","))) if "," in value else _value(value)
    return found


def _value(text: str) -> Value:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return NAMED_VALUES.get(text.lower(), text)
