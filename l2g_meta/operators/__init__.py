"""Convolution and norms as pure functions with an exact, fast double backward.

No GPU has run them yet: on CUDA, PyTorch's own operators run unless ``L2G_FAST_CUDA=1`` is set. ``make gpu`` sets it.
This module reads the variable once, when it is imported.
"""

import inspect
import os

from torch.autograd import Function

DEVICES = ("cpu", "cuda") if os.environ.get("L2G_FAST_CUDA") == "1" else ("cpu",)


class Operator(Function):
    """A function that keeps its signature, which PyTorch works out anew at each call: 1 % of a step on small images."""

    def __init_subclass__(cls) -> None:
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
