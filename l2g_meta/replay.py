"""Runs an update that found a number that is not finite again, pair by pair, and shows where it comes from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2g_meta.build import (
    build_data,
    build_device,
    build_model,
    build_objective,
    build_optimizer,
    build_pairs,
    build_wrapper,
    n_classes_of,
    refuse_modules,
    set_precision,
)
from l2g_meta.checkpoint import image_shape_of
from l2g_meta.config import Config
from l2g_meta.errors import CheckpointError
from l2g_meta.objectives import accumulate
from l2g_meta.state import load, restore
from l2g_meta.update_tasks import calls_of_update, tasks_of_calls


def replay(
    run: Path,
    *,
    data: Any = None,
    model: nn.Module | None = None,
    device: str | None = None,
    root: str | None = None,
    trust: bool = False,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """The last failed update of a run again, from the state before it; nothing of the run is changed.

    Args:
        run: its folder, with ``failed-K.safetensors``.
        data: training data, if the run was given it from Python.
        model: the model, if the run was given it.
        device: another device than the run's.
        root: where the run's data is, if it has moved.
        trust: import the module that the run may name as its head or backbone, which runs it.
        say: is given each line of the report.

    Returns:
        For each call of the objective ``tasks`` (positions in the stream and members), ``loss``, ``inner_loss``,
        ``alignment``, ``gradient`` (its norm) and ``first``: the first module with an output that is not finite.

    Raises:
        CheckpointError: if no update of the run has failed, its state is damaged, data or model are missing, or the
            run names a module and is not trusted.
    """
    found = sorted(run.glob("failed-*.safetensors"), key=lambda path: int(path.stem.split("-")[1]))
    if not found:
        raise CheckpointError(f"need failed-K.safetensors in {run}, which a run leaves when it stops at update K")
    tensors, info = load(found[-1])
    missing = [name for name in info["given"] if {"data": data, "model": model}[name] is None]
    if missing:
        raise CheckpointError(
            f"{run} was given its {' and '.join(missing)} from Python; call l2g_meta.replay.replay(run, "
            f"{', '.join(f'{name}=...' for name in missing)})"
        )
    config = Config.of(info["config"]).resolved()
    if model is None and not trust:
        refuse_modules(config, found[-1])
    config = replace(config, device=device or config.device, root=root or config.root).resolved()
    set_precision(config.precision)
    where, k = build_device(config.device), info["iteration"]
    wrapper = build_wrapper(config, model or build_model(config, image_shape_of(info, found[-1]), n_classes_of(info)))
    wrapper = wrapper.to(where).train()
    restore(tensors, wrapper, build_optimizer(config, wrapper, where), found[-1])
    data = build_data(config, "train") if data is None else data
    pairs, objective = build_pairs(config, data, where), build_objective(config)

    say(f"{found[-1]}: update {k}, each call of the objective on its own")
    say(f"{'tasks':22}{'loss':>12}{'inner loss':>12}{'alignment':>12}{'|gradient|':>12}  first module not finite")
    rows = []
    for call in calls_of_update(config, k):
        wrapper.zero_grad()
        with _first_not_finite(wrapper) as first:
            loss, inner, alignment = accumulate(objective, wrapper, tasks_of_calls(config, pairs, [call])).tolist()
        gradients = [p.grad.flatten() for p in wrapper.parameters() if p.grad is not None]
        norm = torch.cat(gradients).norm().item() if gradients else 0.0
        tasks = ", ".join(f"T_{'ij'[member]} {position}" for position, member in call)
        rows.append(
            {"tasks": call, "loss": loss, "inner_loss": inner, "alignment": alignment, "gradient": norm}
            | {"first": first[0] if first else None}
        )
        say(f"{tasks:22}{loss:12.4g}{inner:12.4g}{alignment:12.4g}{norm:12.4g}  {first[0] if first else ''}")
    broken = [name for name, p in wrapper.named_parameters() if not p.isfinite().all()]
    if not broken and all(torch.tensor([row["loss"], row["gradient"]]).isfinite().all() for row in rows):
        say("all finite this time: the numbers of this machine or device are others, or the data or model have changed")
    if broken:
        say(f"weights that are not finite before the update: {', '.join(broken)}")
    return rows


@contextlib.contextmanager
def _first_not_finite(wrapper: nn.Module) -> Iterator[list[str]]:
    """Names of modules whose outputs are not finite, in the order in which they ran."""
    names: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                names.append(f"{name} ({type(module).__name__})")

        return hook

    handles = [m.register_forward_hook(watch(name)) for name, m in wrapper.named_modules() if name]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()
