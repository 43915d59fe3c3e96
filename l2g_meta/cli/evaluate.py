"""``l2g evaluate``: a trained run, several as seeds, or an encoder without a run, on unseen classes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2g_meta.cli.flags import positive
from l2g_meta.cli.output import add_output, complain, emit
from l2g_meta.cli.runs import add_episodes, add_model, add_run, describe
from l2g_meta.data import DATASETS
from l2g_meta.data.images import SPLITS
from l2g_meta.errors import DataError, L2GError
from l2g_meta.evaluation.world import World, join
from l2g_meta.training.config import Config

if TYPE_CHECKING:
    from l2g_meta.classify.source import Source
    from l2g_meta.evaluation.episodes import Evaluation

INTERRUPTED = "nothing was written; the same command gives the same numbers"
DESCRIPTION = (
    "Evaluates one trained run, or several as trained seeds: only then an interval over runs is given. Beside the "
    "trained head it shows what frozen features are worth with heads that need no training. Without RUN it evaluates "
    "--model on --data."
)
EXAMPLES = """\
l2g evaluate runs/a                                  # 600 episodes of the test split, as trained
l2g evaluate runs/seed0 runs/seed1 runs/seed2        # trained seeds: an interval over them
l2g evaluate runs/l2g --against runs/episodic        # the paired difference
l2g evaluate runs/a --data folder --root DIR --split all
l2g evaluate --model torchvision:resnet18 --data mini-imagenet --root DIR --shots 5 --head logistic"""
HEADS = ("trained", "nearest", "simpleshot", "logistic")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("run", nargs="*", type=Path, metavar="RUN", help="run directory; several are seeds")
    parser.add_argument("--against", nargs="+", type=Path, metavar="RUN", help="also print the paired difference")
    data = parser.add_argument_group("data")
    data.add_argument("--data", choices=DATASETS, help="another data set than the run's")
    data.add_argument("--split-file", type=Path, metavar="FILE", help="--data folder: the images of the split, as "
                      "mini-ImageNet's or easyfsl's CSV, or easyfsl's JSON file")  # fmt: skip
    episodes = parser.add_argument_group("episodes")
    add_episodes(episodes, "per stream", splits=(*SPLITS, "all"))
    episodes.add_argument("--runs", type=positive, metavar="N", default=1, help="streams of episodes for each model "
                          "(default: 1)")  # fmt: skip
    model = parser.add_argument_group("model")
    model.add_argument("--head", choices=HEADS, help="one alone: the trained one, nearest prototypes, SimpleShot's "
                       "centring, or logistic regression (default: all)")  # fmt: skip
    add_run(model)
    add_model(model)
    add_output(parser, json="the result, in per cent,")


def run(args: argparse.Namespace) -> int:
    """Evaluates, and compares."""
    from l2g_meta.evaluation.episodes import paired_difference

    if args.run and (args.model or args.weights or args.image_size):
        raise L2GError("need RUN or --model, got both; leave one out")
    if not args.run and (args.data is None or args.against):
        raise L2GError("need RUN, or --data without one, to evaluate the model that comes with the package or --model")
    trained, others = _sources(args, args.run), _sources(args, args.against or [])
    if others:
        _check_same_episodes(args, trained[0].config, others[0].config)
    names, first = args.run or [args.model or "the embedded model"], args.head or HEADS[0]
    heads = _evaluate(args, names, trained)
    result = heads[first]
    values = {"checkpoints": list(map(str, names)), "configs": list(map(_published, trained)), **asdict(result)}
    values["accuracies"] = [round(a, 4) for a in result.accuracies]
    shown = ("accuracy_mean", "ci95_episodes", "ci95_runs")
    values["heads"] = {name: {key: getattr(found, key) for key in shown} for name, found in heads.items()}
    if others:
        other = _evaluate(args, args.against, others)[first]
        mean, half = paired_difference(result, other)
        if World.here().main:
            print(f"difference, paired over the same episodes: {mean:+.2f} ± {half:.2f} points (95% over episodes)")
        values |= {"difference_mean": mean, "difference_ci95_episodes": half, "against": list(map(str, args.against))}
        values |= {"against_configs": list(map(_published, others)), "against_accuracy_mean": other.accuracy_mean}
        values |= {"against_ci95_runs": other.ci95_runs, "against_run_means": other.run_means}
    if World.here().main:
        emit(args, values)
    return 0


def _sources(args: argparse.Namespace, runs: Sequence[Path]) -> list[Source]:
    """Trained runs that are seeds of one experiment; without RUN, ``--model``."""
    from l2g_meta.classify.source import open_run, open_source

    if not args.run:
        options = {"trust": args.trust, "weights": args.weights, "image_size": args.image_size}
        return [open_source(args.model, args.device or "auto", **options)] if runs is args.run else []
    loaded = [open_run(run, args.device, checkpoint=args.checkpoint, trust=args.trust) for run in runs]
    configs = [source.config for source in loaded]
    seeds = [config.seed for config in configs]
    if len(set(seeds)) < len(seeds):
        raise L2GError(f"need runs with different seeds for an interval over seeds, got seeds {seeds}; leave one out")
    for first, config in zip(configs, configs[1:], strict=False):
        if difference := first.differences(replace(config, seed=first.seed, weights=first.weights)):
            raise L2GError(f"need runs that differ in their seed alone, got {difference}; evaluate them one by one")
    return loaded


def _evaluate(args: argparse.Namespace, names: Sequence[Any], sources: Sequence[Source]) -> dict[str, Evaluation]:
    """The evaluation of one model, or of several trained seeds, by each head, printed."""
    from l2g_meta.evaluation import frozen
    from l2g_meta.evaluation.episodes import over_models
    from l2g_meta.training.build import build_device

    results: list[dict[str, Evaluation]] = []
    heads, first = HEADS if args.head is None else (args.head,), args.head or HEADS[0]
    for name, source in zip(names, sources, strict=True):
        world, device = join(build_device(source.config.device if args.run else args.device or "auto"))
        data, base = _data(args, source, args.split), None
        if "simpleshot" in heads and args.split_file is None and args.split not in ("train", "all"):
            with suppress(DataError):  # without it SimpleShot takes the mean of an episode's supports
                base = _data(args, source, "train")
        asked = {name: getattr(args, name) for name in ("episodes", "runs", "bn", "episode_seed", "split")}
        asked |= _sizes(args, source.config) | {"device": device, "world": world}
        found = frozen.evaluate_heads(source.model.to(device), data, heads=heads, base=base, **asked)
        if first not in found:
            raise L2GError(f"need features that hold for all tasks for --head {first}, {name} has none; leave it out")
        results.append(found)
        if world.main:
            if note := source.seen(args.data or source.config.data, data.class_names):
                complain(f"note: {note}")
            print(f"{name}: {describe(source.config) if args.run else first}: {found[first]}")
            known = frozen.HEADS if args.head is None else {}
            one = args.episodes * args.runs == 1  # which has no interval
            said = [
                f"{known[k]} {e.accuracy_mean:.2f}" + ("" if one else f" ± {e.ci95_episodes:.2f}")
                for k, e in found.items()
                if k in known
            ]
            if said:
                print(f"  frozen features, no training: {', '.join(said)} %")
    if len(results) == 1:
        return results[0]
    together = {head: over_models([found[head] for found in results]) for head in results[0]}
    if World.here().main:
        print(together[first])
    return together


def _data(args: argparse.Namespace, source: Source, split: str) -> Any:
    """The split that is asked for: of the run's own data set, or as the model takes another's."""
    from l2g_meta.classify.prepared_data import open_data
    from l2g_meta.training.build import build_data

    config, name = source.config, args.data or source.config.data
    if args.split_file is not None and name != "folder":
        raise L2GError(f"--split-file belongs to --data folder, got {name}; leave it out")
    root = args.root or (config.root if args.data is None else None)
    if args.data is None and args.split_file is None and split in SPLITS:
        return build_data(replace(config, root=root), split)
    preparation: Any = source.preparation  # which a folder and a name have
    return open_data(name, split, preparation, root=root, split_seed=config.split_seed, split_file=args.split_file)


def _sizes(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Ways, shots and queries of the episodes, as asked for, as in training, or the usual ones."""
    own = (config.outer_ways, config.outer_shots, config.queries) if args.run else (5, 1, 15)
    return {name: getattr(args, name) or size for name, size in zip(("ways", "shots", "queries"), own, strict=True)}


def _check_same_episodes(args: argparse.Namespace, *both: Config) -> None:
    names = () if args.data else ("data", "image_size", "split_seed")
    first, second = ({name: getattr(config, name) for name in names} | _sizes(args, config) for config in both)
    for name, value in first.items():
        if value != second[name]:
            remedy = f"choose by --{name}" if hasattr(args, name) else "evaluate them one by one"
            raise L2GError(
                f"need the same {name} to compare on the same episodes, the runs were trained with {value} and "
                f"{second[name]}; {remedy}"
            )


def _published(source: Source) -> dict[str, Any]:
    """The config without what belongs to one machine."""
    return {name: value for name, value in asdict(source.config).items() if name not in ("root", "device")}
