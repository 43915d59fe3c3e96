"""Does L2G learn what carries over? Loss on unseen classes against loss on training classes, along a training.

    python examples/along_the_way.py RUN [RUN ...] [--episodes 600] [--pairs 100] [--json FILE] [--figure FILE]
    python examples/along_the_way.py --smoke

Runs are of `train(..., keep_weights=True)`, or of `l2g reproduce length` and `spread`. A run's name up to "-seed" is
its row. Of each state that a run kept: loss and accuracy under θ on tasks of training classes and of test classes, and
how well gradients of disjoint tasks agree on both. The last table compares rows at equal loss on training classes. A
method that generalises better has the lower loss on test classes there. Numbers are means over the runs of a row.
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from l2g_meta.data.pairs import TaskPairs
from l2g_meta.evaluation.alignment import alignment
from l2g_meta.evaluation.episodes import evaluate
from l2g_meta.training.build import build_data, load_run
from l2g_meta.training.config import Config
from l2g_meta.training.curves import save, subplots
from l2g_meta.training.loop import train

SEED = 2_000_003  # of episodes and pairs: those of training and validation have others
SPLITS = {"train": "training classes", "test": "test classes"}


def measure(run: Path, updates: int, episodes: int, pairs: int) -> dict[str, Any]:
    """What a run's state after so many updates is worth on both splits."""
    wrapper, config = load_run(run, checkpoint=f"after-{updates}", device="cpu")
    found: dict[str, Any] = {"row": run.name.partition("-seed")[0], "run": run.name, "updates": updates}
    shape = {"ways": config.outer_ways, "shots": config.outer_shots, "queries": config.queries}
    for split in SPLITS:
        data = build_data(config, split)
        result = evaluate(wrapper, data, **shape, episodes=episodes, bn=config.bn, episode_seed=SEED, device="cpu")
        agreement = alignment(wrapper, TaskPairs(data, **shape, seed=SEED), pairs)
        found[split] = {
            "loss": result.loss_mean, "accuracy": result.accuracy_mean, "ci95": result.ci95_episodes,
            "cosine": agreement.cosine, "slope": agreement.slope,
        }  # fmt: skip
    return found


def curves(points: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Of each row, by number of updates: losses on training and on test classes, (n, 2), means over its runs."""
    rows: dict[str, dict[int, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    for p in points:
        rows[p["row"]][p["updates"]].append([p["train"]["loss"], p["test"]["loss"]])
    return {row: np.array([np.mean(of[k], 0) for k in sorted(of)]) for row, of in rows.items()}


def at_equal_training_loss(losses: dict[str, np.ndarray], n: int = 5) -> list[list[float]]:
    """Loss on test classes of each row where its loss on training classes is the same, between all rows' ranges."""
    low = max(of[:, 0].min() for of in losses.values())
    high = min(of[:, 0].max() for of in losses.values())
    places = np.linspace(high, low, n) if high > low else np.array([])
    found = []
    for place in places:
        tests = []
        for of in losses.values():
            order = of[:, 0].argsort()
            tests.append(float(np.interp(place, of[order, 0], of[order, 1])))
        found.append([float(place), *tests])
    return found


def draw(losses: dict[str, np.ndarray], path: Path) -> None:
    """Loss on test classes against loss on training classes, a line a row."""
    figure, axis = subplots(1, 1)
    for row, of in losses.items():
        axis.plot(of[:, 0], of[:, 1], marker="o", markersize=3, label=row)
    axis.set(xlabel="loss on training classes (training goes left)", ylabel="loss on test classes")
    axis.invert_xaxis()
    axis.legend()
    save(figure, path)


def main() -> None:
    """Prints a line for each state, then rows at equal loss on training classes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="folders of runs that kept their weights")
    parser.add_argument("--episodes", type=int, default=600, help="of each split (default: 600)")
    parser.add_argument("--pairs", type=int, default=100, help="of tasks, for the gradients (default: 100)")
    parser.add_argument("--json", type=Path, help="where the numbers go")
    parser.add_argument("--figure", type=Path, help="where the picture goes")
    parser.add_argument("--smoke", action="store_true", help="runs of two updates, to see that everything works")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs, episodes, pairs = args.runs, args.episodes, args.pairs
    if args.smoke:
        runs, episodes, pairs = [Path(f"runs/along-smoke/{method}-seed0") for method in ("episodic", "l2g")], 4, 2
        for run in runs:
            method = run.name.partition("-")[0]
            config = Config(
                method=method, pairs=1, queries=2, iterations=2, eval_every=1, eval_episodes=4,
                backbone_options=("channels=8",), device="cpu",
            )  # fmt: skip
            train(config, run, resume=run.exists(), progress=False, keep_weights=True)
    if not runs:
        parser.error("need one or more RUN, or --smoke")
    points = []
    for run in runs:
        states = [
            int(n)
            for path in run.glob("after-*")
            if (n := re.sub(r"after-(\d+)\.safetensors", r"\1", path.name)).isdecimal()
        ]
        if not states:
            parser.error(f"need a run that kept its weights, got {run} without after-N.safetensors")
        for k in sorted(states):
            points.append(p := measure(run, k, episodes, pairs))
            parts = [
                "{}: loss {loss:.3f}, {accuracy:.2f} ± {ci95:.2f} %, cosine {cosine:.4f}".format(words, **p[split])
                for split, words in SPLITS.items()
            ]
            print(f"{run.name} after {k}: {'; '.join(parts)}", flush=True)
    losses = curves(points)
    equal = at_equal_training_loss(losses)
    print("\nloss on training classes | loss on test classes: " + " | ".join(losses))
    for place, *tests in equal:
        print(f"{place:.3f} | " + " | ".join(f"{test:.3f}" for test in tests))
    if args.json:
        args.json.write_text(
            json.dumps({"episodes": episodes, "pairs": pairs, "points": points, "equal": equal}, indent=1)
        )
    if args.figure:
        draw(losses, args.figure)


if __name__ == "__main__":
    main()
