"""What an experiment trains: a cell is one row in one column with one seed, a run directory of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from l2g_meta.errors import L2GError, did_you_mean
from l2g_meta.files.reading import read_text
from l2g_meta.files.sealed import opened
from l2g_meta.paper.published import COLUMNS, Column, Row
from l2g_meta.paper.study import EXPERIMENTS, ROWS
from l2g_meta.training.config import Config

# Our choice, the paper gives no total; for MAML and the LSTM as their authors trained them.
EPISODES = {"prototypical": 100_000, "relation": 500_000, "maml": 240_000, "meta-lstm": 60_000}
NEVER = 10**9
HALVE_EVERY = {"prototypical": 10_000, "relation": 100_000, "maml": NEVER, "meta-lstm": NEVER}  # episodes; as published
RESULT = "test.json"  # in a cell's folder when it is done
EQUAL_TIME = "equal-time.json"  # what ``equal_time`` found when it began


@dataclass(frozen=True)
class Scale:
    """How much of the paper's budget is spent.

    Args:
        title: in words; printed with every result.
        seeds: trained models per cell.
        updates: most updates of a cell; ``None`` for the paper's number of episodes.
        validations: of a run.
        dear: most updates of rows that say so, and of tasks of several ways and shots.
        image_size: pixels.
        queries: per class of a training task.
        test_queries: per class of a test episode.
        validation_episodes: of each validation.
        test_episodes: of each trained model.
        timed: updates of each of two rows that are timed for equal wall time.
        pairs: of an update; the paper has 5.
        aligned: pairs of test tasks whose gradients are compared, see ``l2g_meta.evaluation.alignment``.
        averaged: whether runs keep averaged weights, and those of each validation; both are tested.
        columns: how many of an experiment's.
        data: instead of the experiment's.
        options: fields of ``Config`` for all rows; a scale that has some begins with given weights.
    """

    title: str
    seeds: int
    updates: int | None
    validations: int
    dear: int | None = None
    image_size: int = 28
    queries: int = 10
    test_queries: int = 15
    validation_episodes: int = 200
    test_episodes: int = 600
    timed: int = 7
    pairs: int = 5
    aligned: int = 0
    averaged: bool = False
    columns: int | None = None
    data: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


SCALES = {
    "full": Scale(
        "the paper's budget: 84 px, 15 queries; episodes, which it leaves open: 100,000, relation networks 500,000; as "
        "their authors, MAML 240,000 and the LSTM 60,000",
        seeds=5, updates=None, validations=50, image_size=84, queries=15, validation_episodes=600, timed=15,
    ),
    "small": Scale(
        "reduced: 28 px instead of 84, 300 updates (150 where they are dear) instead of 20,000 and more, 10 training "
        "queries instead of 15; rows of one task per update have fewer episodes than L2G",
        seeds=2, updates=300, validations=6, dear=150, columns=1,
    ),
    "screen": Scale(
        "a screen, to choose what to look at closely: 28 px, 200 updates of 2 pairs, 10 training queries",
        seeds=1, updates=200, validations=4, pairs=2, aligned=50,
    ),
    "confirm": Scale(
        "1000 updates of 2 pairs, 28 px, 10 training queries",
        seeds=3, updates=1000, validations=10, pairs=2, aligned=100,
    ),
    "spread": Scale(
        "600 updates of 2 pairs, 28 px, 10 training queries, eight seeds: how much trained models differ",
        seeds=8, updates=600, validations=6, pairs=2, averaged=True,
    ),
    "long": Scale(
        "8000 updates of 2 pairs, 28 px, 15 training queries",
        seeds=2, updates=8000, validations=16, queries=15, validation_episodes=600, timed=15, pairs=2, aligned=100,
        averaged=True,
    ),
    "finetune": Scale(
        "500 updates of 2 pairs at lr 3e-4, from a pre-trained ResNet-12, 42 px, 15 training queries",
        seeds=3, updates=500, validations=5, image_size=42, queries=15, validation_episodes=600, pairs=2, aligned=100,
        averaged=True,
        options={"lr": 3e-4, "backbone": "resnet12", "backbone_options": ("widths=32,64,128,256",)},
    ),
    "smoke": Scale(
        "a test that everything runs: 2 updates on glyphs, 5 episodes; its numbers mean nothing",
        seeds=1, updates=2, validations=1, dear=2, queries=5, test_queries=5, validation_episodes=5, test_episodes=5,
        timed=1, aligned=1, averaged=True, columns=1, data="glyphs",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """An experiment at a scale, in a folder; see ``plan``."""

    experiment: str
    scale: str
    out: Path
    root: str | None
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    seeds: int
    device: str
    weights: str | None = None

    @property
    def data(self) -> tuple[str, ...]:
        """Names of its data sets."""
        own = SCALES[self.scale].data
        return EXPERIMENTS[self.experiment].data if own is None else (own,)

    @property
    def cells(self) -> list[Cell]:
        """All cells, one seed after the other."""
        return [
            Cell(self, data, column, row, seed)
            for seed in range(self.seeds)
            for data in self.data
            for column in self.columns
            for row in self.rows
        ]


def plan(
    experiment: str,
    scale: str,
    out: Path,
    *,
    root: str | None = None,
    columns: Sequence[str] | None = None,
    rows: Sequence[str] | None = None,
    seeds: int | None = None,
    device: str = "auto",
    weights: str | None = None,
) -> Plan:
    """The plan of an experiment.

    Raises:
        L2GError: for an unknown name, or without the data or the weights that the scale needs.

    Example:
        >>> len(plan("table1", "small", Path("runs"), root="data", rows=["proto", "l2g-proto"]).cells)
        4
    """
    spec, budget = EXPERIMENTS[experiment], SCALES[scale]
    columns = _chosen("columns", columns, spec.columns, spec.columns[: budget.columns])
    rows = _chosen("rows", rows, tuple(ROWS), spec.rows)
    found = Plan(experiment, scale, out, root, columns, rows, seeds or budget.seeds, device, weights)
    on_disk = [name for name in found.data if name != "glyphs"]
    if root is None and on_disk:
        raise L2GError(f"need --data-root, the folder that holds {' and '.join(on_disk)}; --scale smoke needs none")
    if budget.options and weights is None:
        raise L2GError(f"need --weights RUN|FILE, the pre-trained encoder that --scale {scale} begins with")
    return found


def _chosen(kind: str, names: Sequence[str] | None, known: Sequence[str], default: Sequence[str]) -> tuple[str, ...]:
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise L2GError(
            f"need --{kind} of {', '.join(known)}; got {', '.join(unknown)}{did_you_mean(unknown[0], known)}"
        )
    return tuple(dict.fromkeys(names or default))


@dataclass(frozen=True)
class Cell:
    """One trained model of a table."""

    plan: Plan
    data: str
    column: str
    row: str
    seed: int

    @property
    def folder(self) -> Path:
        """Its run directory; tables of one scale share it."""
        return self.plan.out / "cells" / self.plan.scale / self.data / self.column / f"{self.row}-seed{self.seed}"

    @property
    def name(self) -> str:
        """In messages."""
        return f"{self.data} {self.column} {self.row} seed {self.seed}"

    @property
    def done(self) -> bool:
        """Whether it is trained and tested."""
        return (self.folder / RESULT).exists()

    @property
    def begun(self) -> bool:
        """Whether its training has begun."""
        return (self.folder / "config.json").exists()

    @property
    def decided(self) -> dict[str, Any] | None:
        """What ``equal_time`` found when it began, if it has another row's time."""
        path = self.folder / EQUAL_TIME
        return _read(path) if path.exists() else None

    @property
    def result(self) -> dict[str, Any]:
        """What it found.

        Raises:
            L2GError: if that is damaged, or belongs to another config than the plan's.
        """
        found = _read(self.folder / RESULT)
        check_same(self, Config.load(self.folder / "config.json"))
        return found

    def config(self) -> Config:
        """What it trains; for equal wall time with the updates that were decided when it began."""
        row, column, scale = ROWS[self.row], COLUMNS[self.column], SCALES[self.plan.scale]
        updates = self._updates()
        values = {
            "data": self.data,
            **{name: getattr(self.plan, name) for name in ("root", "device", "weights")},
            **{name: getattr(scale, name) for name in ("image_size", "queries", "pairs")},
            **dict.fromkeys(("ways", "outer_ways"), _size(column.ways)),
            **dict.fromkeys(("shots", "outer_shots"), _size(column.shots)),
            "tasks_per_update": _tasks_per_update(row, column),
            "iterations": updates,
            "eval_every": max(1, updates // scale.validations),
            "eval_episodes": scale.validation_episodes,
            "lr_halve_every": HALVE_EVERY[row.family],
            "bn": row.published,
            "average": scale.averaged,
            "seed": self.seed,
        }
        return Config(**values | scale.options | row.options).resolved()

    def _updates(self) -> int:
        """As many as its scale has; with another row's time those decided when it began, until then the other's."""
        row, column, scale = ROWS[self.row], COLUMNS[self.column], SCALES[self.plan.scale]
        if row.time_of is not None:
            decided = self.decided
            return replace(self, row=row.time_of)._updates() if decided is None else decided["updates"]
        if scale.updates is None:
            return EPISODES[row.family] // (_tasks_per_update(row, column) or scale.pairs)
        dear = row.dear or len(column.ways) * len(column.shots) > 1
        return scale.dear if dear and scale.dear else scale.updates


def _read(path: Path) -> dict[str, Any]:
    try:
        found = opened(json.loads(read_text(path)))
        if not isinstance(found, dict):
            raise ValueError("no object")
        return found
    except (OSError, ValueError, RecursionError) as error:
        raise L2GError(f"need what a cell found in {path}, got: {error}; remove it and run again") from error


def check_same(cell: Cell, found: Config) -> None:
    """That a cell's folder holds what the plan says.

    Raises:
        L2GError: naming the differences.
    """
    difference = cell.config().differences(found)
    if difference:
        raise L2GError(f"need {difference}, as {cell.folder} has it; choose another --out, or remove that folder")


def _size(numbers: tuple[int, ...]) -> int | tuple[int, ...]:
    return numbers[0] if len(numbers) == 1 else numbers


def _tasks_per_update(row: Row, column: Column) -> int | None:
    """As MAML was published its batch has 4 tasks of 1 shot, 2 of 5; ``None`` for all tasks of the pairs."""
    return {"task": 1, "batch": 4 if column.shots == (1,) else 2}.get(row.work)
