"""The command `l2g`, thin: flags are the fields of ``Config``, the work is in ``training`` and ``evaluation``."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2g_meta.allocator import keep_freed_memory
from l2g_meta.arguments import build_parser
from l2g_meta.bench.case import Case
from l2g_meta.checkpoint import read_info, write_text
from l2g_meta.config import SUPERVISED, Config
from l2g_meta.distributed import World, join, shutdown
from l2g_meta.errors import L2GError

if TYPE_CHECKING:
    from l2g_meta.evaluation import Evaluation
    from l2g_meta.wrapper import L2GWrapper


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0 done, 1 in part, 2 unusable input, 128 + n stopped by signal n."""
    args = build_parser().parse_args(argv)
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m l2g_meta` has it: --head mine:Head finds mine.py here
    keep_freed_memory()
    try:
        return COMMANDS[args.command](args)
    except (L2GError, ImportError) as error:
        print(f"l2g: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        what = str(error) or "interrupted"
        trains = args.command in ("train", "pretrain")
        resume = f"l2g {args.command} --resume RUN continues a run" if trains else "the same command continues"
        print(f"l2g: {what}; {resume} to the same bits", file=sys.stderr)
        return getattr(error, "code", 130)
    finally:
        shutdown()


def _train(args: argparse.Namespace) -> int:
    from l2g_meta.data.pairs import listed
    from l2g_meta.replay import replay
    from l2g_meta.training import train

    given = {f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}
    if args.replay is not None:
        if given.keys() - {"device", "root"} or args.out or args.resume or args.force:
            raise L2GError("need --replay RUN alone, or with --device and --root")
        replay(args.replay, **given)
        return 0
    config, out, resume = _what_to_train(args, given)
    train(config, out, resume=resume, force=args.force)
    if not World.here().main:
        return 0
    best = read_info(out / "best.safetensors")
    skipped = read_info(out / "last.safetensors").get("skipped")
    if skipped:
        print(f"{out}: {skipped} of {config.iterations} updates were left out, a number not being finite")
    print(
        f"{out}: {_describe(config)}: best validation {best['val_accuracy']:.2f} % ({listed(best['val_ways'])}-way "
        f"{listed(config.outer_shots)}-shot, BatchNorm {config.bn}) at update {best['iteration']}"
    )
    if config.method == SUPERVISED:
        for distance, result in _by_distance(out, config).items():
            print(f"{out}: {distance} to prototypes: {result}")
    return 0


def _by_distance(out: Path, config: Config) -> dict[str, Evaluation]:
    """Validation of a pre-trained run's best checkpoint by each distance of ``supervised.DISTANCES``."""
    from l2g_meta.build import build_data, build_device, load_run
    from l2g_meta.supervised import by_distance
    from l2g_meta.training import validate

    wrapper, _ = load_run(out, device=config.device)
    data, device = build_data(config, "validation"), build_device(config.device)
    return by_distance(wrapper.module, lambda model: validate(wrapper, config, data, device))


def _what_to_train(args: argparse.Namespace, given: dict[str, Any]) -> tuple[Config, Path, bool]:
    """Config, folder, and whether a run is there to go on with."""
    from l2g_meta.run import holds_run
    from l2g_meta.state import newest, numbers
    from l2g_meta.sweep import run_of

    named = isinstance(args.resume, str)
    if named and args.out is not None:
        raise L2GError("need --resume RUN, or --out RUN --resume; got two folders")
    if args.force and not args.resume:
        raise L2GError("--force belongs to --resume: it lets a run go on with another config")
    run = None if named else run_of(args)
    out = Path(args.resume) if run is None else run.out
    if run is not None and not (args.resume and holds_run(out)):
        return run.config, out, False
    stored = None
    try:
        stored = Config.load(out / "config.json")
    except L2GError as error:
        if not numbers(out) or _is_json(out / "config.json"):  # a value that somebody changed is not passed over
            raise
        print(f"l2g: {error}; its states have the config, too", file=sys.stderr)
    _, _, info = newest(out)
    config = replace(stored or Config.of(info["config"]), **given).resolved()
    _refuse_given(info, out, "continue it with l2g_meta.training.train(..., resume=True)")
    return config, out, True


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def _evaluate(args: argparse.Namespace) -> int:
    from l2g_meta.evaluation import paired_difference

    main_process = World.here().main
    if args.json is not None and main_process:
        _check_writable(args.json)
    trained, others = _load_runs(args, args.run), _load_runs(args, args.against or [])
    if others:
        both = [trained[0][1], others[0][1]]
        _check_alike(both, ("data", "image_size", "split_seed"), "to compare on the same episodes")
    result = _evaluate_runs(args, args.run, trained)
    values = {"checkpoints": list(map(str, args.run)), "configs": [_published(c) for _, c in trained], **asdict(result)}
    if others:
        other = _evaluate_runs(args, args.against, others)
        mean, half = paired_difference(result, other)
        if main_process:
            print(f"difference, paired over the same episodes: {mean:+.2f} ± {half:.2f} points (95% over episodes)")
        values |= {"difference_mean": mean, "difference_ci95_episodes": half, "against": list(map(str, args.against))}
        values |= {"against_configs": [_published(c) for _, c in others], "against_accuracy_mean": other.accuracy_mean}
        values |= {"against_ci95_runs": other.ci95_runs, "against_run_means": other.run_means}
    if args.json is not None and main_process:
        write_text(args.json, _json(values))
    return 0


def _bench(args: argparse.Namespace) -> int:
    from l2g_meta.bench.batching import batching
    from l2g_meta.bench.norms import norms
    from l2g_meta.bench.ranks import ranks
    from l2g_meta.bench.run import bench, scaling
    from l2g_meta.bench.storage import storage
    from l2g_meta.build import build_device

    if args.json is not None:
        _check_writable(args.json)
    case = Case(**{f.name: getattr(args, f.name) for f in fields(Case)})
    case = replace(case, device=str(build_device(case.device)))
    options: dict[str, Any] = {"repeats": args.repeats} | ({"variants": args.variants} if args.variants else {})
    if args.variants and (args.batching or args.norms or args.storage or args.ranks):
        raise L2GError("need --variants for the table or --scaling, got it with another measurement; leave it out")
    result: Any
    if args.batching:
        result = batching(case, repeats=args.repeats)
    elif args.norms:
        result = norms(case, repeats=args.repeats)
    elif args.ranks:
        result = ranks(case, repeats=args.repeats)
    elif args.storage:
        result = storage(case, repeats=args.repeats)
    elif args.scaling:
        result = scaling(case, **options)
    else:
        result = bench(case, memory=not args.no_memory, **options)
    if args.json is not None:
        write_text(args.json, json.dumps(_known(result), indent=1, allow_nan=False) + "\n")
    return 0


def _reproduce(args: argparse.Namespace) -> int:
    from l2g_meta.reproduce.cells import run_cells
    from l2g_meta.reproduce.figures import draw
    from l2g_meta.reproduce.jobs import describe, submit_cells, submitted
    from l2g_meta.reproduce.plan import plan
    from l2g_meta.reproduce.report import write_tables

    what = plan(
        args.experiment, args.scale, args.out, root=args.data_root, columns=args.columns, rows=args.rows,
        seeds=args.runs, device=args.device,
    )  # fmt: skip
    failed: list[str] = []
    try:
        if args.submit is not None:
            submit_cells(what, args.submit, options=_slurm_options(args), parallel=args.parallel)
        else:
            _slurm_options(args)
            with_job = submitted(what)  # theirs: a command that looks at them must not train on a login node
            here = [cell for cell in what.cells if cell not in with_job]
            failed = run_cells(what, cells=here, parallel=args.parallel or 1)
            failed += [describe(cell, job) for cell, job in with_job.items()]
    finally:  # interrupted, too: what there is
        if any(cell.done for cell in what.cells):
            print(write_tables(what).read_text(encoding="utf-8"))
    if args.experiment.startswith("figure") and all(cell.done for cell in what.cells):
        print(f"picture: {draw(what)}")
    for message in failed:
        print(f"l2g: {message}", file=sys.stderr)
    return 1 if failed else 0


def _submit(args: argparse.Namespace) -> int:
    from l2g_meta.sweep import submit_sweep

    submit_sweep(args.file, args.submit, options=_slurm_options(args), parallel=args.parallel)
    return 0


def _slurm_options(args: argparse.Namespace) -> dict[str, Any]:
    from l2g_meta.cluster import parsed

    if args.slurm and args.submit != "slurm":
        raise L2GError("--slurm belongs to jobs for Slurm; add --submit slurm, or leave it out")
    return parsed(args.slurm or [])


def _load_runs(args: argparse.Namespace, runs: Sequence[Path]) -> list[tuple[L2GWrapper, Config]]:
    """Trained runs that are seeds of one experiment."""
    from l2g_meta.build import load_run

    loaded = [load_run(run, checkpoint=args.checkpoint, device=args.device) for run in runs]
    seeds = [config.seed for _, config in loaded]
    if len(set(seeds)) < len(seeds):
        raise L2GError(f"need runs with different seeds for an interval over seeds, got seeds {seeds}; leave one out")
    same = {f.name for f in fields(Config)} - {"seed", "root", "device", "download", "tensorboard", "weights"}
    _check_alike([config for _, config in loaded], sorted(same), "to be seeds of one experiment")
    for run in runs:
        path = run / f"{args.checkpoint}.safetensors"
        _refuse_given(read_info(path), path, "evaluate it with l2g_meta.evaluation.evaluate")
    return loaded


def _evaluate_runs(
    args: argparse.Namespace, runs: Sequence[Path], loaded: Sequence[tuple[L2GWrapper, Config]]
) -> Evaluation:
    """The evaluation of one trained run, or of several as seeds, printed."""
    from l2g_meta.build import build_data, build_device
    from l2g_meta.evaluation import evaluate, over_models

    results = []
    for run, (wrapper, config) in zip(runs, loaded, strict=True):
        world, device = join(build_device(config.device))
        results.append(
            evaluate(
                wrapper.to(device),
                build_data(replace(config, root=args.root or config.root), args.split),
                ways=args.ways or config.outer_ways,
                shots=args.shots or config.outer_shots,
                queries=args.queries or config.queries,
                episodes=args.episodes,
                runs=args.runs,
                bn=args.bn,
                episode_seed=args.episode_seed,
                device=device,
                world=world,
            )
        )
        if world.main:
            print(f"{run}: {_describe(config)}: {results[-1]}")
    if len(results) == 1:
        return results[0]
    together = over_models(results)
    if world.main:
        print(together)
    return together


def _published(config: Config) -> dict[str, Any]:
    """The config without what belongs to one machine."""
    return {name: value for name, value in asdict(config).items() if name not in ("root", "device")}


def _check_alike(configs: Sequence[Config], names: Sequence[str], purpose: str) -> None:
    for config in configs[1:]:
        for name in names:
            a, b = getattr(configs[0], name), getattr(config, name)
            if a != b:
                raise L2GError(f"need runs with the same {name} {purpose}, got {a} and {b}; evaluate them one by one")


def _check_writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with open(path, "a", encoding="utf-8"):
            pass
        if new:
            path.unlink()
    except OSError as error:
        raise L2GError(f"need a file to write for --json, got {path}: {error.strerror}") from error


def _refuse_given(info: dict[str, Any], path: Path, remedy: str) -> None:
    given = info.get("given")
    if given:
        raise L2GError(
            f"need a run that its config describes, {path} was given its {' and '.join(given)} from Python; {remedy}"
        )


def _json(values: dict[str, Any]) -> str:
    """Readable JSON."""
    rounded = {**values, "accuracies": [round(a, 4) for a in values["accuracies"]]}
    return json.dumps(_known(rounded), indent=2, allow_nan=False) + "\n"


def _known(value: Any) -> Any:
    """The same with ``None`` for the numbers that JSON lacks, NaN and ±∞, at any depth."""
    if isinstance(value, dict):
        return {name: _known(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_known(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _describe(config: Config) -> str:
    """What a result belongs to, in a few words."""
    settings = ", ".join(f"{name} {value}" for name, value in config.head_options.items())
    head = f"{config.head} ({settings})" if settings else config.head
    return f"{config.method} {head}, {config.data} at {config.image_size} px"


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "pretrain": _train,
    "evaluate": _evaluate,
    "bench": _bench,
    "reproduce": _reproduce,
    "submit": _submit,
}
