"""What the bench times."""

from __future__ import annotations

from dataclasses import dataclass

from l2g_meta.errors import L2GError
from l2g_meta.training.checks import check_settings, setting

OURS = ("conv4", "resnet12")


@dataclass(frozen=True)
class Case:
    """One update on ``pairs`` pairs of tasks of one shape; a field per flag of ``l2g bench``.

    Raises:
        L2GError: for values that cannot be timed.

    Example:
        >>> Case(ways=5, shots=1, queries=15, pairs=2).images
        320
    """

    backbone: str = setting("conv4", "conv4, resnet12, timm:NAME or torchvision:NAME")
    backbone_options: str = setting("", "arguments of a library's encoder, 'NAME=VALUE NAME=VALUE'")
    head: str = setting("prototypical", "prototypical or relation")
    image_size: int = setting(84, "pixels")
    ways: int = setting(5, "classes of a task", least=2)
    shots: int = setting(1, "supports per class")
    queries: int = setting(15, "queries per class")
    pairs: int = setting(1, "pairs of tasks per update")
    inner_steps: int = setting(1, "inner steps on T_i")
    inner_lr: float = setting(0.01, "α, step size of the inner step", least=0)
    augment: bool = setting(False, "vary images as l2g train --augment does, where tasks are drawn")
    device: str = setting("auto", "auto, cpu, cuda, …")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.head not in ("prototypical", "relation"):
            raise L2GError(f"need --head prototypical or relation, got {self.head}")
        known = self.backbone in OURS or self.backbone.startswith(("timm:", "torchvision:"))
        if not known or (not self.ours and self.head == "relation"):
            raise L2GError(
                f"need --backbone {' or '.join(OURS)}, or timm:NAME or torchvision:NAME with --head prototypical, got "
                f"{self.backbone} with {self.head}"
            )
        if self.ours and self.backbone_options:
            raise L2GError(f"--backbone-options belong to timm:NAME and torchvision:NAME, got {self.backbone}")

    @property
    def ours(self) -> bool:
        """Whether the encoder is one of this library's, which have fused layers as well."""
        return self.backbone in OURS

    @property
    def small_image(self) -> int:
        """Pixels of the smallest images that are of use: the relation head needs maps of 4 × 4, a ViT its own."""
        if not self.ours:
            return self.image_size
        return 64 if self.head == "relation" and self.backbone == "resnet12" else 20

    @property
    def images(self) -> int:
        """Images of one update."""
        return 2 * self.pairs * self.ways * (self.shots + self.queries)
