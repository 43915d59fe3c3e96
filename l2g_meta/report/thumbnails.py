"""Small images of a data set, all on one sheet, which the page shows parts of."""

from __future__ import annotations

import base64
from io import BytesIO

import numpy as np
from PIL import Image
from torch import Tensor

from l2g_meta.data.dataset import ClassDataset

COLUMNS = 32  # of the sheet
SIZES = ((48, 82), (32, 78), (32, 50), (16, 50))  # pixels and JPEG quality, tried until the page is small enough


class Sheet:
    """Collects images of a data set, each once.

    Args:
        data: with uint8 images.
    """

    def __init__(self, data: ClassDataset):
        self.data = data
        self.places: dict[int, int] = {}

    def place(self, row: int) -> tuple[int, int]:
        """Column and line of an image on the sheet."""
        line, column = divmod(self.places.setdefault(int(row), len(self.places)), COLUMNS)
        return column, line

    def encoded(self, side: int, quality: int) -> str:
        """The sheet as a data URI: PNG for grey images, JPEG for coloured ones; "" if it is empty."""
        if not self.places:
            return ""
        images: Tensor = self.data.images  # type: ignore[assignment]
        lines = -(-len(self.places) // COLUMNS)
        grey = images.shape[3] == 1
        sheet = Image.new("L" if grey else "RGB", (COLUMNS * side, lines * side))
        for row, place in self.places.items():
            line, column = divmod(place, COLUMNS)
            sheet.paste(_image(images[row].cpu().numpy(), side), (column * side, line * side))
        file, kind = BytesIO(), "png" if grey else "jpeg"
        # Sides are multiples of 8, a JPEG's block without subsampling: images do not run into their neighbours.
        sheet.save(file, kind, **({"optimize": True} if grey else {"quality": quality, "subsampling": 0}))
        return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _image(pixels: np.ndarray, side: int) -> Image.Image:  # (H, W, 1 or 3) uint8
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    return image.resize((side, side), Image.Resampling.BICUBIC if side > image.width else Image.Resampling.LANCZOS)
