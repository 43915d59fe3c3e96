"""The cells of an experiment as jobs of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from l2g_meta.cluster import Job, Options, job_of, submit
from l2g_meta.reproduce.cells import check, work
from l2g_meta.reproduce.plan import Cell, Plan


@dataclass(frozen=True)
class Cells:
    """Cells that one job trains and tests."""

    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        """In messages."""
        return " + ".join(cell.name for cell in self.cells)

    @property
    def folders(self) -> list[Path]:
        """Run directories of those that are not done."""
        return [cell.folder for cell in self.cells if not cell.done]

    def __call__(self) -> list[str]:
        """Trains and tests those that are not done; returns what failed."""
        return work(self.cells, progress=False)


def grouped(cells: Sequence[Cell]) -> list[Cells]:
    """Each cell by itself, but with those that it waits for: equal wall time needs one machine.

    Example:
        >>> from l2g_meta.reproduce.plan import plan
        >>> rows = ["proto", "proto-time", "proto-tasks", "l2g-proto"]
        >>> [[cell.row for cell in group.cells] for group in grouped(plan("table1", "smoke", Path(), rows=rows).cells)]
        [['proto'], ['proto-time', 'proto-tasks', 'l2g-proto']]
    """
    groups: list[list[Cell]] = []
    for cell in cells:
        mine = [group for group in groups if any(other in cell.needs or cell in other.needs for other in group)]
        groups = [group for group in groups if group not in mine] + [[*(c for group in mine for c in group), cell]]
    order = {cell: i for i, cell in enumerate(cells)}
    return sorted((Cells(tuple(group)) for group in groups), key=lambda group: order[group.cells[0]])


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
    with_job = submitted(plan)
    groups = []
    for group in grouped(plan.cells):
        taken = next((c for c in group.cells if c in with_job and not with_job[c].ended), None)
        if taken is not None:
            say(f"{group.name}: job {with_job[taken].id} has it ({with_job[taken].state})")
        elif group.folders:
            groups.append(group)
    return submit(groups, executor, plan.out / "jobs", options=options, parallel=parallel, say=say)


def submitted(plan: Plan) -> dict[Cell, Job]:
    """The cells that are not done and were given to a job, and those that wait for one of them."""
    found = {cell: job for cell in plan.cells if not cell.done and (job := job_of(cell.folder)) is not None}
    waiting = {cell: found[need] for cell in plan.cells if not cell.done for need in cell.needs if need in found}
    either = waiting | found
    return {cell: either[cell] for cell in plan.cells if cell in either}


def describe(cell: Cell, job: Job) -> str:
    """What has become of a submitted cell that is not done, and what to do."""
    if not job.ended:
        return f"{cell.name}: job {job.id}, {job.state}"
    return (
        f"{cell.name}: job {job.id} ended ({job.state}) without a result, see {job.log.with_suffix('.err')}; add "
        f"--submit to submit it again, or remove {cell.folder / 'job.json'} to run it here"
    )
