"""Passes over feature maps that batch normalisation is made of, one file per way to run them."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from torch import Tensor

from l2g_meta.operators.kernels import aten


def of(x: Tensor) -> ModuleType:
    """The module that runs the passes over such maps: ATen's, for any device.

    ``L2G_KERNELS=triton`` in the environment asks for Triton's, where they take the maps: float32, channels-last, on
    CUDA. They have not run on a GPU, and are not the default there.

    Raises:
        ImportError: if they are asked for, and Triton is not installed.
    """
    if not x.is_cuda or os.environ.get("L2G_KERNELS") != "triton":
        return aten
    fused = importlib.import_module("l2g_meta.operators.kernels.triton")
    return fused if fused.takes(x) else aten
