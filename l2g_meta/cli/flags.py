"""Flags: values from their text, and a flag for each field of a dataclass of settings."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from dataclasses import Field, fields
from typing import Any

from l2g_meta.training.checks import Names, Sizes, flag, kinds

Arguments = argparse._ActionsContainer  # a parser, or a group of its arguments


def parsed(kind: Callable[[str], Any], need: str) -> Callable[[str], Any]:
    """A flag's value from its text.

    Args:
        kind: makes the value, or raises ``ValueError``.
        need: what is needed, in words.

    Example:
        >>> parsed(float, "a number")("1e-3")
        0.001
    """

    def value(text: str) -> Any:
        try:
            return kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"need {need}, got {text!r}") from error

    return value


def at_least(least: int) -> Callable[[str], int]:
    """A whole number of at least ``least``.

    Example:
        >>> at_least(1)("3")
        3
    """

    def counted(text: str) -> int:
        if (value := int(text)) < least:
            raise ValueError(text)
        return value

    return parsed(counted, f"a whole number of at least {least}")


def _sizes(text: str) -> int | tuple[int, ...]:
    found = tuple(map(int, text.split(",")))
    return found[0] if len(found) == 1 else found


natural, positive = at_least(0), at_least(1)
number = parsed(float, "a number")
VALUES: dict[Any, tuple[Any, str]] = {  # how a field's type is read, and what stands for it in the help
    int: (parsed(int, "a whole number"), "N"),
    float: (number, "X"),
    str: (str, "NAME"),
    Sizes: (parsed(_sizes, "a number, or several as 1,5,10"), "N,N"),
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
