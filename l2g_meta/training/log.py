"""What a run says of itself while it trains: log.csv, and a progress bar."""

from __future__ import annotations

import csv
import math
import os
import re
import sys
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

from l2g_meta.errors import CheckpointError, L2GError
from l2g_meta.files.reading import read_text
from l2g_meta.files.writing import open_to_append, write_text
from l2g_meta.training.config import Config

COLUMNS = (
    "iteration",  # updates done
    "loss",  # outer loss, mean over the update's pairs
    "inner_loss",  # L(θ; T_i); empty for episodic
    "alignment",  # Σ α g_i g_j / L(θ'; T_j), see objectives.meta_gradient
    "lr",
    "tasks",  # tasks in the update
    "seconds",  # of the update, validation left out
    "skipped",  # 1 if the update was left out, a number not being finite
    "val_accuracy",  # per cent; empty between validations
    "val_ci95",
    "val_loss",  # under θ, mean over episodes
    "crc32",  # of the row before it, in hexadecimal; empty if the row was changed by hand
)


MAX_LOG = 2**28  # bytes that are read; a row has some hundred


class RunLog:
    """Writes one row per update; a context manager, which closes its files.

    Args:
        out: run directory.
        config: of the run.
        start: updates already done; later rows of an existing log are dropped.
        progress: show a progress bar on stderr; where that is no terminal, a line per validation.
    """

    def __init__(self, out: Path, config: Config, *, start: int = 0, progress: bool = True):
        from tqdm.auto import tqdm

        self.out, self.path = out, out / "log.csv"
        text = StringIO(newline="")
        csv.DictWriter(text, COLUMNS).writeheader()
        csv.DictWriter(text, COLUMNS).writerows(_rows_until(out, start) if start else [])
        write_text(self.path, text.getvalue())
        with self._full_disk():
            self.file = open_to_append(self.path)
        self.writer = csv.DictWriter(self.file, COLUMNS)
        self.bar = tqdm(
            total=config.iterations, initial=start, desc=f"{config.method} {out.name}", unit="update",
            disable=None if progress else True,
        )  # fmt: skip
        self.lines = progress and self.bar.disable  # no terminal: a line per validation instead
        self.shown: dict[str, str] = {}

    def write(self, row: Mapping[str, Any]) -> None:
        """Logs one update.

        Raises:
            CheckpointError: if the disk is full.
        """
        with self._full_disk():
            cells = {k: "" if v != v else str(v) for k, v in row.items()}  # NaN: no such thing here
            self.writer.writerow({**cells, "crc32": _crc32([cells.get(name, "") for name in COLUMNS[:-1]])})
            self.file.flush()
        self.shown |= {"loss": f"{row['loss']:.3f}", "tasks/s": f"{row['tasks'] / (row['seconds'] or math.inf):.1f}"}
        if "val_accuracy" in row:
            self.shown["val"] = f"{row['val_accuracy']:.1f}%"
            if self.lines:
                accuracy = f"{row['val_accuracy']:.2f} ± {row['val_ci95']:.2f} %"
                print(f"{self.out}: update {row['iteration']} of {self.bar.total}: loss {row['loss']:.3f}, validation "
                      f"{accuracy}, {self.shown['tasks/s']} tasks/s", file=sys.stderr, flush=True)  # fmt: skip
        self.bar.set_postfix(self.shown, refresh=False)
        self.bar.update()

    def sync(self) -> None:
        """Returns when all rows are on the disk.

        Raises:
            CheckpointError: if it is full.
        """
        with self._full_disk():
            os.fsync(self.file.fileno())

    @contextmanager
    def _full_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self.path}: {error.strerror}; make room, then --resume {self.out}"
            ) from error

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.file.close()
        except OSError:  # what could not be written was said before
            pass
        self.bar.close()


def _rows_until(out: Path, iteration: int) -> list[dict[str, str]]:
    """Sound rows of an existing log up to an update, each once; a warning says how many are missing."""
    try:
        found, _ = _sound_rows(out)
    except OSError:
        found = []
    kept = {int(row["iteration"]): row for row in found if 1 <= int(row["iteration"]) <= iteration}
    missing = iteration - len(kept)
    if missing:
        warnings.warn(f"{out / 'log.csv'} lacks {missing} of the {iteration} updates before this one", stacklevel=2)
    return [kept[k] for k in sorted(kept)]


def read_log(run: Path) -> list[dict[str, str]]:
    """Rows of a run's ``log.csv``, a number or nothing in each cell; damaged ones are left out, with a warning.

    Raises:
        L2GError: if there is none.
    """
    try:
        found, damaged = _sound_rows(run)
    except OSError as error:
        raise L2GError(f"need a run's log in {run / 'log.csv'}, got: {error.strerror}") from error
    if damaged:
        warnings.warn(f"{run / 'log.csv'}: {damaged} damaged rows are left out", stacklevel=2)
    return found


def _sound_rows(run: Path) -> tuple[list[dict[str, str]], int]:
    """Rows whose cells are numbers, and how many others there are.

    Line by line, so that a damaged one costs no other; the last one may be torn.
    """
    lines = read_text(run / "log.csv", errors="replace", most=MAX_LOG).splitlines(keepends=True)
    before = ",".join(COLUMNS[:-1])  # of versions without checksums
    end = "," if lines and lines[0].strip() == before else ""
    cells = [(line.rstrip("\r\n") + end).split(",") for line in lines[1:] if line.endswith("\n")]
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in cells if len(row) == len(COLUMNS)]
    sound = [row for row in rows if _is_sound(list(row.values()))]
    return sound, len(cells) - len(sound)


def _is_sound(row: list[str]) -> bool:
    """Whether these are an update, then numbers, infinity or nothing, then their checksum or nothing.

    Example:
        >>> _is_sound(["1", "0.5", "", _crc32(["1", "0.5", ""])]), _is_sound(["1", "0.5", "", ""])
        (True, True)
        >>> _is_sound(["1", "0.4", "", _crc32(["1", "0.5", ""])]), _is_sound(["1", "0_5", "", ""])
        (False, False)
    """
    *cells, checksum = row
    number = r"(-?([0-9]+(\.[0-9]*)?(e[-+]?[0-9]{1,3})?|inf))?"
    numbers = re.fullmatch("[0-9]{1,18}", cells[0]) and all(re.fullmatch(number, cell) for cell in cells)
    return bool(numbers) and checksum in ("", _crc32(cells))


def _crc32(cells: list[str]) -> str:
    return f"{zlib.crc32(','.join(cells).encode()):08x}"
