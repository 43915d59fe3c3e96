"""The training loop."""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2g_meta.build import (
    arrange,
    build_data,
    build_device,
    build_model,
    build_objective,
    build_pairs,
    build_wrapper,
    positions_of_update,
    set_precision,
    tasks_of_update,
)
from l2g_meta.captured import StaticUpdate
from l2g_meta.checkpoint import load_training, save_tensors, save_training
from l2g_meta.clone import backend
from l2g_meta.config import Config
from l2g_meta.data.pairs import Episodes, task_source, values
from l2g_meta.errors import CheckpointError, DataError, L2GError
from l2g_meta.evaluation import Evaluation, evaluate
from l2g_meta.logs import RunLog, require_tensorboard
from l2g_meta.objectives import meta_gradient
from l2g_meta.plots import learning_curve
from l2g_meta.wrapper import L2GWrapper

VALIDATION_SEED = 1_000_003  # validation episodes are the same in every run


def train(
    config: Config,
    out: Path | str,
    *,
    data: Any = None,
    validation: Any = None,
    model: nn.Module | None = None,
    resume: bool = False,
    progress: bool = True,
) -> L2GWrapper:
    """Trains as ``config`` says and leaves a run directory; the command ``l2g train`` is this function.

    Args:
        config: the run.
        out: its folder: ``config.json``, ``log.csv``, ``last.safetensors``, ``best.safetensors``, ``curve.png``.
        data: training data instead of the config's: anything ``TaskPairs`` takes.
        validation: validation data instead of the config's; required with ``data``.
        model: a model instead of the config's encoder and head: any module ``L2GWrapper`` takes.
        resume: continue the run in ``out`` from its last checkpoint.
        progress: show a progress bar.

    Returns:
        The wrapper as last trained.

    Raises:
        L2GError: for a config that cannot be run, an occupied folder, or a loss that is not finite.
    """
    config, out = config.resolved(), Path(out)
    device = build_device(config.device)
    set_precision(config.precision)
    if data is not None and validation is None:
        raise L2GError("need validation data beside data: the best checkpoint is chosen on it; pass validation=...")
    if validation is None:
        validation = build_data(config, "validation")
    pairs = build_pairs(config, build_data(config, "train") if data is None else data, device)
    image_shape = tuple(pairs[0][0].support_x.shape[1:])
    objective = build_objective(config)
    wrapper = build_wrapper(config, model or build_model(config, image_shape)).to(device)
    graph = config.cuda_graph and device.type == "cuda"
    lr = torch.tensor(config.lr, device=device) if graph else config.lr
    optimizer = torch.optim.Adam(wrapper.parameters(), lr=lr, capturable=graph)
    update = None
    if config.cuda_graph:
        positions = partial(positions_of_update, config)
        update = StaticUpdate(objective, wrapper, optimizer, pairs, positions, partial(arrange, config))
    Episodes(validation, **validation_shape(config, validation))  # now, not after hours: the split is large enough
    if config.tensorboard:
        require_tensorboard()
    if config.method != "episodic":
        backend()  # learn2learn's import takes seconds, which are not the first update's
    given = [name for name, value in (("data", data), ("model", model)) if value is not None]
    if resume:
        info = load_training(out, wrapper, optimizer)
    else:
        _new_folder(out)
        # What it takes to build the model again, and what of the run is not in its config.
        info = {"iteration": 0, "best": -1.0, "image_shape": image_shape, "given": given}
        save_training(out, wrapper, optimizer, info)
        config.save(out / "config.json")  # last: a folder that has it can be resumed
    if update is not None:
        wrapper.train()
        update.capture()

    with RunLog(out, config, start=info["iteration"], progress=progress) as log:
        for k in range(info["iteration"], config.iterations):
            wrapper.train()
            _set_lr(optimizer, learning_rate(config, k))
            began = time.perf_counter()
            if update is not None:
                stats = update(k)
                _check_finite(stats.loss, wrapper, k)
            else:
                optimizer.zero_grad()
                batch = tasks_of_update(config, pairs, k)
                stats = meta_gradient(objective, wrapper, batch)  # eq. 3 and 4
                _check_finite(stats.loss, wrapper, k)
                if config.clip_norm is not None:
                    nn.utils.clip_grad_norm_(wrapper.parameters(), config.clip_norm)
                optimizer.step()  # eq. 5
            row = {"iteration": k + 1, **stats._asdict(), "lr": learning_rate(config, k)}
            row |= {"tasks": config.tasks_of_an_update, "seconds": time.perf_counter() - began}

            due = (k + 1) % config.eval_every == 0 or k + 1 == config.iterations
            if due:
                result = validate(wrapper, config, validation, device)
                row |= {"val_accuracy": result.accuracy_mean, "val_ci95": result.ci95_episodes}
                row |= {"val_loss": result.loss_mean}
            log.write(row)  # before saving: rows past the checkpoint are dropped on resuming, missing ones are lost
            if due:
                info = _save(out, wrapper, optimizer, info, k + 1, result)
    learning_curve([out], out / "curve.png")
    return wrapper


def learning_rate(config: Config, k: int) -> float:
    """Adam's step size at update k: halved every ``lr_halve_every`` episodes.

    Example:
        >>> config = Config(pairs=5, lr=1e-3, lr_halve_every=10_000).resolved()
        >>> learning_rate(config, 1999), learning_rate(config, 2000)
        (0.001, 0.0005)
    """
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
        raise DataError(
            f"need validation on at least 2 ways to choose a checkpoint by, got {min(ways)}; add validation classes or "
            "ways"
        )
    return {"ways": ways[0] if len(ways) == 1 else ways, "shots": config.outer_shots, "queries": config.queries}


def validate(wrapper: L2GWrapper, config: Config, dataset: Any, device: torch.device) -> Evaluation:
    """Accuracy under θ on validation episodes, the same in every run."""
    return evaluate(
        wrapper,
        dataset,
        **validation_shape(config, dataset),
        episodes=config.eval_episodes,
        bn=config.bn,  # type: ignore[arg-type]
        episode_seed=VALIDATION_SEED,
        device=device,
    )


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    group = optimizer.param_groups[0]
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)  # in place: a CUDA graph reads this tensor
    else:
        group["lr"] = lr


def _check_finite(loss: float, wrapper: L2GWrapper, k: int) -> None:
    gradients = [p.grad for p in wrapper.parameters() if p.grad is not None]
    if not math.isfinite(loss) or not all(torch.stack([g.isfinite().all() for g in gradients]).tolist()):
        raise L2GError(
            f"the loss of update {k} is {loss}, or its gradient is not finite; lower --inner-lr or --lr, or use "
            "--dims mean; the last checkpoint is from before"
        )


def _save(
    out: Path,
    wrapper: L2GWrapper,
    optimizer: torch.optim.Optimizer,
    info: dict[str, Any],
    iteration: int,
    val: Evaluation,
) -> dict[str, Any]:
    """The last checkpoint, and the best on validation so far; returns the header of both."""
    improved = val.accuracy_mean > info["best"]
    info = {**info, "iteration": iteration, "val_accuracy": val.accuracy_mean, "val_ways": val.ways}
    info["best"] = max(info["best"], val.accuracy_mean)
    if improved:
        save_tensors(out / "best.safetensors", wrapper.state_dict(), info)
    save_training(out, wrapper, optimizer, info)
    return info


def _new_folder(out: Path) -> None:
    if (out / "config.json").exists():
        raise CheckpointError(f"{out} already holds a run; continue it with --resume {out}, or choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"need a folder for the run, cannot make {out}: {error.strerror}") from error
