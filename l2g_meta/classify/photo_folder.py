"""Folders of images in, rows out: what ``l2g predict`` does, at bounded memory and with unreadable files skipped."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from l2g_meta.classify.classifier import FewShotClassifier
from l2g_meta.classify.photos import Preparation
from l2g_meta.classify.source import Source
from l2g_meta.data.images import FORMATS, files_by_class
from l2g_meta.errors import DataError, L2GError
from l2g_meta.evaluation.episodes import at_once, scores_from_embeddings

# Pictures of formats that are not read: they are listed as skipped, where other files in a folder are passed over.
OTHER = {".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jxl", ".tif", ".tiff", ".webp"}
PICTURES = OTHER.union(FORMATS)
READERS = 4  # threads that decode


class Row(NamedTuple):
    """What is said of one file: the class; its probability; the nearest support's file."""

    file: str
    label: str
    probability: float
    nearest: str


@dataclass
class PhotoReader:
    """Reads images as a model takes them, a batch at a time, and lists those that cannot be read.

    Args:
        preparation: how the model takes images.
        size: files of a batch, at most; of large inputs fewer, see ``l2g_meta.evaluation.episodes.at_once``.
        tell: is told of each file that is skipped, at once.
        skipped: these files, with the reason.
    """

    preparation: Preparation
    size: int
    tell: Callable[[str], None] = lambda line: None
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.size = at_once(self.size, self.preparation.image_shape)

    def skip(self, file: str, reason: str) -> None:
        """Lists a file, and says so."""
        self.skipped.append((file, reason))
        self.tell(f"skipped {file}: {reason}")

    def batches(self, files: Sequence[str]) -> Iterator[tuple[list[str], np.ndarray]]:
        """Readable files and their pixels (n, S, S, C) uint8, of ``size`` files each, decoded by a few threads."""
        with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as pool:
            for start in range(0, len(files), self.size):
                part, good = files[start : start + self.size], []
                for file, read in zip(part, pool.map(self._read, part), strict=True):
                    if isinstance(read, str):
                        self.skip(file, read)
                    else:
                        good.append((file, read))
                shape = (0, *self.preparation.image_shape[1:], self.preparation.channels)
                yield [file for file, _ in good], np.stack([x for _, x in good]) if good else np.empty(shape, np.uint8)

    def _read(self, file: str) -> np.ndarray | str:
        """Pixels of a file, or why there are none."""
        try:
            return self.preparation.read(file)
        except (DataError, OSError) as error:
            return str(error)


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
                files += [os.path.join(folder, name) for name in sorted(names) if _is_picture(name)]
        elif query.exists():
            files.append(str(query))
        else:
            raise DataError(f"need a file or folder of images, there is no {query}; check its path")
    if not files:
        raise DataError(f"need images *.{{jpg,jpeg,png}}, got none in {', '.join(map(str, queries))}; check the path")
    return list(dict.fromkeys(files))


def fit_folder(classifier: FewShotClassifier, reader: PhotoReader, folder: Path) -> list[str]:
    """Fits on a folder of one folder per class; returns the files that were used, in the order of the examples.

    Pictures beside the folders of classes are skipped.

    Raises:
        DataError: if there are less than two classes, or a class has no readable image.
    """
    if not folder.is_dir():
        raise DataError(f"need a folder of one folder per class as --support, {folder} is none; check it")
    classes, lacks = files_by_class(folder, PICTURES)
    lacks = lacks or (f"the class {[*classes]} alone" if len(classes) == 1 else "")
    if lacks:
        raise DataError(f"need --support DIR with images <class>/*.{{jpg,jpeg,png}}, got {lacks} in {folder}; add some")
    for path in sorted(folder.iterdir()):
        if _is_picture(path.name) and path.is_file():
            reader.skip(str(path), "it lies in no folder of a class; move it into one")
    of = {path: name for name, paths in classes.items() for path in paths}
    parts, pixels = zip(*reader.batches(list(of)), strict=True)  # of all classes: a batch each would start threads anew
    files = [file for part in parts for file in part]
    labels = [of[file] for file in files]
    for name in sorted({*classes} - {*labels})[:1]:
        raise DataError(f"need a readable image of class {name!r} in {folder}, got none; add one, or remove it")
    classifier.fit(np.concatenate(pixels), labels)
    return files


def classify_files(
    classifier: FewShotClassifier, reader: PhotoReader, files: Sequence[str], supports: Sequence[str]
) -> Iterator[list[Row]]:
    """For each batch of files a row for each that can be read; ``supports`` are what ``fit_folder`` returned."""
    for part, read in reader.batches(files):
        rows = []
        if part:
            said = classifier.classify(read)
            for file, label, p, at in zip(part, said.labels, said.probabilities, said.nearest, strict=True):
                rows.append(Row(file, str(label), float(p.max()), supports[at] if at >= 0 else ""))
        yield rows


def embed_files(
    source: Source, reader: PhotoReader, photos: Sequence[Path], *, progress: bool = True
) -> tuple[list[str], Tensor]:
    """The files that can be read, and their embeddings, (n, d).

    Raises:
        L2GError: for a model that has none which hold for all tasks, or if no file can be read.
    """
    if not scores_from_embeddings(source.model):
        raise L2GError("need a MetricModel, whose encoder gives embeddings, got a model that adapts; choose another")
    files, parts, device = [], [], next(source.model.parameters()).device
    with torch.no_grad(), tqdm(total=len(asked := query_files(photos)), disable=None if progress else True) as bar:
        for part, pixels in reader.batches(asked):
            files += part
            if part:
                parts.append(source.model.encoder(reader.preparation.normalised(pixels, device)).flatten(1).cpu())
            bar.update(len(part))
    if not files:
        raise DataError("need an image that can be read, got none; the reason of each is above")
    return files, torch.cat(parts)


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


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in PICTURES and not name.startswith(".")
