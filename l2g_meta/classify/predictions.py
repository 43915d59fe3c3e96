"""The command ``l2g predict``: folders in; a table, a CSV file or one JSON document out."""

from __future__ import annotations

import csv
import os
import sys
import time
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from tqdm import tqdm

from l2g_meta.classify.classifier import FewShotClassifier
from l2g_meta.classify.photo_folder import PhotoReader, Row, classify_files, fit_folder, query_files, right_of
from l2g_meta.classify.source import Source
from l2g_meta.errors import L2GError
from l2g_meta.files.names import cell, shown
from l2g_meta.files.tensors import make_folder
from l2g_meta.files.writing import write_text

COLUMNS = ("file", "class", "probability", "nearest")


def photo_reader(source: Source, batch_size: int) -> PhotoReader:
    """Reads images as a model takes them, and tells on standard error of those that it cannot.

    Raises:
        L2GError: for a module of which nothing is known.
    """
    if source.preparation is None:
        raise L2GError("need a model by its folder or name, which says how images are prepared, got a module")
    return PhotoReader(source.preparation, batch_size, lambda line: tqdm.write(f"l2g: {shown(line)}", file=sys.stderr))


def predict(
    source: Source,
    support: Path,
    query: Sequence[Path],
    *,
    csv_file: Path | None = None,
    table: bool = True,
    emit: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = True,
    batch_size: int = 64,
) -> int:
    """Classifies files, printing or writing a row for each; returns 1 if some could not be read, else 0.

    Args:
        source: the model, as ``open_source`` gives it.
        support: a folder of one folder per class.
        query: files, and folders of them.
        csv_file: write the rows there instead of printing them.
        table: print the rows, if no file takes them, and a summary.
        emit: is given all rows and the summary as one dictionary, in the end.
        progress: show a progress bar.
        batch_size: images at a time, at most, as of ``FewShotClassifier``.

    Raises:
        L2GError: if the model, a folder or an option is unusable.
    """
    if csv_file is not None:
        if str(csv_file) == "-":
            raise L2GError("need a file for --csv, got -; name one, or take --json, for the standard output")
        make_folder(csv_file.parent, "a file to write for --csv", "choose another")
    device = str(next(source.model.parameters()).device)
    classifier = FewShotClassifier(source, batch_size=batch_size, device=device)
    reader, files = photo_reader(source, batch_size), query_files(query)
    supports = fit_folder(classifier, reader, support)
    began = time.perf_counter()
    rows: list[Row] = []  # a few short strings each: what grows with the number of images
    with tqdm(total=len(files), disable=None if progress else True) as bar:  # None: hidden where there is no terminal
        for start, batch in enumerate(classify_files(classifier, reader, files, supports)):
            rows += batch
            bar.update(min(reader.size, len(files) - start * reader.size))
    if not rows:
        raise L2GError(f"need an image that can be read to classify, got {len(files)} that cannot; see above")
    if csv_file is not None:
        text = StringIO(newline="")
        lines = ([cell(r.file), cell(r.label), f"{r.probability:.4f}", cell(r.nearest)] for r in rows)
        csv.writer(text, quoting=csv.QUOTE_ALL).writerows([COLUMNS, *lines])  # whatever a spreadsheet splits at
        write_text(csv_file, text.getvalue())
    elif table:
        cells = [[*map(shown, (r.file, r.label, f"{r.probability:.3f}", r.nearest))] for r in rows]
        first, second = (max(len(line[k]) for line in [COLUMNS, *cells]) for k in (0, 1))
        for file, label, probability, nearest in [COLUMNS, *cells]:
            print(f"{file:{first}}  {label:{second}}  {probability:>11}  {nearest}")
    summary = _summary(classifier, rows, reader.skipped, supports) | {"seconds": time.perf_counter() - began}
    if table:
        _say(summary, csv_file)
    if emit is not None:
        emit({**summary, "predictions": [dict(zip(COLUMNS, row, strict=True)) for row in rows]})
    return 1 if reader.skipped else 0


def _summary(
    classifier: FewShotClassifier, rows: Sequence[Row], skipped: Sequence[tuple[str, str]], supports: Sequence[str]
) -> dict[str, Any]:
    classes = list(map(str, classifier.classes_))
    right, labelled = right_of(rows, classes, supports) or (None, None)
    fitted = ("temperature", "calibrated", "calibrated_shots")
    return {
        "classes": classes,
        "examples": classifier.n_examples_,
        **{name: getattr(classifier, f"{name}_") for name in fitted},
        "classified": len(rows),
        "right": right,
        "labelled": labelled,
        "unreadable": [{"file": file, "reason": reason} for file, reason in skipped],
    }


def _say(summary: dict[str, Any], csv_file: Path | None) -> None:
    """The summary in a few lines, after the table, or instead of it where that went to a file."""
    note = "; probabilities are not calibrated, `l2g export` does that"
    if summary["calibrated"]:
        note = f"; probabilities are calibrated for {summary['calibrated_shots']} per class"
    where = "" if csv_file is None else f", in {os.fspath(csv_file)}"
    images, examples, classes = summary["classified"], summary["examples"], len(summary["classes"])
    said = "1 image" if images == 1 else f"{images} images"
    print(f"{said} classified from {examples} examples of {classes} classes{where}{note}")
    print(f"{1000 * summary['seconds'] / images:.1f} ms per image, reading it included")
    if summary["labelled"]:
        share = 100 * summary["right"] / summary["labelled"]
        print(f"{share:.1f} % right of the {summary['labelled']} in folders named as a class")
    if summary["unreadable"]:
        print(f"{len(summary['unreadable'])} skipped; listed on the error output, with the reason")
