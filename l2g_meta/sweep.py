"""A file with one `l2g train` command per line, as jobs of a cluster."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from l2g_meta.checkpoint import read_info
from l2g_meta.cluster import Job, Options, job_of, submit
from l2g_meta.config import Config
from l2g_meta.data.images import SPLITS
from l2g_meta.errors import L2GError
from l2g_meta.presets import preset
from l2g_meta.state import numbers

COMMANDS = (["l2g", "train"], ["train"], ["python", "-m", "l2g_meta", "train"])  # how a line may begin


@dataclass(frozen=True)
class Run:
    """One training run."""

    config: Config
    out: Path

    @property
    def name(self) -> str:
        """In messages."""
        return str(self.out)

    @property
    def done(self) -> int:
        """Updates up to the newest state."""
        return max(numbers(self.out), default=0)

    def __call__(self) -> list[str]:
        """Trains, or goes on; returns what failed."""
        from l2g_meta.run import holds_run
        from l2g_meta.training import train

        try:
            train(self.config, self.out, resume=holds_run(self.out), progress=False)
        except (L2GError, ImportError, OSError, RuntimeError) as error:
            return [f"{self.out}: {error}"]
        return []


def run_of(args: argparse.Namespace) -> Run:
    """The new run that the arguments of ``l2g train`` describe."""
    given = {f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}
    config = Config(**preset(getattr(args, "preset", None)) | given).resolved()
    head = config.head.rpartition(":")[2]
    return Run(config, args.out or Path("runs") / f"{config.data}-{config.method}-{head}-seed{config.seed}")


def read_sweep(path: Path) -> list[Run]:
    """The runs of a file; empty lines and what follows a ``#`` are left out.

    Raises:
        L2GError: naming the line, if it is no `l2g train` command, has the folder of another, or its folder holds
            another run.
    """
    from l2g_meta.commands.parser import build_parser

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise L2GError(
            f"need a file with an `l2g train` command per line, got {path}: {reason}; name another"
        ) from error
    runs: dict[Path, Run] = {}
    for number, line in enumerate(lines, 1):
        try:
            words = shlex.split(line, comments=True)
            if not words:
                continue
            begins = [command for command in COMMANDS if words[: len(command)] == command]
            if not begins or "--resume" in words:
                raise L2GError("need `l2g train ...` without --resume: a run that was begun is continued")
            run = run_of(build_parser(["train"]).parse_args(["train", *words[len(begins[0]) :]]))
            run = replace(run, out=run.out.expanduser().absolute())
            if run.out in runs:
                raise L2GError(f"{run.out} is another line's folder, too; give each its --out")
            _check_same(run)
        except (L2GError, ValueError) as error:
            raise L2GError(f"{path}, line {number}: {error}") from error
        except SystemExit as error:  # argparse has said why
            raise L2GError(f"{path}, line {number}: need a command that `l2g train` takes, got {line!r}") from error
        runs[run.out] = run
    if not runs:
        raise L2GError(f"need an `l2g train` command in {path}, got none")
    return list(runs.values())


def _check_same(run: Run) -> None:
    if (run.out / "config.json").exists():
        difference = run.config.differences(Config.load(run.out / "config.json"))
        if difference:
            raise L2GError(f"need {difference}, as {run.out} has it; choose another --out")


def submit_sweep(
    path: Path,
    executor: str,
    *,
    options: Options | None = None,
    parallel: int | None = None,
    say: Callable[[str], None] = print,
) -> list[Job]:
    """Submits the runs of a file that are neither finished nor with a job, and says what has become of the others.

    Raises:
        L2GError: as ``read_sweep`` and ``l2g_meta.cluster.submit``.
    """
    from l2g_meta.build import build_data

    left = []
    for run in read_sweep(path):
        job = job_of(run.out)
        if run.done >= run.config.iterations:
            best = read_info(run.out / "best.safetensors")
            say(f"{run.name}: done, best validation {best['val_accuracy']:.2f} %")
        elif job is not None and not job.ended:
            say(f"{run.name}: {run.done} of {run.config.iterations} updates, {job.describe(run.out)}")
        else:
            if job is not None:
                say(f"{run.name}: job {job.id} ended ({job.state}) after {run.done} of {run.config.iterations} "
                    f"updates, see {job.log.with_suffix('.err')}; once more")  # fmt: skip
            left.append(run)
    data = {tuple(getattr(r.config, n) for n in ("data", "root", "image_size", "split_seed")): r.config for r in left}
    for config in data.values():
        for split in SPLITS[:2]:
            build_data(config, split)  # missing data is found now, and converted once
    return submit(left, executor, path.with_name(f"{path.name}.jobs"), options=options, parallel=parallel, say=say)
