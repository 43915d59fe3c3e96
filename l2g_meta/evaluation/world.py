r"""One update on several processes: each takes its share of the pairs, one all-reduce joins what they found.

Launched by torchrun, ``l2g train`` runs on all ranks alike. The meta-gradient is a mean over pairs, so the ranks' sums
add up to it. Running statistics are what one process, pair after pair, would have: a rank whose n passes came before n'
passes of later ranks took its b from

.. math:: b_r = (1-m)^n b_0 + L_r, \qquad\text{so that}\qquad b = (1-m)^N b_0 + \sum_r (1-m)^{n'} L_r

with N passes in all. Norms that do not count their passes (instance norms) are taken to have one per task; buffers of
other kinds are those of rank 0. No DDP: its hooks do not see ``autograd.grad``.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from l2g_meta.errors import L2GError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run: this one is ``rank`` of ``size``.

    Example:
        >>> World().main, World(1, 3).share(5), World(2, 3).share(5)
        (True, range(2, 4), range(4, 5))
    """

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that logs and saves."""
        return self.rank == 0

    @classmethod
    def here(cls) -> World:
        """As torchrun says it in the environment, before ``join`` or after it; alone without it."""
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    def share(self, n: int) -> range:
        """This rank's part of n things, consecutive, the first ranks' one larger where they do not divide."""
        each, more = divmod(n, self.size)
        start = self.rank * each + min(self.rank, more)
        return range(start, start + each + (self.rank < more))

    def sum(self, t: Tensor) -> Tensor:
        """The sum of all ranks' tensors, the same bits on each; in place."""
        if self.size > 1:
            with self._together():
                dist.all_reduce(t)
        return t

    def first_here(self, function: Callable[[], T]) -> T:
        """Calls a function on the first rank of each machine, then on its others, which find what that left."""
        if self.size == 1:
            return function()
        first = os.environ.get("LOCAL_RANK", str(self.rank)) == "0"
        found = function() if first else None
        self.wait()
        return function() if found is None else found

    def from_main(self, function: Callable[[], T]) -> T:
        """What a function returns that the main process alone calls, on every rank.

        Raises:
            L2GError: on every rank, if it raises one.
        """
        if self.size == 1:
            return function()
        found: list[Any] = [None, None]
        error: L2GError | None = None
        if self.main:
            try:
                found[0] = function()
            except L2GError as e:
                error, found[1] = e, str(e)
        with self._together():
            dist.broadcast_object_list(found, src=0)
        if error is not None:
            raise error
        if found[1] is not None:
            raise L2GError(f"rank {self.rank} ends, since rank 0 could not go on: {found[1]}")
        return found[0]

    def wait(self) -> None:
        """Returns when all ranks are here."""
        if self.size > 1:
            with self._together():
                dist.barrier()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """What all ranks do at once; where one is dead or hangs, the others end in one line."""
        try:
            yield
        except RuntimeError as error:  # of gloo, nccl and PyTorch's store
            raise L2GError(
                f"rank {self.rank} has lost another of {self.size} processes, which died or said nothing for "
                f"{_timeout():g} seconds (L2G_RANK_TIMEOUT); the run goes on from its last state with --resume"
            ) from error


def _timeout() -> float:
    """Seconds after which a rank that waits for a dead one gives up."""
    text = os.environ.get("L2G_RANK_TIMEOUT", "600")
    try:
        seconds = timedelta(seconds=float(text)).total_seconds()
    except (ValueError, OverflowError):
        seconds = 0.0
    if seconds <= 0:
        raise L2GError(f"need L2G_RANK_TIMEOUT to be seconds above 0, got {text!r}; leave it out for 600")
    return seconds


def join(device: torch.device) -> tuple[World, torch.device]:
    """The processes that torchrun started, and this one's device; alone without it.

    Args:
        device: as of one process; ``cuda`` becomes the GPU of this rank.

    Raises:
        L2GError: if there are fewer GPUs here than ranks.
    """
    if not dist.is_available() or ("RANK" not in os.environ and not dist.is_initialized()):
        return World(), device
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise L2GError(
                f"need a GPU for each rank, got local rank {local} and {torch.cuda.device_count()} GPUs; lower "
                "--nproc-per-node, or give --device cpu"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=_timeout()))
        except RuntimeError as error:
            here = World.here()
            raise L2GError(
                f"rank {here.rank} waited for the other of {here.size} processes, which did not come within "
                f"{_timeout():g} seconds (L2G_RANK_TIMEOUT; {str(error).splitlines()[0]}); start them all, with one "
                "address and port"
            ) from error
    return World(dist.get_rank(), dist.get_world_size()), device


class Joined:
    """What the ranks found in an update, packed into one flat buffer, summed, and put back.

    Args:
        world: the processes.
        module: holds the parameters, whose ``.grad`` are added up, and the running statistics.
        before: its buffers before the update, by name.
        mine: how many objective calls were this rank's.
        later: how many those of later ranks are.
    """

    def __init__(self, world: World, module: nn.Module, before: dict[str, Tensor], mine: int, later: int):
        self.world, self.mine, self.later = world, mine, later
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.running = list(_running(module, before))
        owned = {name for norm in self.running for name in norm.names}
        self.others = [b for name, b in module.named_buffers() if b.is_floating_point() and name not in owned]

    def __call__(self, values: Tensor) -> list[float]:
        """Puts gradients and buffers in place; returns the sums of ``values`` (n,). Waits for the device once."""
        have = torch.tensor([float(p.grad is not None) for p in self.parameters]).to(values)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        parts: list[Tensor] = [torch.cat([values, have]), *gradients]
        for norm in self.running:
            parts += norm.contribution(self.mine, self.later)
        parts += [b if self.world.main else torch.zeros_like(b) for b in self.others]  # of no known law: rank 0's
        wide = functools.reduce(torch.promote_types, [part.dtype for part in parts], torch.float32)
        flat = self.world.sum(torch.cat([part.detach().flatten().to(wide) for part in parts]))
        found = iter(flat.split([part.numel() for part in parts]))
        sums = next(found).tolist()
        for p, present in zip(self.parameters, sums[len(values) :], strict=True):
            gradient = next(found)
            p.grad = gradient.view_as(p).to(p.dtype) if present else None
        for norm in self.running:
            norm.put(found)
        for buffer in self.others:
            buffer.copy_(next(found).view_as(buffer))
        return sums[: len(values)]


@dataclass(frozen=True)
class _Running:
    """Running statistics of one norm, and what they were before the update."""

    norm: _NormBase
    names: tuple[str, ...]
    before: tuple[Tensor, ...]
    count: Tensor | None  # num_batches_tracked before

    def contribution(self, mine: int, later: int) -> list[Tensor]:
        """Passes of this rank, then of each statistic what they add."""
        if self.count is None or self.norm.num_batches_tracked is None:
            passes = self.before[0].new_tensor(float(mine))
        else:
            passes = (self.norm.num_batches_tracked - self.count).to(self.before[0].dtype)
        after = later * passes / max(1, mine)  # every call makes as many
        found = [passes]
        for b, b0 in zip(self.now, self.before, strict=True):
            if self.norm.momentum is None and self.count is not None:  # the mean of all passes
                found.append(b * (self.count + passes) - b0 * self.count)
            else:  # 0 without passes
                keep = 1 - (self.norm.momentum or 0.0)
                found.append(keep**after * (b - keep**passes * b0))
        return found

    def put(self, sums: Iterator[Tensor]) -> None:
        """The statistics after all ranks' passes."""
        passes = next(sums).squeeze()
        for b, b0 in zip(self.now, self.before, strict=True):
            total = next(sums).view_as(b)
            if self.norm.momentum is None and self.count is not None:
                b.copy_((b0 * self.count + total) / (self.count + passes).clamp(min=1))
            else:
                b.copy_((1 - (self.norm.momentum or 0.0)) ** passes * b0 + total)
        if self.count is not None and self.norm.num_batches_tracked is not None:
            self.norm.num_batches_tracked.copy_(self.count + passes.round().long())

    @property
    def now(self) -> Sequence[Tensor]:
        return [t for t in (self.norm.running_mean, self.norm.running_var) if t is not None]


def _running(module: nn.Module, before: dict[str, Tensor]) -> Iterator[_Running]:
    for name, norm in module.named_modules():
        if isinstance(norm, _NormBase) and isinstance(norm.running_mean, Tensor) and norm.running_var is not None:
            names = tuple(f"{name}.{kind}".lstrip(".") for kind in ("running_mean", "running_var"))
            if all(n in before for n in names):
                count = before.get(f"{name}.num_batches_tracked".lstrip("."))
                # Instance norms have the counter and never count.
                counts = count is not None and "Instance" not in type(norm).__name__
                yield _Running(norm, names, tuple(before[n] for n in names), count if counts else None)


def shutdown() -> None:
    """Leaves the group of processes, if ``join`` made one."""
    if dist.is_available() and dist.is_initialized() and "RANK" in os.environ:
        dist.destroy_process_group()


def gathered(world: World, rows: Sequence[Tensor], index: range, n: int) -> Tensor:  # (n, 2)
    """All n rows (2,), of which this rank has those of ``index``."""
    if world.size == 1:
        return torch.stack(list(rows))
    on_gpu = dist.get_backend() == "nccl"
    whole = torch.zeros(n, 2, dtype=torch.float64, device="cuda" if on_gpu else "cpu")
    for i, row in zip(index, rows, strict=True):
        whole[i] = row
    return world.sum(whole)
