"""A model's scores and loss on a task, checked."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from l2g_meta.errors import DataError, FitError
from l2g_meta.task import Task, TaskLike

LossFn = Callable[[Tensor, Tensor], Tensor]


def loss_of(model: nn.Module, task: TaskLike, loss_fn: LossFn, autocast: torch.dtype | None = None) -> Tensor:  # ()
    """Loss of a model on a task's queries; the loss itself runs outside of autocast.

    Raises:
        DataError: for a task that is none.
        FitError: if the scores are not (n_query, n_way), the loss is no number, or the model takes images, not tasks.
    """
    task = Task.of(task)
    return checked_loss(loss_fn(evaluated(model, task, autocast), task.query_y))


def loss_fn_of(model: nn.Module) -> LossFn:
    """A model's own ``loss_fn``, else cross-entropy."""
    return getattr(model, "loss_fn", None) or nn.functional.cross_entropy


def checked_loss(loss: Any) -> Tensor:  # ()
    """The loss itself.

    Raises:
        FitError: if it is no tensor of one number.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise FitError(f"need a loss as a tensor of one number, such as the mean over queries, got {got}")
    return loss


def evaluated(model: nn.Module, task: TaskLike, autocast: torch.dtype | None = None) -> Tensor:  # (n_query, n_way)
    """Scores of a task's queries, in the images' type.

    Raises:
        DataError: for a task that is none, or images of another type than the model takes.
        FitError: if the scores are not (n_query, n_way), or the model takes images, not tasks.
    """
    task = Task.of(task).check()
    # The cache would hand the inner step's casts of θ, or their graph, to later passes. A caller's own autocast stays.
    device = task.query_y.device.type
    with nullcontext() if autocast is None else torch.autocast(device, autocast, cache_enabled=False):
        try:
            scores = scores_of(model, task)
        except Exception as error:  # whatever a forward raises that is given another thing than it takes
            bare = not hasattr(model, "process_support_set")
            if bare and (_wants_a_tensor(error) or _takes_images(model, task.query_x)):
                raise FitError(
                    f"need a model whose forward takes a task, {type(model).__name__}'s forward takes images; wrap it: "
                    "MetricModel(encoder, PrototypicalHead())"
                ) from error
            dtype, own = task.query_x.dtype, next((p.dtype for p in model.parameters()), None)
            if isinstance(error, RuntimeError) and own not in (None, dtype):
                raise DataError(
                    f"need inputs of the type that {type(model).__name__} computes with, {own}, got {dtype}; convert "
                    "them, images of integers by x.float() / 255"
                ) from error
            raise
    expected = (len(task.query_y), task.n_way)
    if not isinstance(scores, Tensor) or scores.shape != expected:
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise FitError(
            f"need scores of shape (n_query, n_way) = {expected} from {type(model).__name__}.forward(task), got {got}"
        )
    return scores if autocast is None else scores.to(torch.promote_types(scores.dtype, task.query_x.dtype))


def scores_of(model: nn.Module, task: Task) -> Any:
    """``model(task)``; a classifier with easyfsl's two calls gets the supports by one, and the queries by the other."""
    process_support_set = getattr(model, "process_support_set", None)
    if process_support_set is None:
        return model(task)
    process_support_set(task.support_x, task.support_y)
    return model(task.query_x)


def _wants_a_tensor(error: Exception) -> bool:
    """Whether a forward failed because it was given a task in the place of a tensor."""
    if isinstance(error, AttributeError):
        return isinstance(error.obj, Task) and hasattr(Tensor, str(error.name))
    return isinstance(error, TypeError) and ("Task" in str(error) or "tuple" in str(error))  # x + 1, x[:, 0]


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
