"""Values of flags, from their text."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from l2g_meta.training.checks import Names, Sizes

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


TYPES: dict[Any, Any] = {int: whole, float: number, str: str, Sizes: sizes, Names: str}  # of a setting's kind
METAVARS = {int: "N", float: "X", str: "NAME", Sizes: "N,N", Names: "NAME"}
