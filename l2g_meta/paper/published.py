"""The rows of the paper's tables, as configs, with the published numbers.

Published accuracies are those of Lee et al. (arXiv 1908.01457), tables 1 to 3, in per cent. A new row is an entry of
``ROWS`` and its name in an experiment's list.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from l2g_meta.models.batchnorm_policy import Policy

# Work of an update: one task; as many tasks as L2G has; B pairs (or, for MAML +, B tasks); MAML's own batch of tasks.
Work = Literal["task", "tasks", "pairs", "batch"]


@dataclass(frozen=True)
class Column:
    """A setting that a table tests: its episodes have each of ``ways`` × ``shots``, and count alike."""

    title: str
    ways: tuple[int, ...]
    shots: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One system.

    Args:
        title: in the table.
        work: what an update has.
        options: fields of ``Config``.
        against: rows that it is compared with, over the same test episodes.
        dear: whether it has fewer updates at small scale.
        time_of: the row whose wall time its updates take, see ``equal_time``; otherwise it has those of its scale.
    """

    title: str
    work: Work
    options: dict[str, Any]
    against: tuple[str, ...] = ()
    dear: bool = False
    time_of: str | None = None

    @property
    def family(self) -> str:
        """Whose number of episodes and schedule it has, see ``plan.EPISODES``."""
        method = self.options["method"]
        learner = {"maml-softmax": "maml", "meta-lstm": "meta-lstm"}.get(method)
        return learner or ("relation" if self.options["head"] == "relation" else "prototypical")

    @property
    def published(self) -> Policy:
        """BatchNorm statistics that the published number is of."""
        return "batch" if self.family in ("maml", "relation") else "running"


COLUMNS = {
    "5w1s": Column("5-way 1-shot", (5,), (1,)),
    "5w5s": Column("5-way 5-shot", (5,), (5,)),
    "10w1s": Column("10-way 1-shot", (10,), (1,)),
    "10w5s": Column("10-way 5-shot", (10,), (5,)),
    "any-shot": Column("Any-shot (5-way 1-, 5-, 10-shot)", (5,), (1, 5, 10)),
    "any-way": Column("Any-way (5-, 7-, 10-way 5-shot)", (5, 7, 10), (5,)),
    "any-both": Column("Any-way any-shot (5-, 7-, 10-way 1-, 5-, 10-shot)", (5, 7, 10), (1, 5, 10)),
}

ALPHA = 0.01  # the paper's
EPISODIC: dict[str, Any] = {"method": "episodic"}
MAML, L2G = ({"method": method, "inner_lr": ALPHA, "mix": 0.0} for method in ("maml", "l2g"))
PROTO, RELATION, MATCHING = {"head": "prototypical"}, {"head": "relation"}, {"head": "matching"}
FIXED = {"ways": 5, "shots": 5}  # T_i of table 3
PROTO_BASES, RELATION_BASES = ("proto", "proto-tasks", "proto-time"), ("relation", "relation-tasks", "relation-time")

ROWS = {
    "matching": Row("Matching Network", "task", EPISODIC | MATCHING),
    "matching-tasks": Row("Matching Network, tasks as L2G", "tasks", EPISODIC | MATCHING),
    "matching-fce": Row("Matching Network, full context", "task", EPISODIC | {"head": "matching-fce"}),
    "l2g-matching": Row("L2G + Matching", "pairs", L2G | MATCHING, ("matching-tasks",)),
    "meta-lstm": Row("Meta-learner LSTM", "task", {"method": "meta-lstm"}, dear=True),
    "maml": Row("MAML", "batch", {"method": "maml-softmax"}),
    "proto": Row("Prototypical Network", "task", EPISODIC | PROTO),
    "proto-tasks": Row("Prototypical Network, tasks as L2G", "tasks", EPISODIC | PROTO),
    "proto-time": Row("Prototypical Network, time as L2G", "tasks", EPISODIC | PROTO, time_of="l2g-proto"),
    "maml-proto": Row("MAML + Prototypical", "pairs", MAML | PROTO, PROTO_BASES),
    "l2g-proto": Row("L2G + Prototypical", "pairs", L2G | PROTO, (*PROTO_BASES, "maml-proto")),
    "l2g-proto-first-order": Row(
        "L2G + Prototypical, first order", "pairs", L2G | PROTO | {"first_order": True}, ("proto-tasks", "l2g-proto")
    ),
    "l2g-proto-meta-sgd": Row(
        "L2G + Prototypical, learned α", "pairs", L2G | PROTO | {"learn_inner_lr": "element"},
        ("proto-tasks", "l2g-proto"),
    ),
    "relation": Row("Relation Network", "task", EPISODIC | RELATION),
    "relation-tasks": Row("Relation Network, tasks as L2G", "tasks", EPISODIC | RELATION, dear=True),
    "relation-time": Row("Relation Network, time as L2G", "tasks", EPISODIC | RELATION, time_of="l2g-relation"),
    "maml-relation": Row("MAML + Relation", "pairs", MAML | RELATION, RELATION_BASES, dear=True),
    "l2g-relation": Row("L2G + Relation", "pairs", L2G | RELATION, (*RELATION_BASES, "maml-relation"), dear=True),
    "l2g-proto-fixed": Row(
        "L2G + Prototypical, T_i 5-way 5-shot", "pairs", L2G | PROTO | FIXED, ("proto", "proto-tasks")
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Experiment:
    """A table: what is trained for it, and what the paper reports.

    Args:
        title: of the table.
        data: data sets.
        columns: of the table.
        rows: names of ``ROWS``.
        paper: published accuracy of each row, in the order of ``columns``; ``None`` where there is none.
    """

    title: str
    data: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    paper: dict[str, tuple[float | None, ...]] = field(default_factory=dict)


FOUR = ("5w1s", "5w5s", "10w1s", "10w5s")
VARIANTS = ("l2g-proto-first-order", "l2g-proto-meta-sgd")
EXPERIMENTS = {
    "table1": Experiment(
        "Table 1: mini-ImageNet", ("mini-imagenet",), FOUR,
        ("matching-fce", "meta-lstm", "maml", *PROTO_BASES, "maml-proto", "l2g-proto", *VARIANTS, *RELATION_BASES,
         "maml-relation", "l2g-relation", "matching", "matching-tasks", "l2g-matching"),
        {
            "matching-fce": (43.56, 55.31, None, None),
            "meta-lstm": (43.44, 60.60, None, None),
            "maml": (48.70, 63.11, 31.27, 46.92),
            "proto": (46.14, 65.77, 32.88, 49.29),
            "maml-proto": (46.73, 65.58, 32.31, 47.61),
            "l2g-proto": (50.20, 66.19, 33.82, 50.71),
            "relation": (51.38, 67.07, 34.86, 47.94),
            "maml-relation": (52.08, 66.70, 35.07, 51.52),
            "l2g-relation": (52.38, 68.11, 36.11, 51.40),
        },
    ),
    "table2": Experiment(
        "Table 2: tieredImageNet", ("tiered-imagenet",), FOUR,
        ("maml", *PROTO_BASES, "maml-proto", "l2g-proto", *RELATION_BASES, "maml-relation", "l2g-relation"),
        {
            "maml": (51.67, 70.30, 34.44, 53.32),
            "proto": (48.58, 69.57, 37.35, 57.83),
            "l2g-proto": (53.47, 72.19, 37.38, 58.44),
            "relation": (54.48, 71.31, 36.32, 58.05),
            "l2g-relation": (56.09, 71.97, 39.15, 57.82),
        },
    ),
    "table3": Experiment(
        "Table 3: mini-ImageNet, any shot and any way", ("mini-imagenet",), ("any-shot", "any-way", "any-both"),
        ("proto", "proto-tasks", "l2g-proto-fixed"),
        {"proto": (58.52, 57.94, 51.02), "l2g-proto-fixed": (60.64, 58.08, 53.00)},
    ),
}  # fmt: skip
