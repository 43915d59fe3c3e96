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


def join_update(
    world: World, module: nn.Module, before: dict[str, Tensor], share: range, of: int, values: Tensor
) -> list[float]:
    """Puts gradients and buffers of all ranks' passes in place, by one all-reduce; waits for the device once.

    Args:
        world: the processes.
        module: holds the parameters, whose ``.grad`` are added up, and the running statistics.
        before: its buffers before the update, by name.
        share: which objective calls of the update were this rank's.
        of: how many there were.
        values: (n,), to be added up.

    Returns:
        The sums of ``values``.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    have = torch.tensor([float(p.grad is not None) for p in parameters]).to(values)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    buffers = list(_parts(world.main, module, before, share, of))
    parts = [torch.cat([values, have]), *gradients, *(part for _, part in buffers)]
    wide = functools.reduce(torch.promote_types, [part.dtype for part in parts], torch.float32)
    flat = world.sum(torch.cat([part.detach().flatten().to(values.device, wide) for part in parts]))
    found = iter(flat.split([part.numel() for part in parts]))
    sums = next(found).tolist()
    for p, present in zip(parameters, sums[len(values) :], strict=True):
        gradient = next(found)
        p.grad = gradient.view_as(p).to(p.dtype) if present else None
    for buffer, _ in buffers:
        buffer.copy_(next(found).view_as(buffer))
    return sums[: len(values)]


def _parts(
    main: bool, module: nn.Module, before: dict[str, Tensor], share: range, of: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each buffer, and this rank's summand of what it becomes; b_0's own share is rank 0's."""
    others = {name: b for name, b in module.named_buffers() if b.is_floating_point()}
    for path, norm in module.named_modules():
        name = f"{path}.".lstrip(".")
        if not isinstance(norm, _NormBase) or norm.running_mean is None or f"{name}running_mean" not in before:
            continue
        # Instance norms have the counter and never count.
        count = None if "Instance" in type(norm).__name__ else before.get(f"{name}num_batches_tracked")
        counter, mine = norm.num_batches_tracked, max(1, len(share))
        if count is None or counter is None:
            passes = norm.running_mean.new_tensor(float(len(share)))
        else:
            passes = (counter - count).to(norm.running_mean.dtype)
            yield counter, passes + count if main else passes
        total, after = passes * of / mine, passes * (of - share.stop) / mine  # every call makes as many
        for kind in ("running_mean", "running_var"):
            b, b0 = others.pop(f"{name}{kind}"), before[f"{name}{kind}"]
            if norm.momentum is None and count is not None:  # the mean of all passes
                part, kept = b * (count + passes) - b0 * count, b0 * count
                yield b, (part + kept if main else part) / (count + total).clamp(min=1)
            else:  # 0 without passes
                keep = 1 - (norm.momentum or 0.0)
                part = keep**after * (b - keep**passes * b0)
                yield b, part + keep**total * b0 if main else part
    yield from ((b, b if main else torch.zeros_like(b)) for b in others.values())  # of no known law: rank 0's


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
