"""Data sets whose images are prepared as a model wants them, whatever it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from l2g_meta.classify.photos import Preparation, resized
from l2g_meta.data import load
from l2g_meta.data.dataset import ClassDataset, MapDataset
from l2g_meta.data.images import SPLITS

ALL = "all"  # classes of all splits together


class PreparedImages(Dataset):
    """A data set's images as inputs of a model, one by one.

    Args:
        data: of uint8 images.
        preparation: of the model.
    """

    def __init__(self, data: ClassDataset, preparation: Preparation):
        self.data, self.preparation = data, preparation

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        image = torch.as_tensor(self.data.images[row])
        return self.preparation.normalised(resized(image[None], self.preparation))[0], int(self.data.labels[row])


def open_data(
    name: str,
    split: str,
    preparation: Preparation,
    *,
    root: Path | str | None = None,
    split_seed: int = 0,
    split_file: Path | None = None,
) -> MapDataset:
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
    names = [part.class_names[y] for part in parts for y in part.labels]
    return MapDataset(ConcatDataset([PreparedImages(part, preparation) for part in parts]), names)
