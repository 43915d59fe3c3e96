"""What a command prints, and where: ``--quiet``, ``--json``, terminals that lack some characters."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from l2g_meta.errors import L2GError
from l2g_meta.files.names import shown
from l2g_meta.files.writing import check_writable, write_text

LONGEST = 2000  # characters of an error
STDOUT = Path("-")


def add_output(parser: argparse.ArgumentParser, *, json: str) -> None:
    """``--quiet``, and ``--json [FILE]`` with what it writes."""
    add = parser.add_argument_group("output").add_argument
    add("--quiet", action="store_true", help="no progress bar and no lines: errors and warnings only")
    add("--json", nargs="?", const=STDOUT, type=Path, metavar="FILE", help=f"write {json} as JSON; without a FILE, or "
        "for -, to stdout, which then holds nothing else")  # fmt: skip


@contextmanager
def output_of(args: argparse.Namespace) -> Iterator[None]:
    """While a command runs, its lines go where ``args`` want them.

    With JSON on stdout they go to stderr, with ``--quiet`` nowhere; that holds for what other packages print, too.

    Raises:
        L2GError: if the file for JSON cannot be written.
    """
    args.stdout = sys.stdout  # for ``emit``
    if args.json is not None and args.json != STDOUT:
        check_place(args.json, "--json")
    with open(os.devnull, "w", encoding="utf-8", errors="backslashreplace") as nowhere:
        target = nowhere if args.quiet else sys.stderr if args.json == STDOUT else sys.stdout
        with redirect_stdout(target):
            yield


def emit(args: argparse.Namespace, values: Any) -> None:
    """Writes JSON where ``--json`` wants it, if it was given; ``null`` for numbers that JSON lacks."""
    if args.json is None:
        return
    text = json.dumps(finite_or_none(values), indent=2, allow_nan=False, default=str)
    if args.json == STDOUT:
        print(text, file=args.stdout, flush=True)
    else:
        write_text(args.json, text + "\n")


def finite_or_none(value: Any) -> Any:
    """The same with ``None`` for the numbers that JSON lacks, NaN and ±∞, at any depth.

    Example:
        >>> finite_or_none({"a": [1.5, float("nan")]})
        {'a': [1.5, None]}
    """
    if isinstance(value, dict):
        return {name: finite_or_none(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def complain(message: str) -> None:
    """An error in a line of its own on stderr, which names from elsewhere neither break nor lengthen."""
    text = shown(" ".join(message.split()))
    print(f"l2g: {text if len(text) < LONGEST else text[:LONGEST] + ' ...'}", file=sys.stderr)


def plain_warnings() -> None:
    """Lets this package's warnings be a line as errors are, without the place in the code."""
    usual = warnings.formatwarning

    def line(message: Warning | str, category: type[Warning], filename: str, *more: Any) -> str:
        own = issubclass(category, UserWarning) and Path(filename).is_relative_to(Path(__file__).parents[1])
        return f"l2g: warning: {shown(str(message))}\n" if own else usual(message, category, filename, *more)

    warnings.formatwarning = line  # type: ignore[assignment]
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of files that are then refused, or read all the same


def print_anything() -> None:
    """Lets stdout and stderr take any text: what their encoding lacks is written as an escape, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def check_place(path: Path, flag: str) -> None:
    """That the file that a flag names can be written, before any work.

    Raises:
        L2GError: if not.
    """
    if path.is_dir():
        raise L2GError(f"need a file to write for {flag}, got the folder {path}; name a file in it, or put {flag} last")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_writable(path)
    except OSError as error:
        reason = error.strerror or error
        raise L2GError(f"need a file to write for {flag}, got {path}: {reason}; choose another") from error
