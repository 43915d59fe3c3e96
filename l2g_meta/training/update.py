"""One update of a run, all or nothing: where a number is not finite, weights and statistics stay as they were."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from l2g_meta.algorithm import L2GWrapper
from l2g_meta.data.batches import Batches
from l2g_meta.data.pairs import TaskPairs
from l2g_meta.evaluation.world import World, join_update
from l2g_meta.training.config import Config
from l2g_meta.training.objectives import Objective, UpdateStats, accumulate
from l2g_meta.training.signals import SIGNALS
from l2g_meta.training.task_stream import calls_of_update, tasks_of_calls


class Update(NamedTuple):
    """What an update found: means over its tasks, whether all was finite, and the signal that came to any rank."""

    stats: UpdateStats
    finite: bool
    asked: int


def seed_update(config: Config, k: int, world: World) -> None:
    """Seeds PyTorch's generators for what a model draws in update k: the same in any run, another on each rank."""
    torch.manual_seed(int(np.random.SeedSequence([config.seed, k, world.rank]).generate_state(1)[0]))


class Updater:
    """Algorithm 1 for update k: tasks, meta-gradient, all-reduce, Adam.

    Args:
        config: of the run.
        objective: what it minimises.
        wrapper: the model and its step sizes.
        optimizer: of its parameters.
        pairs: the stream of tasks, or of batches.
        world: the processes that share each update.
    """

    def __init__(
        self,
        config: Config,
        objective: Objective,
        wrapper: L2GWrapper,
        optimizer: torch.optim.Optimizer,
        pairs: TaskPairs | Batches,
        world: World | None = None,
    ):
        self.config, self.objective, self.wrapper, self.optimizer = config, objective, wrapper, optimizer
        self.pairs, self.world = pairs, world or World()
        self.device = next(wrapper.parameters()).device

    def __call__(self, k: int, asked: int = 0) -> Update:
        """Runs update k; ``asked`` is the signal that came to this process, or 0."""
        buffers = {name: b.clone() for name, b in self.wrapper.named_buffers()}
        calls = calls_of_update(self.config, k)
        share = self.world.share(len(calls))
        batch = tasks_of_calls(self.pairs, [calls[i] for i in share])
        self.optimizer.zero_grad()
        means = accumulate(self.objective, self.wrapper, batch, of=len(calls))  # eq. 3 and 4
        gradients = [p.grad for p in self.wrapper.parameters() if p.grad is not None]
        bad = ~(all_finite(gradients, squared=True) & all_finite(self.wrapper.parameters()))
        values = torch.cat([means, bad.float().view(1)])
        if self.world.size > 1:
            signals = torch.tensor([float(asked == number) for number in SIGNALS], device=self.device)
            values = torch.cat([values, signals])
            found = join_update(self.world, self.wrapper, buffers, share, len(calls), values)
        else:
            found = values.tolist()  # waits for the device, once
        loss, inner, alignment, anywhere, *counts = found
        bilevel = self.config.method in ("l2g", "maml")
        finite = anywhere == 0 and math.isfinite(loss) and (math.isfinite(inner) or not bilevel)
        if finite:
            if self.config.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.wrapper.parameters(), self.config.clip_norm)
            self.optimizer.step()  # eq. 5
        else:
            for name, b in self.wrapper.named_buffers():
                b.copy_(buffers[name])
        asked = next((number for number, count in zip(SIGNALS, counts, strict=False) if count), asked)
        return Update(UpdateStats(loss, inner, alignment), finite, asked)


def all_finite(tensors: Iterable[Tensor], *, squared: bool = False) -> Tensor:  # ()
    """Whether all numbers of all tensors are finite, without waiting for the device.

    Args:
        tensors: of any shapes.
        squared: whether their squares are, too: Adam would keep ∞, and never move that weight again.

    Example:
        >>> all_finite([torch.ones(2), torch.tensor(float("nan"))])
        tensor(False)
        >>> all_finite([torch.tensor(1e18)], squared=True), all_finite([torch.tensor(1e20)], squared=True)
        (tensor(True), tensor(False))
    """
    values = [t.detach() for t in tensors if t.numel() and t.is_floating_point()]
    if not values:
        return torch.tensor(True)
    largest = torch._foreach_norm(values, float("inf"))
    return torch.stack([(n.square() if squared else n).float() for n in largest]).isfinite().all()


def culprit(config: Config, stats: UpdateStats, wrapper: L2GWrapper) -> str:
    """What is not finite after a failed update, nearest to the cause: weights, else losses, else gradients."""
    tensors = dict(wrapper.named_parameters())
    if weights := [name for name, p in tensors.items() if not all_finite([p])]:
        return f"weight {_some(weights)}"
    losses = {"inner loss": stats.inner_loss} if config.method in ("l2g", "maml") else {}
    losses["loss"] = stats.loss
    if found := [f"{name} {value}" for name, value in losses.items() if not math.isfinite(value)]:
        return ", ".join(found)
    given = {name: p.grad for name, p in tensors.items() if p.grad is not None}
    return f"gradient of {_some([name for name, g in given.items() if not all_finite([g], squared=True)])}"


def _some(names: Sequence[str]) -> str:
    """The first three names, as the model's own ``named_parameters`` has them."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name.removeprefix("module.") for name in names[:3]) + more
