"""Settings: their flags and types, and options of parts that the config does not know, as NAME=VALUE."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, get_args, get_type_hints

from l2g_meta.errors import L2GError

Value = bool | int | float | str | None | tuple[Any, ...]
WORDS: dict[str, Value] = {"true": True, "false": False, "none": None}
Sizes = int | tuple[int, ...]  # a number, or several to draw from for each task
Names = tuple[str, ...]


def flag(name: str) -> str:
    """A field as the command line has it.

    Example:
        >>> flag("inner_lr")
        '--inner-lr'
    """
    return "--" + name.replace("_", "-")


def types_of(settings: type) -> dict[str, Any]:
    """The type of each field of a dataclass, without ``None``.

    Example:
        >>> from l2g_meta.training.config import Config
        >>> types_of(Config)["seed"], types_of(Config)["temperature"]
        (<class 'int'>, <class 'float'>)
    """

    def given(hint: Any) -> Any:
        kinds = [kind for kind in get_args(hint) if kind is not NoneType]
        return functools.reduce(operator.or_, kinds) if isinstance(hint, UnionType) else hint

    return {name: given(hint) for name, hint in get_type_hints(settings).items()}


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
    return WORDS.get(text.lower(), text)
