"""The training loop."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from l2g_meta.algorithm import L2GWrapper
from l2g_meta.data.batches import Batches
from l2g_meta.data.identity import identity
from l2g_meta.data.pairs import Episodes, values
from l2g_meta.data.sources import task_source
from l2g_meta.errors import DataError, L2GError
from l2g_meta.evaluation.episodes import Evaluation, evaluate
from l2g_meta.evaluation.world import World, join
from l2g_meta.inner.clone import backend
from l2g_meta.training.averaging import averaged
from l2g_meta.training.build import (
    build_data,
    build_device,
    build_model,
    build_objective,
    build_optimizer,
    build_pairs,
    build_wrapper,
    set_precision,
)
from l2g_meta.training.checks import SUPERVISED
from l2g_meta.training.config import Config
from l2g_meta.training.curves import learning_curve
from l2g_meta.training.initial_weights import initialise
from l2g_meta.training.run_folder import Run
from l2g_meta.training.update import Updater, seed_update

VALIDATION_SEED = 1_000_003  # validation episodes are the same in every run


def train(
    config: Config,
    out: Path | str,
    *,
    data: Any = None,
    validation: Any = None,
    model: nn.Module | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = True,
    keep_weights: bool = False,
) -> L2GWrapper:
    """Trains as ``config`` says and leaves a run directory; the command ``l2g train`` is this function.

    Args:
        config: the run.
        out: its folder: ``config.json``, ``log.csv``, ``last.safetensors``, ``best.safetensors``, ``curve.png``, and
            ``resume-N.safetensors``, from which it goes on; ``average.safetensors``, if the config asks for it.
        data: training data instead of the config's: anything ``TaskPairs`` takes.
        validation: validation data instead of the config's; required with ``data``.
        model: a model instead of the config's encoder and head: any module ``L2GWrapper`` takes.
        resume: continue the run in ``out`` from its newest sound state, to the same bits.
        force: let a run go on with another config, or other data, than it had so far.
        progress: show a progress bar.
        keep_weights: also keep those of each validation, as ``after-N.safetensors``.

    Returns:
        The wrapper as last trained.

    Raises:
        L2GError: for a config that cannot be run or is not the resumed run's, an occupied folder, a full disk, or a
            number that is not finite.
        Stopped: on SIGINT, SIGTERM or SIGUSR1, when everything is saved (see ``l2g_meta.training.signals``).
    """
    config, out = config.resolved(), Path(out)
    world, device = join(build_device(config.device))
    set_precision(config.precision)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if data is not None and validation is None:
        raise L2GError("need validation data beside data: the best checkpoint is chosen on it; pass validation=...")
    if validation is None:
        validation = world.first_here(lambda: build_data(config, "validation"))  # which may convert it
    given = [name for name, value in (("data", data), ("model", model)) if value is not None]
    if data is None:
        data = world.first_here(lambda: build_data(config, "train"))
    pairs = build_pairs(config, data, device)
    image_shape = tuple(pairs[0][0].query_x.shape[1:])
    n_classes = pairs.n_classes if isinstance(pairs, Batches) else None
    wrapper = build_wrapper(config, model or build_model(config, image_shape, n_classes))
    if config.weights is not None and not resume and world.main:
        initialise(wrapper.module, config)
    wrapper = wrapper.to(device)
    optimizer = build_optimizer(config, wrapper)
    average = averaged(wrapper) if config.average else None
    update = Updater(config, build_objective(config), wrapper, optimizer, pairs, world)
    Episodes(validation, **validation_shape(config, validation))  # now, not after hours: the split is large enough
    known = {"train": identity(data), "validation": identity(validation)} if world.main else {}
    if config.method not in ("episodic", SUPERVISED):
        backend()  # learn2learn's import takes seconds, which are not the first update's

    folder = Run(
        out, config, world, wrapper, optimizer, average=average, given=given, data=known, keep_weights=keep_weights
    )
    with torch.random.fork_rng([device] if device.type == "cuda" else []), folder as run:
        info = run.resume(force=force) if resume else run.begin(image_shape, n_classes)

        def finish(row: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
            """Validates, logs and saves; what comes before is saved, so that a signal need not wait."""
            with run.saved(info):
                result = validate(wrapper, config, validation, device, world)
            row |= {"val_accuracy": result.accuracy_mean, "val_ci95": result.ci95_episodes}
            row |= {"val_loss": result.loss_mean}
            run.log(row)
            return run.save(info, result)

        run.open_log(info, progress=progress and world.main)
        if info["pending"] is not None:  # stopped before this validation was over
            info = finish(info["pending"], info)
        if not config.iterations:
            run.save(info, validate(wrapper, config, validation, device, world))
        for k in range(info["iteration"], config.iterations):
            wrapper.train()
            optimizer.param_groups[0]["lr"] = lr = learning_rate(config, k)
            began = time.perf_counter()
            seed_update(config, k, world)
            stats, finite, asked = update(k, run.signals.asked)  # Algorithm 1
            if world.size == 1:
                asked = run.signals.asked  # also what came meanwhile; several ranks notice that in the next update
            if finite and average is not None:
                average.update_parameters(wrapper)
            if not finite:
                run.not_finite(k, stats)
            row = {"iteration": k + 1, **stats._asdict(), "lr": lr, "skipped": int(not finite)}
            row |= {"tasks": config.tasks_of_an_update, "seconds": max(0.0, time.perf_counter() - began)}

            due = (k + 1) % config.eval_every == 0 or k + 1 == config.iterations
            info = {**info, "iteration": k + 1, "skipped": info["skipped"] + row["skipped"]}
            info["pending"] = row if due else None
            if not due:
                run.log(row)  # before saving: rows past a state are dropped on resuming, missing ones would be lost
            if due or asked or (k + 1) % config.save_every == 0:
                run.save_state(info)
            if asked:
                run.stop(asked, k + 1)
            if due:
                info = finish(row, info)
        if world.main:
            learning_curve([out], out / "curve.png")
    return wrapper


def learning_rate(config: Config, k: int) -> float:
    """The optimizer's step size at update k, as ``schedule`` says.

    Example:
        >>> config = Config(pairs=5, lr=1e-3, lr_halve_every=10_000).resolved()
        >>> learning_rate(config, 1999), learning_rate(config, 2000)
        (0.001, 0.0005)
        >>> [learning_rate(Config(lr=1.0, schedule="cosine", iterations=4).resolved(), k) for k in (0, 2)]
        [1.0, 0.5]
    """
    done = k / config.iterations
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * done)) / 2
    if config.schedule == "step":
        return config.lr * 0.1 ** ((done >= 3 / 5) + (done >= 4 / 5))
    return config.lr * 0.5 ** (k * config.episodes_per_update // config.lr_halve_every)


def validation_shape(config: Config, dataset: Any) -> dict[str, Any]:
    """Ways, shots and queries of validation episodes: as T_j's, on as many ways as the split has.

    Raises:
        DataError: if the split has fewer than two classes.
    """
    sizes = task_source(dataset).class_sizes()
    most = math.inf if sizes is None else len(sizes)
    ways = tuple(dict.fromkeys(min(n, most) for n in values(config.outer_ways)))
    if min(ways) < 2:
        raise DataError(f"need validation on at least 2 ways, got {min(ways)}; add validation classes or ways")
    return {"ways": ways[0] if len(ways) == 1 else ways, "shots": config.outer_shots, "queries": config.queries}


def validate(
    wrapper: L2GWrapper, config: Config, dataset: Any, device: torch.device, world: World | None = None
) -> Evaluation:
    """Accuracy under θ on validation episodes, the same in every run."""
    return evaluate(
        wrapper,
        dataset,
        **validation_shape(config, dataset),
        episodes=config.eval_episodes,
        bn=config.bn,  # type: ignore[arg-type]
        episode_seed=VALIDATION_SEED,
        device=device,
        world=world,
    )
