r"""The least time that an exact meta-step can take, from the bytes it must move and the operations it must do.

Every convolution and every block of norm, ReLU and pooling reads its inputs and writes its outputs once. With X and Y
the bytes of a layer's input and output maps and F its floating-point operations, a convolution costs

========================================  ===============  ====
pass                                      bytes            FLOP
========================================  ===============  ====
forward                                   X + Y            F
backward to the input                     Y + X            F
backward to the weight                    X + Y            F
double backward, cotangent of g           2 X + Y          2 F
double backward, cotangent of x           Y + X            F
double backward, cotangent of the weight  X + Y            F
========================================  ===============  ====

(the first layer needs no backward to its input, and of the double backward only the X + Y, F of g by the weight's
cotangent), and a norm X + Y forward, 2 X + Y backward, 3 X + 2 Y double backward. T_i pays forward, backward, double
backward and backward again; T_j, or a plain episode, forward and backward.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from l2g_meta.bench.timing import interleaved
from l2g_meta.task import Task

CPU_SIZES = 2**25, 2048  # what rates are measured on: elements of a copy, beyond any cache, and rows of a product
CUDA_SIZES = 2**26, 8192


class Layer(NamedTuple):
    """One layer of a forward pass."""

    kind: str  # "conv" or "norm"
    x: float  # bytes of the input
    y: float  # bytes of the output
    flop: float  # of the forward pass
    first: bool  # its input needs no gradient


class Machine(NamedTuple):
    """Measured rates."""

    bandwidth: float  # bytes per second, read and written
    flops: float  # per second, in a large matrix product


def layers(model: nn.Module, task: Task) -> list[Layer]:
    """Convolutions and norms of one forward pass over a task."""
    found: list[Layer] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, y = inputs[0], output
        if isinstance(module, nn.Conv2d):
            flop = 2 * y.numel() * module.weight[0].numel()
            found.append(Layer("conv", x.nbytes, y.nbytes, flop, not any(layer.kind == "conv" for layer in found)))
        else:
            found.append(Layer("norm", x.nbytes, y.nbytes, 0.0, False))

    hooks = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, nn.Conv2d | _BatchNorm)]
    try:
        with torch.no_grad():
            model(task)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def passes(layer: Layer, *, adapts: int) -> list[tuple[float, float]]:
    """(bytes, FLOP) of each pass over a layer, for T_i in ``adapts`` inner steps, or for T_j and plain episodes (0)."""
    x, y, f = layer.x, layer.y, layer.flop
    if layer.kind == "norm":
        forward, backward, double = [(x + y, 0.0)], [(2 * x + y, 0.0)], [(3 * x + 2 * y, 0.0)]
    elif layer.first:
        forward, backward, double = [(x + y, f)], [(x + y, f)], [(x + y, f)]
    else:
        forward, backward = [(x + y, f)], [(x + y, f)] * 2
        double = [(2 * x + y, 2 * f), (x + y, f), (x + y, f)]
    return (forward + backward + double + backward) * adapts if adapts else forward + backward


def floor(task_i: Sequence[Layer], task_j: Sequence[Layer], machine: Machine, *, inner_steps: int) -> dict[str, float]:
    """Seconds that one pair must take: by bytes alone, by FLOP alone, and by the larger of the two pass by pass.

    ``inner_steps=0`` is for two plain episodes.
    """
    todo = [p for layer in task_i for p in passes(layer, adapts=inner_steps)]
    todo += [p for layer in task_j for p in passes(layer, adapts=0)]
    seconds = [(moved / machine.bandwidth, flop / machine.flops) for moved, flop in todo]
    memory, compute = (sum(column) for column in zip(*seconds, strict=True))
    return {"bytes_s": memory, "flop_s": compute, "floor_s": sum(map(max, seconds))}


def measure_machine(device: torch.device) -> Machine:
    """Bandwidth of a copy and rate of a matrix product, in float32, medians of 9."""
    elements, n = CUDA_SIZES if device.type == "cuda" else CPU_SIZES
    source, target = torch.ones(2, elements, device=device)
    a, b = torch.ones(2, n, n, device=device)
    work = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    median = {name: statistics.median(times) for name, times in interleaved(work, device, repeats=9).items()}
    return Machine(2 * source.nbytes / median["copy"], 2 * n**3 / median["product"])
