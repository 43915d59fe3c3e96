"""Flags: values from their text, and a flag for each field of a dataclass of settings."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import Field, fields
from functools import partial
from typing import Any

from l2g_meta.training.checks import Names, Sizes, flag, kinds

Arguments = argparse._ActionsContainer  # a parser, or a group of its arguments


def natural(text: str, *, least: int = 0) -> int:
    """A whole number of at least ``least``.

    Example:
        >>> natural("3", least=1)
        3
    """
    need = f"need a whole number of at least {least}, got"
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{need} {text!r}") from error
    if value < least:
        raise argparse.ArgumentTypeError(f"{need} {value}")
    return value


positive = partial(natural, least=1)


def whole(text: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"need a whole number, got {text!r}") from error


def number(text: str) -> float:
    """A number.

    Example:
        >>> number("1e-3")
        0.001
    """
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"need a number, got {text!r}") from error


def sizes(text: str) -> int | tuple[int, ...]:
    """A number, or several as 1,5,10."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"need a number, or several as 1,5,10; got {text!r}") from error
    return found[0] if len(found) == 1 else found


VALUES: dict[Any, tuple[Any, str]] = {  # how a field's type is read, and what stands for it in the help
    int: (whole, "N"),
    float: (number, "X"),
    str: (str, "NAME"),
    Sizes: (sizes, "N,N"),
    Names: (str, "NAME"),
}

BOUNDS = ("least", "most", "above", "below")  # of numbers, which ``check_settings`` looks at


def add_fields(
    parser: argparse.ArgumentParser, settings: type, groups: dict[str, str], leave_out: Collection[str] = ()
) -> dict[str, Any]:
    """A flag for each field of a dataclass, which has its help as metadata; returns the groups by title.

    Args:
        parser: gets the flags.
        settings: the dataclass.
        groups: title of each group by the field that it begins with.
        leave_out: fields that get none.
    """
    types, made = kinds(settings), {}
    for field in fields(settings):
        if field.name in groups:
            title = groups[field.name]
            group = made[title] = parser.add_argument_group(title)
        if field.name not in leave_out:
            group.add_argument(flag(field.name), default=argparse.SUPPRESS, **_options(field, types[field.name]))
    return made


def _options(field: Field[Any], kind: Any) -> dict[str, Any]:
    options = {name: rule for name, rule in field.metadata.items() if name not in BOUNDS}
    if field.default is not None and field.default is not False and field.default != "":
        options["help"] += f" (default: {field.default})"
    if kind is bool:
        return options | {"action": "store_true"}
    options["type"], metavar = VALUES[kind]
    return options if "choices" in options else {"metavar": metavar} | options


def given(args: argparse.Namespace, settings: type) -> dict[str, Any]:
    """The fields of a dataclass that the arguments have."""
    return {field.name: getattr(args, field.name) for field in fields(settings) if hasattr(args, field.name)}
