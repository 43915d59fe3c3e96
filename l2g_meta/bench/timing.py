"""Wall time of functions, the device's work included."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def interleaved(
    functions: Mapping[str, Callable[[], Any]], device: torch.device, *, repeats: int
) -> dict[str, list[float]]:
    """Seconds of each call; all functions once untimed, then in turn, ``repeats`` times."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(seconds(function, device))
    return times


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call."""
    _wait(device)
    began = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
