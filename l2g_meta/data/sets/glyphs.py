"""``glyphs``: characters of many scripts, drawn from installed fonts; validation and test alphabets are unseen.

Each class is one character, ``"greek/U+03B1"`` for example, with 30 examples: the DejaVu faces that contain it (Sans,
Serif and Mono; regular, bold, oblique), in turn, each rotated, sheared, scaled and shifted at random, by a fixed seed;
white on black.

Source: the DejaVu fonts that Matplotlib ships (free licence, https://dejavu-fonts.github.io). Nothing is downloaded.

Splits go by script (``SCRIPTS``). Letters with an accent or other addition are left out by their Unicode data. Of
characters that look alike (o and O, Latin A and Greek Alpha, a syllabic with and without its dot), in any script and
split, only the first is kept (``distinct``).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageFilter, ImageFont

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

# Scripts, by the first words of Unicode names. Of look-alikes the first is kept: training, the largest, comes last.
SCRIPTS = {
    "validation": "armenian, hebrew".split(", "),
    "test": "georgian, lao".split(", "),
    "train": "latin, greek, coptic, cyrillic, arabic, nko, tifinagh, old italic, canadian syllabics, digit, "
    "arabic-indic digit, currency".split(", "),
}
KINDS = ("Lu", "Ll", "Lo", "Nd", "Sc")  # Unicode categories: letters, decimal digits, currency signs
ADDITIONS = (" with ", " ligature ", " digraph ")  # in names of letters that are others plus something
FACES = (
    "Sans Serif SansMono Sans-Bold Serif-Bold SansMono-Bold Sans-Oblique SansMono-Oblique Sans-BoldOblique "
    "SansMono-BoldOblique Serif-Italic Serif-BoldItalic"
).split()

# Look-alikes: the faces compared, and how.
COMPARED = ("Sans", "Serif")
EM = 48  # pixels
BODY = 0.5  # least share of the ink in the largest connected part; the rest (a dot, say) is not compared
SMALLEST = 0.4  # longest side of that part in ems; finals and marks are smaller
SIDE, MARGIN, BLUR = 24, 3, 1.0  # frame, in pixels
STRETCH = 2.0  # of the short side towards the long one, as M and a narrower M look alike
TURNS = (-15, 0, 15)  # degrees
THRESHOLD = 0.87  # correlation above which two characters look alike, chosen by eye on sheets of pairs


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
    chosen = [(script, code) for script, code in classes() if script in SCRIPTS[split]]
    fonts = {name: open_font(name, OVERSAMPLE * size) for name in FACES}
    images = create_images(folder, (len(chosen) * EXAMPLES, size, size, 1))
    for c, (_, code) in enumerate(chosen):
        glyphs = [draw(fonts[name], code) for name in FACES if code in faces[name]]
        for i in range(EXAMPLES):
            images[c * EXAMPLES + i, :, :, 0] = jitter(glyphs[i % len(glyphs)], size, (SEED, code, i))
    write_classes(folder, np.repeat(np.arange(len(chosen)), EXAMPLES), [f"{s}/U+{code:04X}" for s, code in chosen])


@lru_cache(maxsize=1)
def classes() -> tuple[tuple[str, int], ...]:
    """The letters of all splits, as (script, code point), none looking like another; by group of SCRIPTS, then code."""
    faces = read_faces()
    fonts = [open_font(name, EM) for name in COMPARED]
    letters, bodies = [], []
    for script, code in candidates(faces[COMPARED[0]]):
        drawn = [body(draw(font, code)) for name, font in zip(COMPARED, fonts, strict=True) if code in faces[name]]
        whole = [shape for shape in drawn if shape is not None and max(shape.size) >= SMALLEST * EM]
        if len(whole) == len(drawn):
            letters.append((script, code))
            bodies.append(whole)
    return tuple(letters[i] for i in distinct(bodies))


def candidates(codes: Iterable[int]) -> list[tuple[str, int]]:
    """The base letters among ``codes``, as (script, code point), in the order of SCRIPTS, then of code points.

    Example:
        >>> candidates([0x3B1, 0xE9, 0x65, 0x2B])  # alpha, e with acute, e, plus
        [('latin', 101), ('greek', 945)]
    """
    scripts = [script for group in SCRIPTS.values() for script in group]
    found = [(scripts.index(script), code) for code in codes for script in [script_of(code)] if script in scripts]
    return [(scripts[rank], code) for rank, code in sorted(found)]


def script_of(code: int) -> str:
    """Script of a base letter, digit or currency sign by its Unicode name; "" for any other character."""
    kind, name = unicodedata.category(chr(code)), unicodedata.name(chr(code), "").lower() + " "
    if kind not in KINDS or unicodedata.decomposition(chr(code)) or any(word in name for word in ADDITIONS):
        return ""
    if kind == "Sc":
        return "currency"
    return next((s for group in SCRIPTS.values() for s in group if name.startswith(s + " ")), "")


def body(glyph: Image.Image) -> Image.Image | None:
    """The largest connected part of a letter, cropped; None if it has less than BODY of the ink (dots, several parts).

    A letter and the same with a dot have one body, so that they count as look-alikes.
    """
    ink = np.pad(np.asarray(glyph) > 127, 1)
    stride, n_bytes = ink.shape[1], -(-ink.size // 8)
    rest = total = int.from_bytes(np.packbits(ink).tobytes(), "big")  # one bit a pixel, so that shifts flood a part
    while rest:
        part, grown = 0, rest & -rest
        while grown != part:
            part = grown
            row = part | part << 1 | part >> 1
            grown = (row | row << stride | row >> stride) & total
        if bin(part).count("1") >= BODY * bin(total).count("1"):
            bits = np.unpackbits(np.frombuffer(part.to_bytes(n_bytes, "big"), np.uint8))[: ink.size]
            image = Image.fromarray(255 * bits.reshape(ink.shape))
            return image.crop(image.getbbox())
        rest &= ~part
    return None


def distinct(letters: Sequence[Sequence[Image.Image]]) -> list[int]:
    """Indices of the letters kept, ascending: each looks like none of those kept before it, in any of their faces.

    Example:
        >>> font = open_font("Sans", EM)
        >>> distinct([[draw(font, ord(letter))] for letter in "Oopo"])
        [0, 2]
    """
    alike = similarity([face for letter in letters for face in letter]) > THRESHOLD
    ends = np.cumsum([len(letter) for letter in letters]).tolist()
    kept: list[int] = []
    kept_rows: list[int] = []
    for i, (letter, end) in enumerate(zip(letters, ends, strict=True)):
        rows = range(end - len(letter), end)
        if not alike[np.ix_(rows, kept_rows)].any():
            kept.append(i)
            kept_rows += rows
    return kept


def similarity(glyphs: Sequence[Image.Image]) -> np.ndarray:
    """How alike each two renderings are: float64 (n, n), symmetric, at most 1.

    The largest correlation of their pixels in one frame, one of them upright and the other turned by one of TURNS.
    """
    upright = np.stack([fitted(glyph) for glyph in glyphs])  # (n, pixels)
    best = np.full((len(glyphs), len(glyphs)), -1.0)
    for turn in TURNS:
        turned = np.stack([fitted(glyph.rotate(turn, Image.Resampling.BILINEAR, expand=True)) for glyph in glyphs])
        n, sums, others = upright.shape[1], upright.sum(1), turned.sum(1)
        # Whole numbers below 2**53, exact in any order of summation: every machine keeps the same letters.
        covariance = n * (upright @ turned.T) - np.outer(sums, others)
        scale = np.outer(n * (upright**2).sum(1) - sums**2, n * (turned**2).sum(1) - others**2)
        best = np.maximum(best, covariance / np.sqrt(scale))
    return np.maximum(best, best.T)


def fitted(glyph: Image.Image) -> np.ndarray:
    """The ink scaled to one frame, its short side stretched by up to STRETCH, blurred: float64 (SIDE²,) of bytes."""
    glyph = glyph.crop(glyph.getbbox())
    inner = SIDE - 2 * MARGIN
    width, height = (max(1, round(inner * min(1, STRETCH * side / max(glyph.size)))) for side in glyph.size)
    frame = Image.new("L", (SIDE, SIDE))
    frame.paste(glyph.resize((width, height), Image.Resampling.BOX), ((SIDE - width) // 2, (SIDE - height) // 2))
    return np.asarray(frame.filter(ImageFilter.GaussianBlur(BLUR)), dtype=np.float64).reshape(-1)


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
