"""Data sets whose images are prepared as a model wants them, whatever it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l2g_meta.classify.photos import Preparation, resized
from l2g_meta.data import load
from l2g_meta.data.dataset import ClassDataset
from l2g_meta.data.images import SPLITS

ALL = "all"  # classes of all splits together


@dataclass(frozen=True, eq=False)
class PreparedData:
    """Classes of several data sets one after the other, prepared when they are gathered.

    Args:
        parts: data sets of uint8 images.
        preparation: of the model.
        split: what it is called in results.
    """

    parts: Sequence[ClassDataset]
    preparation: Preparation
    split: str = ""
    index: tuple[np.ndarray, ...] = field(init=False, repr=False)
    class_names: tuple[str, ...] = field(init=False, repr=False)
    starts: np.ndarray = field(init=False, repr=False)  # first row of each part

    def __post_init__(self) -> None:
        starts = np.cumsum([0, *map(len, self.parts)])
        rows = [rows + start for part, start in zip(self.parts, starts, strict=False) for rows in part.index]
        object.__setattr__(self, "index", tuple(rows))
        object.__setattr__(self, "class_names", tuple(name for part in self.parts for name in part.class_names))
        object.__setattr__(self, "starts", starts)

    def gather(self, rows: Tensor | np.ndarray) -> Tensor:  # (n, C, H, W)
        """Inputs of the given rows."""
        images = []
        for row in torch.as_tensor(rows).tolist():
            part = int(np.searchsorted(self.starts, row, side="right")) - 1
            image = torch.as_tensor(self.parts[part].images[row - self.starts[part]])
            images.append(torch.as_tensor(resized(image[None], self.preparation)))
        return self.preparation.normalised(torch.cat(images))


def open_data(
    name: str,
    split: str,
    preparation: Preparation,
    *,
    root: Path | str | None = None,
    split_seed: int = 0,
    split_file: Path | None = None,
) -> PreparedData:
    """A data set's split, or all of it, as a model takes it.

    Args:
        name: of ``l2g_meta.data.DATASETS``.
        split: ``"train"``, ``"validation"``, ``"test"`` or ``"all"``.
        preparation: of the model.
        root: folder that holds the data.
        split_seed: of ``--data folder``, and so for the next.
        split_file: names the classes, and ``split`` only what they are called.

    Raises:
        DataError: as ``l2g_meta.data.load``.
    """
    folder, plain = name == "folder", preparation.resize is None and preparation.interpolation == "bilinear"
    size = preparation.size if plain else preparation.resize if folder else None  # plain: as ``load`` resizes
    options: dict[str, Any] = {"split_seed": split_seed, "split_file": split_file} if folder else {}
    splits = SPLITS if split == ALL and not folder else (split,)
    parts = [load(name, each, root=root, image_size=size, **options) for each in splits]
    return PreparedData(parts, preparation, split)
