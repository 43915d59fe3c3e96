"""Folders of images in, rows out: what ``l2g predict`` does, at bounded memory and with unreadable files skipped."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from l2g_meta.classify.classifier import FewShotClassifier
from l2g_meta.classify.photos import Preparation
from l2g_meta.data.images import FORMATS, files_by_class
from l2g_meta.errors import DataError

# Pictures of formats that are not read: they are listed as skipped, where other files in a folder are passed over.
OTHER = {".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jxl", ".tif", ".tiff", ".webp"}
PICTURES = OTHER.union(FORMATS)
READERS = 4  # threads that decode


class Row(NamedTuple):
    """What is said of one file: the class, or that it is unknown; its probability; the nearest support's file."""

    file: str
    label: str
    probability: float
    nearest: str


@dataclass
class Skipped:
    """Files that could not be read, with the reason."""

    files: list[tuple[str, str]] = field(default_factory=list)
    tell: Callable[[str], None] = lambda line: None

    def add(self, file: str, reason: str) -> None:
        """Lists a file, and says so at once."""
        self.files.append((file, reason))
        self.tell(f"skipped {file}: {reason}")


def query_files(queries: Sequence[Path]) -> list[str]:
    """Files to classify: those named, and in folders, at any depth, those that look like pictures; sorted in each.

    Hidden files and folders are left out, links to folders not followed.

    Raises:
        DataError: if something named is not there, or there is no picture at all.
    """
    files: list[str] = []
    for query in queries:
        if query.is_dir():
            for folder, folders, names in os.walk(query):
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                files += [os.path.join(folder, n) for n in sorted(names) if not n.startswith(".") and _is_picture(n)]
        elif query.exists():
            files.append(str(query))
        else:
            raise DataError(f"need a file or folder to classify, there is no {query}; check --query")
    if not files:
        raise DataError(
            f"need images *.{{jpg,jpeg,png}} to classify, got none in {', '.join(map(str, queries))}; check --query"
        )
    return list(dict.fromkeys(files))


def support_files(folder: Path) -> dict[str, list[str]]:
    """Files of each class, ``folder/<class>/*``.

    Raises:
        DataError: if there is no class, or a class has no picture.
    """
    if not folder.is_dir():
        raise DataError(f"need a folder of one folder per class as --support, {folder} is none; check it")
    classes, lacks = files_by_class(folder, PICTURES)
    if lacks:
        raise DataError(f"need --support DIR with images <class>/*.{{jpg,jpeg,png}}, got {lacks} in {folder}; add some")
    return classes


def loose_files(folder: Path) -> list[str]:
    """Pictures beside the folders of classes, of no class."""
    with os.scandir(folder) as entries:
        return sorted(e.path for e in entries if _is_picture(e.name) and not e.name.startswith(".") and e.is_file())


def fit_folder(classifier: FewShotClassifier, preparation: Preparation, folder: Path, skipped: Skipped) -> list[str]:
    """Fits on a folder of one folder per class; returns the files that were used, in the order of the examples.

    Args:
        classifier: to be fitted.
        preparation: how its model takes images.
        folder: with a folder per class.
        skipped: takes the files that cannot be read, and pictures that lie beside the classes.

    Raises:
        DataError: if a class has no readable image.
    """
    files: list[str] = []
    labels: list[str] = []
    pixels: list[np.ndarray] = []
    classes = support_files(folder)
    for file in loose_files(folder):
        skipped.add(file, "it lies in no folder of a class; move it into one")
    for name, paths in classes.items():
        before = len(files)
        for part, read in read_batches(paths, preparation, classifier.batch_size, skipped):
            files += part
            labels += [name] * len(part)
            pixels.append(read)
        if len(files) == before:
            raise DataError(
                f"need a readable image of class {name!r} in {folder}, got none; add one, or remove the class"
            )
    classifier.fit(np.concatenate(pixels), labels)
    return files


def classify_files(
    classifier: FewShotClassifier,
    preparation: Preparation,
    files: Sequence[str],
    supports: Sequence[str],
    skipped: Skipped,
) -> Iterator[list[Row]]:
    """For each batch of files a row for each that can be read.

    Args:
        classifier: fitted by ``fit_folder``.
        preparation: how its model takes images.
        files: to classify.
        supports: what ``fit_folder`` returned.
        skipped: takes the files that cannot be read.
    """
    for part, read in read_batches(files, preparation, classifier.batch_size, skipped):
        rows = []
        if part:
            said = classifier.classify(read)
            for file, label, p, at in zip(part, said.labels, said.probabilities, said.nearest, strict=True):
                rows.append(Row(file, str(label), float(p.max()), supports[at] if at >= 0 else ""))
        yield rows


def read_batches(
    files: Sequence[str], preparation: Preparation, size: int, skipped: Skipped
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Readable files and their pixels (n, S, S, C) uint8, ``size`` files at a time, decoded by a few threads."""
    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as pool:
        for start in range(0, len(files), size):
            part = files[start : start + size]
            results = list(pool.map(lambda file: _pixels(file, preparation), part))
            good = []
            for file, result in zip(part, results, strict=True):
                if isinstance(result, str):
                    skipped.add(file, result)
                else:
                    good.append((file, result))
            shape = (0, *preparation.image_shape[1:], preparation.channels)
            pixels = np.stack([array for _, array in good]) if good else np.empty(shape, np.uint8)
            yield [file for file, _ in good], pixels


def right_of(rows: Sequence[Row], classes: Collection[str], supports: Collection[str] = ()) -> tuple[int, int] | None:
    """How many rows are right, of those whose file lies in a folder that is named as a class; ``None`` of none.

    Files that are examples themselves do not count.

    Example:
        >>> right_of([Row("q/cat/1.png", "cat", 0.9, ""), Row("q/dog/2.png", "cat", 0.6, "")], ["cat", "dog"])
        (1, 2)
    """
    known, classes = set(map(os.path.realpath, supports)), set(classes)
    others = [row for row in rows if not known or os.path.realpath(row.file) not in known]
    named = [(row.label, os.path.basename(os.path.dirname(row.file))) for row in others]
    told = [label == name for label, name in named if name in classes]
    return (sum(told), len(told)) if told else None


def _pixels(file: str, preparation: Preparation) -> np.ndarray | str:
    """Pixels of a file, or why there are none."""
    try:
        return preparation.read(file)
    except (DataError, OSError) as error:
        return str(error)


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in PICTURES
