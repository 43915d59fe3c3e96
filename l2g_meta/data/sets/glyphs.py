"""``glyphs``: characters of many scripts, drawn from installed fonts; validation and test alphabets are unseen.

Each class is one character, ``"greek/U+03B1"`` for example, with 30 examples: the DejaVu faces that contain it (Sans,
Serif and Mono; regular, bold, oblique), in turn, each rotated, sheared, scaled and shifted at random, by a fixed seed;
white on black.

Source: the DejaVu fonts that Matplotlib ships (free licence, https://dejavu-fonts.github.io). Nothing is downloaded.

Splits go by script. ``glyphs.txt`` has the characters, as code points in hexadecimal. Letters with an accent or other
addition are left out. Of characters that look alike (o and O, Latin A and Greek Alpha, a syllabic with and without its
dot), in any script and split, only the first is there; ``tests/glyph_selection.py`` chose them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageFont

from l2g_meta.data.cache import cached, create_images, open_dataset, write_classes
from l2g_meta.data.dataset import ClassDataset
from l2g_meta.errors import DataError

SPLITS = ("train", "validation", "test")
# Sizes of the demo: minutes on two cores.
DEFAULTS: dict[str, Any] = {
    "image_size": 28, "queries": 5, "pairs": 2, "iterations": 300, "eval_every": 50, "eval_episodes": 200,
}  # fmt: skip

VERSION = 1  # of the images: raise it when anything below changes them
SEED = 20240601
EXAMPLES = 30  # per class
MEAN, STD = (0.0968,), (0.2682,)  # of the train split

# Jitter of one example.
TURN = 0.268  # tan of half the largest rotation, 30 degrees
SHEAR = 0.35  # largest horizontal shift per unit of height
SCALE = (0.55, 1.0)  # of FIT
FIT = 0.7  # longest side of the largest character / image side
SHIFT = 0.2  # largest translation / image side; less where the character would leave the image
OVERSAMPLE = 2  # drawn this many times larger, then averaged

FACES = (
    "Sans Serif SansMono Sans-Bold Serif-Bold SansMono-Bold Sans-Oblique SansMono-Oblique Sans-BoldOblique "
    "SansMono-BoldOblique Serif-Italic Serif-BoldItalic"
).split()


def load(
    split: str, *, root: Path | str | None = None, image_size: int | None = None, download: bool = False
) -> ClassDataset:
    """One split of ``glyphs``: uint8 images (n, image_size, image_size, 1), 30 per class, built on the first call.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.
        root: unused, as the fonts come with Matplotlib; every data set's ``load`` takes it.
        image_size: side in pixels, 28 by default; drawn at that size, not resized.
        download: unused, as nothing is downloaded.

    Raises:
        DataError: if there is no such split, or the images would be smaller than 8 x 8.

    Example:
        >>> load("test").gather([0, 1]).shape  # doctest: +SKIP
        torch.Size([2, 1, 28, 28])
    """
    import matplotlib

    if split not in SPLITS:
        raise DataError(f"need a split of glyphs, got {split!r}; choose one of {', '.join(SPLITS)}")
    size = DEFAULTS["image_size"] if image_size is None else image_size
    if size < 8:
        raise DataError(f"need images of at least 8 pixels a side, got image_size={size}; 28 is the default")
    versions = {"glyphs": VERSION, "matplotlib": matplotlib.__version__, "pillow": PIL.__version__}
    fingerprint = {**versions, "split": split, "size": size}
    folder = cached(f"glyphs-{split}-{size}", fingerprint, lambda folder: build(folder, split, size))
    return open_dataset(folder, name="glyphs", split=split, mean=MEAN, std=STD)


def build(folder: Path, split: str, size: int) -> None:
    """Draw every example of a split into ``folder``."""
    faces = read_faces()
    chosen = letters(split)
    fonts = {name: open_font(name, OVERSAMPLE * size) for name in FACES}
    images = create_images(folder, (len(chosen) * EXAMPLES, size, size, 1))
    for c, (_, code) in enumerate(chosen):
        glyphs = [draw(fonts[name], code) for name in FACES if code in faces[name]]
        for i in range(EXAMPLES):
            images[c * EXAMPLES + i, :, :, 0] = jitter(glyphs[i % len(glyphs)], size, (SEED, code, i))
    write_classes(folder, np.repeat(np.arange(len(chosen)), EXAMPLES), [f"{s}/U+{code:04X}" for s, code in chosen])


def letters(split: str) -> list[tuple[str, int]]:
    """The characters of a split, as (script, code point), as ``glyphs.txt`` has them.

    Example:
        >>> letters("validation")[0]
        ('armenian', 1329)
    """
    found = []
    for line in Path(__file__).with_suffix(".txt").read_text().splitlines():
        place, _, ranges = line.partition(": ")
        of, _, script = place.partition(" ")
        for first, _, last in (part.partition("-") for part in ranges.split() if of == split):
            found += [(script, code) for code in range(int(first, 16), int(last or first, 16) + 1)]
    return found


def read_faces() -> dict[str, frozenset[int]]:
    """Code points that each face has a glyph for."""
    from matplotlib.ft2font import FT2Font

    return {name: frozenset(FT2Font(font_path(name)).get_charmap()) for name in FACES}


def font_path(name: str) -> str:
    """File of the face ``name``."""
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"DejaVu{name}.ttf")


def open_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """The face ``name`` at ``size`` pixels an em; basic layout, so that an installed Raqm changes nothing."""
    return ImageFont.truetype(font_path(name), size, layout_engine=ImageFont.Layout.BASIC)


def draw(font: ImageFont.FreeTypeFont, code: int) -> Image.Image:
    """One letter, cropped to its ink: "L" image, white on black, at the size of the font."""
    mask = font.getmask(chr(code), mode="L")
    image = Image.frombytes("L", mask.size, bytes(mask))
    return image.crop(image.getbbox())


def jitter(glyph: Image.Image, size: int, seed: tuple[int, ...]) -> np.ndarray:
    """The character under a random affine map, within the image where it can be: uint8 (size, size).

    Sums, products and quotients alone make the map, no sine, so that it is the same on every machine.
    """
    draws = np.random.Generator(np.random.PCG64(seed)).random(5).tolist()
    turn, shear, grow, right, down = (2 * u - 1 for u in draws)  # each in [-1, 1)
    side, (width, height) = OVERSAMPLE * size, glyph.size
    t, k = TURN * turn, SHEAR * shear
    scale = (SCALE[0] + (SCALE[1] - SCALE[0]) * (grow + 1) / 2) * FIT * side / max(width, height)
    cos, sin = scale * (1 - t * t) / (1 + t * t), scale * 2 * t / (1 + t * t)
    a, b, c, d = cos, k * cos - sin, sin, k * sin + cos  # scaled rotation times shear: (x, y) -> (ax + by, cx + dy)
    room_x = max(0.0, side - abs(a) * width - abs(b) * height) / 2
    room_y = max(0.0, side - abs(c) * width - abs(d) * height) / 2
    x = side / 2 + min(SHIFT * side, room_x) * right  # where the centre goes
    y = side / 2 + min(SHIFT * side, room_y) * down
    a, b, c, d = (v / (a * d - b * c) for v in (d, -b, -c, a))  # inverse: Pillow maps the output to the input
    inverse = (a, b, width / 2 - a * x - b * y, c, d, height / 2 - c * x - d * y)
    large = glyph.transform((side, side), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)
    return np.asarray(large.reduce(OVERSAMPLE))
