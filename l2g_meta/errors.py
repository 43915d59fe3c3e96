"""Errors that say what was needed, what came, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
INSTALL_LEARN2LEARN = "pip install --config-settings=--build-option=build_ext learn2learn==0.2.0"


class L2GError(ValueError):
    """Base of the library's own errors: wrong input, with need, got and remedy in the message."""


class DataError(L2GError):
    """A data set is missing, damaged, or too small for the tasks asked of it."""


class FitError(L2GError):
    """Parts do not fit: an encoder's features and a head, or a model's scores and a task."""


class CheckpointError(L2GError):
    """A run directory or checkpoint cannot be used."""


class NotFiniteError(L2GError):
    """A loss, a gradient or a weight is NaN or infinite."""


def check_argument(name: str, value: Any, need: str, fits: bool) -> None:
    """That an argument is what it is said to be.

    Raises:
        FitError: if it does not fit.

    Example:
        >>> check_argument("inner_steps", 0, "at least 1", 0 >= 1)
        Traceback (most recent call last):
        l2g_meta.errors.FitError: need inner_steps to be at least 1, got 0
    """
    if not fits:
        raise FitError(f"need {name} to be {need}, got {value!r}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about a word that is not known.

    Example:
        >>> did_you_mean("prototipical", ["prototypical", "relation"]), did_you_mean("x", ["relation"])
        ('; did you mean prototypical?', '')
    """
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def one_of(name: str, value: T, choices: Sequence[T]) -> T:
    """The value of an argument, which must be one of these.

    Raises:
        FitError: if it is not.

    Example:
        >>> one_of("reduction", "mean", ("mean", "sum"))
        'mean'
    """
    if value not in choices:
        raise FitError(f"need {name} to be one of {', '.join(map(str, choices))}; got {value!r}")
    return value
