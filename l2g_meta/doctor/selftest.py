"""A tiny exact meta-gradient, checked against finite differences and against PyTorch's own operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from l2g_meta.algorithm import L2GWrapper
from l2g_meta.blocks import ConvBlock
from l2g_meta.heads import PrototypicalHead
from l2g_meta.model import MetricModel
from l2g_meta.task import Task

ALPHA = 0.05
STEP = 1e-6  # of the central difference: its error is of the order of STEP², and of 1e-16 / STEP
DIFFERENCES, OPERATORS = 1e-6, 1e-9  # relative differences that are allowed


def self_test() -> list[dict[str, Any]]:
    """Two checks in float64 on the CPU, in well under a second: each with ``ok``, ``difference`` and ``error``."""
    checks = (
        ("meta-gradient against finite differences", DIFFERENCES, _against_differences),
        ("fast operators against PyTorch's", OPERATORS, _against_stock),
    )
    found = []
    for name, allowed, check in checks:
        difference, error = None, None
        try:
            difference = check()
        except Exception as problem:  # whatever a broken installation raises
            error = f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
        ok = difference is not None and difference <= allowed
        found.append({"name": name, "ok": ok, "difference": difference, "allowed": allowed, "error": error})
    return found


def _against_differences() -> float:
    """|⟨g, v⟩ − (L(θ + εv) − L(θ − εv)) / 2ε|, relative, for one direction v."""
    wrapper, task_i, task_j = _wrapper(fused=True), _task(1), _task(2)
    gradient = _gradient(wrapper, task_i, task_j)
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(g.shape, generator=generator, dtype=g.dtype) for g in gradient]
    expected = sum((g * v).sum().item() for g, v in zip(gradient, direction, strict=True))
    losses = []
    for sign in (1, -1):
        moved = _wrapper(fused=True)
        with torch.no_grad():
            for p, v in zip(moved.module.parameters(), direction, strict=True):
                p.add_(v, alpha=sign * STEP)
        losses.append(moved(task_i, task_j).item())
    found = (losses[0] - losses[1]) / (2 * STEP)
    return abs(found - expected) / abs(expected)


def _against_stock() -> float:
    """Largest difference of the meta-gradients, relative to the largest entry."""
    fast, stock = (_gradient(_wrapper(fused=fused), _task(1), _task(2)) for fused in (True, False))
    a, b = (torch.cat([g.flatten() for g in gradient]) for gradient in (fast, stock))
    return float((a - b).abs().max() / b.abs().max())


def _gradient(wrapper: L2GWrapper, task_i: Task, task_j: Task) -> list[Tensor]:
    wrapper(task_i, task_j).backward()
    return [p.grad for p in wrapper.module.parameters() if p.grad is not None]


def _wrapper(*, fused: bool) -> L2GWrapper:
    """The same weights each time; PyTorch's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        encoder = nn.Sequential(ConvBlock(1, 4, pool=True, fused=fused), ConvBlock(4, 4, pool=True, fused=fused))
        return L2GWrapper(MetricModel(encoder, PrototypicalHead()).double(), inner_lr=ALPHA)


def _task(seed: int) -> Task:
    generator = torch.Generator().manual_seed(seed)
    support, query = (torch.randn(n, 1, 8, 8, generator=generator, dtype=torch.float64) for n in (4, 6))
    return Task(support, torch.tensor([0, 1, 0, 1]), query, torch.tensor([0, 1, 1, 0, 0, 1]), 2)
