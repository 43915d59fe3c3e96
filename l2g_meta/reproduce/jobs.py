"""The cells of an experiment as jobs of a cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from l2g_meta.cluster import Job, Options, job_of, submit
from l2g_meta.reproduce.cells import check, work
from l2g_meta.reproduce.plan import Cell, Plan


@dataclass(frozen=True)
class CellWork:
    """A cell as what a job does."""

    cell: Cell

    @property
    def name(self) -> str:
        """In messages."""
        return self.cell.name

    @property
    def out(self) -> Path:
        """Its run directory."""
        return self.cell.folder

    def __call__(self) -> list[str]:
        """Trains and tests it, if that is not done; returns what failed."""
        return work([self.cell], progress=False)


def submit_cells(
    plan: Plan,
    executor: str,
    *,
    options: Options | None = None,
    parallel: int | None = None,
    say: Callable[[str], None] = print,
) -> list[Job]:
    """Submits the cells that are neither done nor with a job; see ``l2g_meta.cluster.submit``.

    Raises:
        L2GError: if the plan's folder cannot be written, data is missing, or nobody takes the jobs.
    """
    plan = replace(plan, out=plan.out.absolute(), root=plan.root and str(Path(plan.root).expanduser().absolute()))
    check(plan)
    with_job, works = submitted(plan), []
    for cell in plan.cells:
        job = with_job.get(cell)
        if job is not None and not job.ended:
            say(f"{cell.name}: {job.describe(cell.folder)}")
        elif not cell.done:
            works.append(CellWork(cell))
    return submit(works, executor, plan.out / "jobs", options=options, parallel=parallel, say=say)


def submitted(plan: Plan) -> dict[Cell, Job]:
    """The cells that are not done and were given to a job."""
    return {cell: job for cell in plan.cells if not cell.done and (job := job_of(cell.folder)) is not None}


def describe(cell: Cell, job: Job) -> str:
    """What has become of a submitted cell that is not done, and what to do."""
    if not job.ended:
        return f"{cell.name}: {job.describe(cell.folder)}"
    return (
        f"{cell.name}: job {job.id} ended ({job.state}) without a result, see {job.log.with_suffix('.err')}; add "
        f"--submit to submit it again, or remove {cell.folder / 'job.json'} to run it here"
    )
