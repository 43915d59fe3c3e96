"""A model's scores and loss on a task, checked."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from l2g_meta.errors import FitError
from l2g_meta.task import Task, TaskLike

LossFn = Callable[[Tensor, Tensor], Tensor]


def loss_of(model: nn.Module, task: TaskLike, loss_fn: LossFn, autocast: torch.dtype | None = None) -> Tensor:  # ()
    """Loss of a model on a task's queries; the loss itself runs outside of autocast.

    Raises:
        DataError: for a task that is none.
        FitError: if the scores are not (n_query, n_way), or the model takes images, not tasks.
    """
    task = Task.of(task)
    return loss_fn(evaluated(model, task, autocast), task.query_y)


def evaluated(model: nn.Module, task: TaskLike, autocast: torch.dtype | None = None) -> Tensor:  # (n_query, n_way)
    """Scores of a task's queries, in the images' type.

    Raises:
        DataError: for a task that is none.
        FitError: if the scores are not (n_query, n_way), or the model takes images, not tasks.
    """
    task = Task.of(task).check()
    # The cache would hand the inner step's casts of θ, or their graph, to later passes. A caller's own autocast stays.
    device = task.query_y.device.type
    with nullcontext() if autocast is None else torch.autocast(device, autocast, cache_enabled=False):
        try:
            scores = scores_of(model, task)
        except (TypeError, AttributeError) as error:
            if _takes_images(model, task.query_x):
                raise FitError(
                    f"need a model whose forward takes a task, {type(model).__name__}'s forward takes images; wrap it: "
                    "MetricModel(encoder, PrototypicalHead())"
                ) from error
            raise
    expected = (len(task.query_y), task.n_way)
    if not isinstance(scores, Tensor) or scores.shape != expected:
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise FitError(
            f"need scores of shape (n_query, n_way) = {expected} from {type(model).__name__}.forward(task), got {got}"
        )
    return scores if autocast is None else scores.to(task.query_x.dtype)


def scores_of(model: nn.Module, task: Task) -> Any:
    """``model(task)``; a classifier with easyfsl's two calls gets the supports by one, and the queries by the other."""
    process_support_set = getattr(model, "process_support_set", None)
    if process_support_set is None:
        return model(task)
    process_support_set(task.support_x, task.support_y)
    return model(task.query_x)


def _takes_images(model: nn.Module, x: Tensor) -> bool:
    """Whether a model that failed on a task takes its images, in evaluation mode and without gradients."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        with torch.no_grad():
            return isinstance(model.eval()(x), Tensor)
    except Exception:  # whatever a user's network raises: the first error is the one to show
        return False
    finally:
        for m, mode in modes:
            m.training = mode
