"""Convolution and norms as pure functions with an exact, fast double backward.

No GPU has run them yet: on CUDA, PyTorch's own operators run unless ``L2G_FAST_CUDA=1`` is set. ``make gpu`` sets it.
This module reads the variable once, when it is imported.
"""

import inspect
import os
from functools import partialmethod
from typing import Any

from torch.autograd import Function
from torch.autograd.function import BackwardCFunction

DEVICES = ("cpu", "cuda") if os.environ.get("L2G_FAST_CUDA") == "1" else ("cpu",)


class Operator(Function):
    """A function that keeps its signature, which PyTorch works out anew at each call: 1 % of a step on small images."""

    def __init_subclass__(cls) -> None:
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]


def watched(function: Any) -> Any:
    """A function whose nodes lose ``plain`` when somebody hooks onto them, or onto what they made."""
    for name in ("register_hook", "register_prehook", "_register_hook_dict"):
        setattr(function._backward_cls, name, partialmethod(_hooked, name))
    return function


def is_plain(node: Any, function: Any) -> bool:
    """Whether a node is that of a watched function, in its plain form, without hooks."""
    return type(node) is function._backward_cls and node.plain


def _hooked(node: Any, name: str, *hook: Any) -> Any:
    node.plain = False
    return getattr(BackwardCFunction, name)(node, *hook)
