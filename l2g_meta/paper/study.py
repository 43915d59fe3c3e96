"""Our own questions about L2G: which inner step, what in it helps, against which baseline, and where.

Each row stands against episodic training on as many tasks per update (``proto-tasks``), by the same test episodes. A
new row is an entry of ``ROWS`` and its name in a study's list.
"""

from __future__ import annotations

from typing import Any

from l2g_meta.paper import published
from l2g_meta.paper.published import EPISODIC, L2G, PROTO, Experiment, Row

BASE = ("proto-tasks",)
SQUARED: dict[str, Any] = {"distance": "squared", "dims": "mean"}
COSINE: dict[str, Any] = {"distance": "cosine", "temperature": 0.1}


def _l2g(title: str, against: tuple[str, ...] = BASE, **options: Any) -> Row:
    return Row(f"L2G, {title}", "pairs", L2G | PROTO | options, against=against)


def _proto(title: str, against: tuple[str, ...] = BASE, **options: Any) -> Row:
    return Row(f"Episodic, {title}", "tasks", EPISODIC | PROTO | options, against=against)


STEPS = {
    "proto-squared": _proto("squared distance, mean", **SQUARED),
    "proto-cosine": _proto("cosine, temperature 0.1", **COSINE),
    "l2g-0.001": _l2g("α = 0.001", inner_lr=0.001),
    "l2g-0.1": _l2g("α = 0.1", inner_lr=0.1),
    "l2g-squared-1": _l2g("squared distance, mean, α = 1", ("proto-squared", *BASE), **SQUARED, inner_lr=1.0),
    "l2g-cosine-1": _l2g("cosine, α = 1", ("proto-cosine", *BASE), **COSINE, inner_lr=1.0),
}
PARTS = {
    "l2g-mix-0.25": _l2g("mix 0.25", (*BASE, "l2g-proto"), mix=0.25),
    "l2g-mix-0.5": _l2g("mix 0.5", (*BASE, "l2g-proto"), mix=0.5),
    "l2g-mix-0.5-0.1": _l2g("mix 0.5, α = 0.1", (*BASE, "l2g-mix-0.5"), mix=0.5, inner_lr=0.1),
    "l2g-2-steps": _l2g("2 inner steps", (*BASE, "l2g-proto"), inner_steps=2),
    "l2g-5-pairs": _l2g("5 pairs", ("proto-5-pairs",), pairs=5),
    "proto-5-pairs": _proto("tasks of 5 pairs", pairs=5),
}
BASES = {
    "proto-half": _proto("half as many tasks", (*BASE, "l2g-proto", "maml-proto"), tasks_per_update=2),
    "proto-10-way": _proto("10-way", ways=10, outer_ways=10),
    "proto-decay-1e-4": _proto("weight decay 1e-4", weight_decay=1e-4),
    "proto-decay-1e-3": _proto("weight decay 1e-3", weight_decay=1e-3),
}
# As `l2g train` has it. Not one of the 40 screens: taken to three seeds at once, by its name.
DEFAULT = {"l2g-mix-0.5-0.003": _l2g("mix 0.5, α = 0.003", (*BASE, "l2g-mix-0.5"), mix=0.5, inner_lr=0.003)}
# A given encoder as it is: by the cosine, as it was validated, and by the head of the rows that train. Each row of a
# table with these is compared with both.
START = {
    "start": Row("The start, not trained", "tasks", EPISODIC | PROTO | {"distance": "cosine", "iterations": 0}),
    "start-euclidean": Row("The start, not trained, Euclidean", "tasks", EPISODIC | PROTO | {"iterations": 0}),
}
ROWS = published.ROWS | STEPS | PARTS | BASES | DEFAULT | START  # all that `l2g reproduce` knows
MINI, PLACE = ("mini-imagenet",), ("5w1s",)
LONG = ("proto", *BASE, "proto-time", "l2g-proto", *DEFAULT)
OURS, MIXED = (*BASE, "l2g-proto", *DEFAULT), (*BASE, "l2g-proto", "l2g-mix-0.5")
STUDIES = {
    "spread": Experiment("How much trained models differ", ("glyphs",), PLACE, OURS),
    "length": Experiment("To the end of training", MINI, ("5w1s", "5w5s"), LONG),
    "finetune": Experiment("From a pre-trained encoder", MINI, ("5w1s", "5w5s"), (*START, *OURS)),
    "inner-step": Experiment(
        "How strong the inner step is", MINI, PLACE, (*BASE, "l2g-proto", "l2g-proto-meta-sgd", *STEPS)
    ),
    "parts": Experiment(
        "What in L2G helps", MINI, PLACE, (*BASE, "l2g-proto", "maml-proto", "l2g-proto-first-order", *PARTS)
    ),
    "baselines": Experiment("Fair baselines", MINI, PLACE, (*BASE, "proto-time", *BASES, "l2g-proto")),
    "tasks": Experiment("Shots and ways", MINI, ("5w1s", "5w5s", "10w1s"), MIXED),
    "far-classes": Experiment("Test classes far from training", ("glyphs",), PLACE, MIXED),
}  # fmt: skip
EXPERIMENTS = published.EXPERIMENTS | STUDIES
