"""A whole update on fixed tensors: on a GPU recorded once as a CUDA graph and replayed, without Python in between.

What changes from update to update lies in buffers: rows of the data set and draws of the augmentation. They come from
the (seed, k) stream on the CPU, the next update's while the GPU works on this one; every device sees the same pairs.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from l2g_meta.algorithm import L2GWrapper
from l2g_meta.data.augment import PerImage
from l2g_meta.data.dataset import ClassDataset
from l2g_meta.data.host import HostDataset
from l2g_meta.data.pairs import TaskPairs
from l2g_meta.data.sources import IndexedSource, TaskLayout
from l2g_meta.errors import L2GError
from l2g_meta.task import Task
from l2g_meta.training.objectives import Objective, UpdateStats, accumulate, episodic
from l2g_meta.training.update import Update, all_finite

Arrange = Callable[[list[tuple[Task, Task]]], list[tuple[Task, ...]]]
WARM_UPS = 3  # before a graph is recorded: kernels are compiled and chosen, memory is reserved


class StaticUpdate:
    """Gather, meta-gradient and optimizer step as one program on fixed tensors.

    Args:
        objective: as of ``meta_gradient``.
        wrapper: the model and its step sizes, on the device of the data.
        optimizer: for a CUDA graph, a capturable one whose learning rate is a tensor.
        pairs: the stream; class-indexed data on the device, all tasks of one shape.
        positions: of update k, the pairs that it takes.
        arrange: pairs to the tasks of each call of the objective; the pairs themselves by default.

    Raises:
        L2GError: if the tasks' shapes vary or the data is not resident.
    """

    def __init__(
        self,
        objective: Objective,
        wrapper: L2GWrapper,
        optimizer: torch.optim.Optimizer,
        pairs: TaskPairs,
        positions: Callable[[int], Sequence[int]],
        arrange: Arrange = list,
    ):
        data = pairs.source.dataset if isinstance(pairs.source, IndexedSource) else None
        if isinstance(data, HostDataset):
            raise L2GError(
                f"need the images on the device for a fixed program, got them on the host: {data.device} has too "
                "little free memory for them; leave --cuda-graph out, or take a smaller --image-size"
            )
        if not isinstance(pairs.source, IndexedSource) or not isinstance(pairs.source.dataset, ClassDataset):
            raise L2GError("need a ClassDataset on the device for a fixed program; leave --cuda-graph out")
        if not pairs.fixed:
            raise L2GError(
                "need --ways, --shots and --queries as numbers for a fixed program, got several to draw from; leave "
                "--cuda-graph out"
            )
        if isinstance(pairs.source.augment, PerImage):
            raise L2GError(
                "need an Augment for a fixed program, got a transform of single images; leave --cuda-graph out"
            )
        self.objective, self.wrapper, self.optimizer = objective, wrapper, optimizer
        self.pairs, self.positions, self.arrange = pairs, positions, arrange
        self.source = pairs.source
        self.graph: torch.cuda.CUDAGraph | None = None
        drawn, draws = pairs.draw(positions(0))
        self.device = pairs.source.dataset.images.device  # type: ignore[union-attr]
        self.layout = TaskLayout.of(drawn, self.device)
        self.rows = torch.zeros(sum(self.layout.sizes), dtype=torch.long, device=self.device)
        self.draws = None if draws is None else [torch.as_tensor(d).to(self.device) for d in draws]
        self.stats = torch.zeros(4, device=self.device)  # means, and whether all was finite
        self.kept: dict[int, Tensor] = {}  # the state before the last update
        self.next: tuple[int, list[Tensor]] | None = None

    def __call__(self, k: int, asked: int = 0) -> Update:
        """Runs update k; ``asked`` is the signal that came to the process, or 0."""
        self.fill(k)
        if self.graph is None:
            self.program()
        else:
            self.graph.replay()
        self.next = (k + 1, self.drawn(k + 1))  # while the device works
        *means, finite = self.stats.tolist()
        if not finite:
            self._restore(self.kept)
        return Update(UpdateStats(*means), bool(finite), asked)

    def drawn(self, k: int) -> list[Tensor]:
        """Rows and draws of update k, on the CPU, in memory that the device can read."""
        drawn, draws = self.pairs.draw(self.positions(k))
        found = [torch.from_numpy(array) for array in (self.source.concatenated(drawn), *(draws or ()))]
        return [t.pin_memory() for t in found] if self.device.type == "cuda" else found

    def fill(self, k: int) -> None:
        """Copies what belongs to update k into the buffers."""
        values = self.next[1] if self.next is not None and self.next[0] == k else self.drawn(k)
        for buffer, value in zip((self.rows, *(self.draws or ())), values, strict=True):
            buffer.copy_(value, non_blocking=True)

    def program(self) -> None:
        """The update on what the buffers hold."""
        x = self.source.gather(self.rows, self.draws)
        tasks = self.layout.tasks(x)
        batch = self.arrange(list(zip(tasks[0::2], tasks[1::2], strict=True)))
        with torch.no_grad():
            for t in self._state():
                if id(t) not in self.kept:
                    self.kept[id(t)] = torch.empty_like(t)
                self.kept[id(t)].copy_(t)
        self.optimizer.zero_grad(set_to_none=True)
        means = accumulate(self.objective, self.wrapper, batch)
        gradients = [p.grad for p in self.wrapper.parameters() if p.grad is not None]
        losses = means[:1] if self.objective is episodic else means[:2]
        finite = all_finite(gradients, squared=True) & all_finite([losses, *self.wrapper.parameters()])
        self.stats.copy_(torch.cat([means, finite.float().view(1)]))
        self.optimizer.step()

    def capture(self) -> bool:
        """Records the program as a CUDA graph, changing no state; returns whether it could, and warns if not."""
        if self.device.type != "cuda":
            warnings.warn(f"a CUDA graph needs a CUDA device, got {self.device}; running step by step", stacklevel=2)
            return False
        self.fill(0)
        graph = torch.cuda.CUDAGraph()
        try:
            with self.unchanged():
                stream = torch.cuda.Stream(self.device)
                stream.wait_stream(torch.cuda.current_stream(self.device))
                with torch.cuda.stream(stream):
                    for _ in range(WARM_UPS):
                        self.program()
                torch.cuda.current_stream(self.device).wait_stream(stream)
                with torch.cuda.graph(graph):
                    self.program()
            self.graph = graph
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            warnings.warn(f"cannot record the update as a CUDA graph ({reason}); running step by step", stacklevel=2)
        return self.graph is not None

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Model, optimizer and generators are afterwards as before, in place: a graph holds these very tensors."""
        before = {id(t): t.clone() for t in self._state()}
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []), torch.no_grad():
            try:
                with torch.enable_grad():
                    yield
            finally:
                self._restore(before)

    @torch.no_grad()
    def _restore(self, before: dict[int, Tensor]) -> None:
        for t in self._state():
            t.copy_(before[id(t)]) if id(t) in before else t.zero_()  # the optimizer's start at 0

    def _state(self) -> list[Tensor]:
        of_optimizer = [t for state in self.optimizer.state.values() for t in state.values()]
        return [*self.wrapper.state_dict(keep_vars=True).values(), *of_optimizer]
