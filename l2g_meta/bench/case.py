"""What the bench times."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _flag(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Case:
    """One update on ``pairs`` pairs of tasks of one shape; a field per flag of ``l2g bench``."""

    backbone: str = _flag("conv4", "conv4 or resnet12")
    head: str = _flag("prototypical", "prototypical or relation")
    image_size: int = _flag(84, "pixels")
    ways: int = _flag(5, "classes of a task")
    shots: int = _flag(1, "supports per class")
    queries: int = _flag(15, "queries per class")
    pairs: int = _flag(1, "pairs of tasks per update")
    inner_steps: int = _flag(1, "inner steps on T_i")
    inner_lr: float = _flag(0.01, "α, step size of the inner step")
    device: str = _flag("auto", "auto, cpu, cuda, …")

    @property
    def images(self) -> int:
        """Images of one update."""
        return 2 * self.pairs * self.ways * (self.shots + self.queries)
