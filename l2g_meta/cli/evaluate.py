"""``l2g evaluate``: one trained run, or several as seeds, on unseen classes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2g_meta.cli.flags import positive
from l2g_meta.cli.output import add_output, emit
from l2g_meta.cli.runs import add_episodes, add_run, describe
from l2g_meta.errors import L2GError
from l2g_meta.evaluation.world import World, join
from l2g_meta.files.tensors import read_info, refuse_given
from l2g_meta.training.config import Config

if TYPE_CHECKING:
    from l2g_meta.algorithm import L2GWrapper
    from l2g_meta.evaluation.episodes import Evaluation

INTERRUPTED = "nothing was written; the same command gives the same numbers"
DESCRIPTION = "Evaluates one trained run, or several as trained seeds: only then an interval over runs is given."
EXAMPLES = """\
l2g evaluate runs/a                                  # 600 episodes of the test split, as trained
l2g evaluate runs/a --ways 5 --shots 5 --runs 5 --json a.json
l2g evaluate runs/seed0 runs/seed1 runs/seed2        # trained seeds: an interval over them
l2g evaluate runs/l2g --against runs/episodic        # the paired difference"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("run", nargs="+", type=Path, metavar="RUN", help="run directory; several are seeds")
    parser.add_argument("--against", nargs="+", type=Path, metavar="RUN", help="also print the paired difference")
    episodes = parser.add_argument_group("episodes")
    add_episodes(episodes, "per stream")
    episodes.add_argument("--runs", type=positive, metavar="N", default=1, help="streams of episodes for each model "
                          "(default: 1)")  # fmt: skip
    add_run(parser.add_argument_group("model"))
    add_output(parser, json="the result, in per cent,")


def run(args: argparse.Namespace) -> int:
    """Evaluates, and compares."""
    from l2g_meta.evaluation.episodes import paired_difference

    main_process = World.here().main
    trained, others = _load_runs(args, args.run), _load_runs(args, args.against or [])
    if others:
        _check_same_episodes(args, trained[0][1], others[0][1])
    result = _evaluate_runs(args, args.run, trained)
    values = {"checkpoints": list(map(str, args.run)), "configs": [_published(c) for _, c in trained], **asdict(result)}
    values["accuracies"] = [round(a, 4) for a in result.accuracies]
    if others:
        other = _evaluate_runs(args, args.against, others)
        mean, half = paired_difference(result, other)
        if main_process:
            print(f"difference, paired over the same episodes: {mean:+.2f} ± {half:.2f} points (95% over episodes)")
        values |= {"difference_mean": mean, "difference_ci95_episodes": half, "against": list(map(str, args.against))}
        values |= {"against_configs": [_published(c) for _, c in others], "against_accuracy_mean": other.accuracy_mean}
        values |= {"against_ci95_runs": other.ci95_runs, "against_run_means": other.run_means}
    if main_process:
        emit(args, values)
    return 0


def _load_runs(args: argparse.Namespace, runs: Sequence[Path]) -> list[tuple[L2GWrapper, Config]]:
    """Trained runs that are seeds of one experiment."""
    from l2g_meta.training.build import load_run

    loaded = [load_run(run, checkpoint=args.checkpoint, device=args.device, trust=args.trust) for run in runs]
    seeds = [config.seed for _, config in loaded]
    if len(set(seeds)) < len(seeds):
        raise L2GError(f"need runs with different seeds for an interval over seeds, got seeds {seeds}; leave one out")
    for _, config in loaded[1:]:
        first = loaded[0][1]
        difference = first.differences(replace(config, seed=first.seed, weights=first.weights))
        if difference:
            raise L2GError(f"need runs that differ in their seed alone, got {difference}; evaluate them one by one")
    for run in runs:
        path = run / f"{args.checkpoint}.safetensors"
        refuse_given(read_info(path), path, "evaluate it with l2g_meta.evaluation.episodes.evaluate")
    return loaded


def _evaluate_runs(
    args: argparse.Namespace, runs: Sequence[Path], loaded: Sequence[tuple[L2GWrapper, Config]]
) -> Evaluation:
    """The evaluation of one trained run, or of several as seeds, printed."""
    from l2g_meta.evaluation.episodes import evaluate, over_models
    from l2g_meta.training.build import build_data, build_device

    results = []
    asked = {name: getattr(args, name) for name in ("episodes", "runs", "bn", "episode_seed")}
    for run, (wrapper, config) in zip(runs, loaded, strict=True):
        world, device = join(build_device(config.device))
        data = build_data(replace(config, root=args.root or config.root), args.split)
        shape = _sizes(args, config)
        results.append(evaluate(wrapper.to(device), data, **shape, **asked, device=device, world=world))
        if world.main:
            print(f"{run}: {describe(config)}: {results[-1]}")
    if len(results) == 1:
        return results[0]
    together = over_models(results)
    if world.main:
        print(together)
    return together


def _sizes(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Ways, shots and queries of the episodes, as asked for or as in training."""
    own = {"ways": config.outer_ways, "shots": config.outer_shots, "queries": config.queries}
    return {name: getattr(args, name) or size for name, size in own.items()}


def _check_same_episodes(args: argparse.Namespace, *both: Config) -> None:
    first, second = (
        {name: getattr(config, name) for name in ("data", "image_size", "split_seed")} | _sizes(args, config)
        for config in both
    )
    for name, value in first.items():
        if value != second[name]:
            remedy = f"choose by --{name}" if hasattr(args, name) else "evaluate them one by one"
            raise L2GError(
                f"need the same {name} to compare on the same episodes, the runs were trained with {value} and "
                f"{second[name]}; {remedy}"
            )


def _published(config: Config) -> dict[str, Any]:
    """The config without what belongs to one machine."""
    return {name: value for name, value in asdict(config).items() if name not in ("root", "device")}
