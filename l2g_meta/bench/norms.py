"""What the double backward of each norm costs, against its forward and backward pass together.

An exact meta-step differentiates the backward pass of T_i. Were the double backward of a norm as well written as its
backward pass, the two would cost about the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from l2g_meta.allocator import keep_freed_memory
from l2g_meta.bench.case import Case
from l2g_meta.bench.run import describe_machine
from l2g_meta.bench.timing import interleaved
from l2g_meta.models.batchnorm_policy import BatchNorm2d, GroupNorm, InstanceNorm2d, LayerNorm

CHANNELS = 64  # of Conv4's maps
NORMS: dict[str, Callable[[int, int], nn.Module]] = {  # from channels and height = width
    "BatchNorm2d, PyTorch": lambda c, size: nn.BatchNorm2d(c),
    "BatchNorm2d, ours": lambda c, size: BatchNorm2d(c),
    "InstanceNorm2d, PyTorch": lambda c, size: nn.InstanceNorm2d(c, affine=True),
    "InstanceNorm2d, ours": lambda c, size: InstanceNorm2d(c, affine=True),
    "GroupNorm, PyTorch": lambda c, size: nn.GroupNorm(8, c),
    "GroupNorm, ours": lambda c, size: GroupNorm(8, c),
    "LayerNorm, PyTorch": lambda c, size: nn.LayerNorm((c, size, size)),
    "LayerNorm, ours": lambda c, size: LayerNorm((c, size, size)),
}


def norms(case: Case, *, repeats: int = 5, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Medians of interleaved repeats for each norm, on the maps of one task after Conv4's first convolution.

    Args:
        case: ways, shots, queries and image size give the maps, device where.
        repeats: timed calls of each, after one that is not.
        say: is given each line of the table.

    Returns:
        ``case``, ``machine``, ``shape`` of the maps, and ``rows``: for each norm ``forward_and_backward`` and
        ``double_backward`` in seconds, and ``ratio``, the second over the first.
    """
    keep_freed_memory()
    device, size = torch.device(case.device), case.image_size
    shape = (case.ways * (case.shots + case.queries), CHANNELS, size, size)
    generator = torch.Generator(device).manual_seed(0)
    x, g, v = (torch.randn(shape, device=device, generator=generator) for _ in range(3))
    steps: dict[str, Callable[[], Any]] = {}
    for name, make in NORMS.items():
        norm = make(CHANNELS, size).to(device)
        steps[f"{name} 1"], steps[f"{name} 2"] = partial(first, norm, x, g), second(norm, x, g, v)
    median = {name: statistics.median(times) for name, times in interleaved(steps, device, repeats=repeats).items()}

    say(f"{' × '.join(map(str, shape))}, float32; {describe_machine(case)}")
    say(f"{'':26}{'forward + backward':>20}{'double backward':>18}{'ratio':>8}")
    rows = []
    for name in NORMS:
        once, twice = median[f"{name} 1"], median[f"{name} 2"]
        rows.append({"name": name, "forward_and_backward": once, "double_backward": twice, "ratio": twice / once})
        say(f"{name:26}{once:18.4f} s{twice:16.4f} s{twice / once:8.2f}")
    machine = {"description": describe_machine(case)}
    return {"case": asdict(case), "machine": machine, "shape": shape, "repeats": repeats, "rows": rows}


def first(
    norm: nn.Module,
    x: Tensor,  # (n, c, H, W)
    g: Tensor,  # cotangent of y, (n, c, H, W)
    *,
    create_graph: bool = False,
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Forward and backward: x, g and the parameters as leaves, and the cotangents of x and the parameters."""
    x, g = x.detach().requires_grad_(), g.detach().requires_grad_(create_graph)
    inputs = [x, *norm.parameters()]
    return [*inputs, g], torch.autograd.grad(norm(x), inputs, g, create_graph=create_graph)


def second(
    norm: nn.Module,
    x: Tensor,  # (n, c, H, W)
    g: Tensor,  # cotangent of y, (n, c, H, W)
    v: Tensor,  # cotangent of x's cotangent, (n, c, H, W)
) -> Callable[[], tuple[Tensor | None, ...]]:
    """The double backward alone, to be called again and again: cotangents of x, the parameters (a bias: none) and g."""
    leaves, gradients = first(norm, x, g, create_graph=True)
    cotangents = [v, *map(torch.ones_like, gradients[1:])]
    return partial(torch.autograd.grad, gradients, leaves, cotangents, retain_graph=True, allow_unused=True)
