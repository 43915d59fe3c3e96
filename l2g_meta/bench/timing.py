"""Wall time of functions, the device's work included, and what it was measured on."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from l2g_meta import operators


def interleaved(functions: Mapping[str, Callable[[], Any]], *, repeats: int) -> dict[str, list[float]]:
    """Seconds of each call; all functions once untimed, then in turn, ``repeats`` times."""
    for function in functions.values():
        function()
    turns = [{name: seconds(function) for name, function in functions.items()} for _ in range(repeats)]
    return {name: [turn[name] for turn in turns] for name in functions}


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of one call."""
    began = _now()
    function()
    return _now() - began


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def describe_machine(device: torch.device | str) -> str:
    """Processor, threads, version of PyTorch; of a GPU, whose operators run there."""
    if str(device).startswith("cuda"):
        whose = "ours (L2G_FAST_CUDA=1)" if "cuda" in operators.DEVICES else "PyTorch's own (no L2G_FAST_CUDA=1)"
        return f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}, operators: {whose}"
    level, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"{_cpu_model()} ({level}), {threads} thread{'s' if threads > 1 else ''}, PyTorch {torch.__version__}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # no Linux, or another processor's way to say it
        return platform.processor() or platform.machine()
