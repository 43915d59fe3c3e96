"""The command ``l2g``, thin: it calls one of ``l2g_meta.cli`` and turns errors into a line and an exit code."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

from l2g_meta.cli import command
from l2g_meta.cli.output import complain, output_of, plain_warnings, print_anything
from l2g_meta.cli.parser import parse
from l2g_meta.errors import L2GError
from l2g_meta.files.reading import pass_over_matplotlibrc
from l2g_meta.training.allocator import keep_freed_memory

MEMORY = "lower --pairs, --queries, --image-size or --batch-size, where the command has them, or choose --device cpu"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0 done, 1 in part, 2 unusable input, 128 + n stopped by signal n."""
    args: argparse.Namespace | None = None
    print_anything()
    plain_warnings()
    if argv is None:  # it is a process of its own; those that it starts import nothing from the current folder either
        os.environ.setdefault("PYTHONSAFEPATH", "1")
        pass_over_matplotlibrc()
    try:
        args = parse(argv)
        keep_freed_memory()
        with output_of(args):
            code = command(args.command).run(args)
        if sys.stdout is not None:
            sys.stdout.flush()  # now, so that a reader that has gone is noticed
        return code
    except (L2GError, ImportError) as error:
        foreign = isinstance(error, ImportError) and "pip install" not in str(error)
        complain(f"{error}; l2g doctor says what is missing, and what adds it" if foreign else str(error))
        return 2
    except BrokenPipeError:  # `l2g ... | head` has seen enough
        return 128 + getattr(signal, "SIGPIPE", 13)
    except OSError as error:
        if "shared object" in str(error):  # PyTorch's, when a library that it links to is missing
            complain(f"{error}; l2g doctor says what does not work, and what mends it")
            return 2
        what = "cannot read or write" if error.filename is None else f"cannot use {error.filename}"
        complain(f"{what}: {error.strerror or error}")
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        first_line = "".join(str(error).splitlines()[:1])
        complain(f"need more memory than there is: {first_line}; {MEMORY}")
        return 2
    except KeyboardInterrupt as error:
        what = str(error) or "interrupted"
        remedy = "run it again" if args is None else getattr(command(args.command), "INTERRUPTED", "run it again")
        complain(f"{what}; {remedy.replace('RUN', shlex.quote(getattr(error, 'run', 'RUN')))}")
        return getattr(error, "code", 130)
    finally:
        _settle_stdout()
        if "l2g_meta.evaluation.world" in sys.modules:
            sys.modules["l2g_meta.evaluation.world"].shutdown()


def _out_of_memory(error: BaseException) -> bool:
    """PyTorch says so by an error of its own on a GPU, and by a plain one on a CPU."""
    return isinstance(error, MemoryError) or (
        type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    )


def _settle_stdout() -> None:
    """Writes what is left in its buffer, or forgets it: Python would complain at the end."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError):  # it is no file, as in a test
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
