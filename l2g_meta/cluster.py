"""Runs on a cluster: work is handed to Slurm by submitit, and goes on where it stopped after a preemption.

What a run has done is in its folder. A job is therefore a function without arguments that brings its runs to an end,
and that is simply called again when it was interrupted. Each folder names its job in ``job.json``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from l2g_meta.allocator import keep_freed_memory
from l2g_meta.errors import L2GError
from l2g_meta.files.writing import write_text

EXECUTORS = ("slurm", "local")
RECORD = "job.json"  # in a run directory: the job that has it
REQUEUES = 20  # time limits that a job may run into; preemptions are not counted
ONE_PROCESS = ("nodes", "ntasks", "ntasks_per_node", "array")  # options that would start a run several times
Options = dict[str, Any]


class Work(Protocol):
    """A run, brought to its end by one process; has to be picklable."""

    @property
    def name(self) -> str:
        """In messages."""
        ...

    @property
    def out(self) -> Path:
        """Its run directory."""
        ...

    def __call__(self) -> Sequence[str]:
        """Does what is left of it; returns what failed."""
        ...


class Job(NamedTuple):
    """A submitted job."""

    id: str
    executor: str
    logs: str  # folder of its output, ID_0_log.out and ID_0_log.err

    @property
    def state(self) -> str:
        """As Slurm calls it; a local one is RUNNING or ENDED.

        Raises:
            L2GError: if submitit is missing.
        """
        job = self._submitit()
        if self.executor == "slurm":
            return job.state
        return "ENDED" if job.paths.result_pickle.exists() or not _lives(int(self.id)) else "RUNNING"

    @property
    def ended(self) -> bool:
        """Whether it will do no more."""
        return self._submitit().done() if self.executor == "slurm" else self.state == "ENDED"

    def describe(self, folder: Path) -> str:
        """What it does, and what to do if the cluster has forgotten it."""
        state = self.state
        forgotten = f"; if Slurm has forgotten it, remove {folder / RECORD}" if state == "UNKNOWN" else ""
        return f"job {self.id}, {state}{forgotten}"

    @property
    def log(self) -> Path:
        """What it printed; errors are in the file beside it that ends in ``.err``."""
        return Path(self.logs) / f"{self.id}_0_log.out"

    def _submitit(self) -> Any:
        submitit = require_submitit()
        return (submitit.SlurmJob if self.executor == "slurm" else submitit.LocalJob)(self.logs, self.id)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        command = Path(f"/proc/{pid}/cmdline")  # Linux; numbers are given again
        return not command.exists() or b"submitit" in command.read_bytes()
    except OSError:  # there is none, or it is somebody else's
        return False


def job_of(run: Path) -> Job | None:
    """The job that a run directory was given to, if it was."""
    try:
        found = json.loads((run / RECORD).read_text(encoding="utf-8"))
        job = Job(str(found["id"]), found["executor"], str(found["logs"]))
        if job.executor not in ("slurm", "local") or (job.executor == "local" and not job.id.isdigit()):
            raise ValueError(f"executor {job.executor!r} and id {job.id!r}")
        return job
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise L2GError(f"need the record of a job in {run / RECORD}, got: {error}; remove it") from error


@dataclass(frozen=True)
class Restartable:
    """What submitit calls: pieces of work one after the other, and all of them again when the job was interrupted."""

    works: tuple[Work, ...]
    threads: int | None = None  # of a local job, which shares the cores with others
    devices: str | None = None  # CUDA_VISIBLE_DEVICES where a local job came from; submitit hides them all

    def __call__(self) -> None:
        """Does what is left.

        Raises:
            L2GError: with all that failed.
        """
        if self.threads is not None:
            torch.set_num_threads(self.threads)
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
            if self.devices is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = self.devices
        keep_freed_memory()
        failed = [message for work in self.works for message in work()]
        if failed:
            raise L2GError("\n".join(failed))

    def checkpoint(self) -> Any:
        """What is requeued after a preemption or at the time limit: the same, since all progress is on disk."""
        return require_submitit().helpers.DelayedSubmission(self)


def submit(
    works: Sequence[Work],
    executor: str,
    logs: Path,
    *,
    options: Options | None = None,
    parallel: int | None = None,
    say: Callable[[str], None] = print,
) -> list[Job]:
    """Hands work over, and notes in each run's folder which job has it.

    Args:
        works: what is to be done. On Slurm each is a job of one array; locally ``parallel`` processes share them.
        executor: ``"slurm"``, or ``"local"`` for processes in the background of this machine.
        logs: folder for the jobs' output and submitit's files, on a file system that the machines share.
        options: of ``sbatch``, see ``parsed``; ``time``, in minutes, is needed.
        parallel: most jobs at a time; by default as many as Slurm lets, and 1 locally.
        say: is told the jobs, and how to look at them.

    Raises:
        L2GError: if submitit or Slurm is missing, or refuses an option.
    """
    if not works:
        say("nothing to submit")
        return []
    logs = logs.absolute()
    hand_over = _slurm if executor == "slurm" else _local
    shares = hand_over(works, logs, dict(options or {}), parallel)
    for job, share in shares:
        for work in share:
            work.out.mkdir(parents=True, exist_ok=True)
            write_text(work.out / RECORD, json.dumps(job._asdict()) + "\n")
        say(f"job {job.id}: {', '.join(work.name for work in share)}")
    jobs = [job for job, _ in shares]
    if executor == "slurm":
        say(f"look: squeue --me; stop: scancel {jobs[0].id.partition('_')[0]}; output: {jobs[0].log}")
    else:
        say(f"look: tail -f {jobs[0].log}; stop: kill {' '.join(job.id for job in jobs)}")
    return jobs


Shares = list[tuple[Job, Sequence[Work]]]


def _slurm(works: Sequence[Work], logs: Path, options: Options, parallel: int | None) -> Shares:
    submitit = require_submitit()
    several = [name for name in ONE_PROCESS if name in options]
    if several:
        raise L2GError(f"need one process for each job, got --slurm {several[0]}; leave it out")
    if not isinstance(options.get("time"), int):
        raise L2GError(f"need --slurm time=MINUTES, a whole number, got {options.get('time')}; a job that runs out of "
                       "time is requeued and goes on")  # fmt: skip
    known: Options = {"job_name": options.pop("job_name", "l2g"), "time": options.pop("time")}
    if parallel is not None:
        known["array_parallelism"] = parallel
    try:
        queue = submitit.SlurmExecutor(logs, max_num_timeout=REQUEUES)
        queue.update_parameters(**known, additional_parameters=options)
        jobs = queue.submit_array([Restartable((work,)) for work in works])
    except (OSError, RuntimeError) as error:  # no Slurm here, or sbatch refuses
        raise L2GError(f"need Slurm to take the jobs, got: {error}; submit from a machine of the cluster") from error
    return [(Job(job.job_id, "slurm", str(logs)), (work,)) for job, work in zip(jobs, works, strict=True)]


def _local(works: Sequence[Work], logs: Path, options: Options, parallel: int | None) -> Shares:
    submitit = require_submitit()
    if options:
        raise L2GError(f"the option --slurm {next(iter(options))} is Slurm's; leave it out, or submit to slurm")
    n = min(parallel or 1, len(works))
    shares = [tuple(works[i::n]) for i in range(n)]
    threads = max(1, torch.get_num_threads() // n)
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    queue = submitit.LocalExecutor(logs, max_num_timeout=REQUEUES)
    queue.update_parameters(timeout_min=10**6)
    with _no_output():  # its watcher would keep a pipe open that the caller reads to its end
        jobs = [queue.submit(Restartable(share, threads, devices)) for share in shares]
    return [(Job(job.job_id, "local", str(logs)), share) for job, share in zip(jobs, shares, strict=True)]


@contextmanager
def _no_output() -> Iterator[None]:
    """Processes that are started meanwhile write nowhere; what they have to say is in their own files."""
    kept = [os.dup(stream) for stream in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        yield
    finally:
        for stream, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, stream)
            os.close(copy)
        os.close(nowhere)


def parsed(texts: Sequence[str]) -> Options:
    """Options of ``sbatch`` from ``NAME=VALUE,NAME=VALUE``: any long one, with ``-`` or ``_``.

    A part without ``=`` belongs to the value before it.

    Raises:
        L2GError: if the first part has no ``=``.

    Example:
        >>> parsed(["partition=gpu,time=240", "gpus-per-node=1,exclude=node1,node2,requeue=true"])
        {'partition': 'gpu', 'time': 240, 'gpus_per_node': 1, 'exclude': 'node1,node2', 'requeue': True}
    """
    found: dict[str, str] = {}
    for text in texts:
        name = ""
        for part in text.split(","):
            before, equals, value = part.partition("=")
            if equals:
                name = before.strip().lstrip("-").replace("-", "_")
                found[name] = value
            elif name:
                found[name] += f",{part}"
            else:
                raise L2GError(f"need --slurm NAME=VALUE,NAME=VALUE, got {text!r}; for example partition=gpu,time=240")
    return {
        name: True if value == "true" else int(value) if value.isdigit() else value for name, value in found.items()
    }


def require_submitit() -> Any:
    """The package submitit.

    Raises:
        L2GError: with what to install.
    """
    try:
        import submitit
    except ImportError as error:
        raise L2GError("submitting jobs needs submitit; pip install l2g-meta[slurm]") from error
    return submitit
