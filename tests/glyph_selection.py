"""How the letters of ``glyphs`` were chosen: of those that look alike, in any script and split, the first is kept."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageFilter

from l2g_meta.data.sets.glyphs import draw, open_font, read_faces

# Scripts, by the first words of Unicode names. Of look-alikes the first is kept: training, the largest, comes last.
SCRIPTS = {
    "validation": "armenian, hebrew".split(", "),
    "test": "georgian, lao".split(", "),
    "train": "latin, greek, coptic, cyrillic, arabic, nko, tifinagh, old italic, canadian syllabics, digit, "
    "arabic-indic digit, currency".split(", "),
}
KINDS = ("Lu", "Ll", "Lo", "Nd", "Sc")  # Unicode categories: letters, decimal digits, currency signs
ADDITIONS = (" with ", " ligature ", " digraph ")  # in names of letters that are others plus something
# Look-alikes: the faces compared, and how.
COMPARED = ("Sans", "Serif")
EM = 48  # pixels
BODY = 0.5  # least share of the ink in the largest connected part; the rest (a dot, say) is not compared
SMALLEST = 0.4  # longest side of that part in ems; finals and marks are smaller
SIDE, MARGIN, BLUR = 24, 3, 1.0  # frame, in pixels
STRETCH = 2.0  # of the short side towards the long one, as M and a narrower M look alike
TURNS = (-15, 0, 15)  # degrees
THRESHOLD = 0.87  # correlation above which two characters look alike, chosen by eye on sheets of pairs


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
