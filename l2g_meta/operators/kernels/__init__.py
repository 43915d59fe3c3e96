"""Passes over feature maps that batch normalisation is made of, one file per way to run them."""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType

from torch import Tensor

from l2g_meta.operators.kernels import aten


def of(x: Tensor) -> ModuleType:
    """The module that runs the passes over such maps: Triton's on a CUDA device where it can, else ATen's.

    ``L2G_KERNELS=aten`` in the environment turns Triton off.
    """
    fused = _triton() if x.is_cuda else None
    return fused if fused is not None and fused.takes(x) else aten


@functools.cache
def _triton() -> ModuleType | None:
    if os.environ.get("L2G_KERNELS") == "aten" or importlib.util.find_spec("triton") is None:
        return None
    from l2g_meta.operators.kernels import triton

    return triton
