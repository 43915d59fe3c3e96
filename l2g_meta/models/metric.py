"""An encoder and a metric head as one model: task to scores."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from l2g_meta.errors import FitError
from l2g_meta.models.batchnorm_policy import batchnorm_policy
from l2g_meta.task import Task, TaskLike


class MetricModel(nn.Module):
    """A metric-based few-shot classifier, ``model(task) -> scores``.

    Supports and queries go through the encoder in one pass, so that BatchNorm sees them together.

    Args:
        encoder: images (n, C, H, W) to features (n, ...).
        head: ``forward(support, support_y, query, n_way) -> scores``, and ``loss_fn(scores, query_y)``.
        image_shape: (C, H, W) of the images; given it, a dry run checks at construction that the head takes what the
            encoder gives, touching no buffer and no generator. Without it the first task is checked.

    Shapes:
        task -> scores (n_query, n_way), higher is closer.

    Raises:
        FitError: if encoder and head do not fit, or are no modules.

    Example:
        >>> from l2g_meta import Conv4, PrototypicalHead
        >>> model = MetricModel(Conv4(1), PrototypicalHead(), image_shape=(1, 28, 28))
        >>> x, y = torch.randn(5, 1, 28, 28), torch.arange(5)
        >>> model(Task(x, y, x, y, 5)).shape
        torch.Size([5, 5])
    """

    def __init__(self, encoder: nn.Module, head: nn.Module, *, image_shape: tuple[int, ...] | None = None):
        super().__init__()
        for part, value in (("encoder", encoder), ("head", head)):
            if not isinstance(value, nn.Module):
                raise FitError(f"need a module as {part}, got {value!r}; {_remedy(part, value)}")
        self.encoder, self.head = encoder, head
        if image_shape is not None:
            shape = feature_shape(encoder, image_shape)
            with _dry_run(self) as zeros:
                features = zeros(2, *shape)
                self.score(features, torch.arange(2, device=features.device), features, 2)

    def forward(self, task: TaskLike) -> Tensor:  # (n_query, n_way)
        """Scores of the task's queries; a plain tuple is taken as ``Task.of`` does."""
        task = Task.of(task)
        x = torch.cat([task.support_x, task.query_x])
        features = self.encoder(x)
        features = features.to(torch.promote_types(features.dtype, x.dtype))  # under autocast, for the distances
        support, query = features[: len(task.support_x)], features[len(task.support_x) :]
        return self.score(support, task.support_y, query, task.n_way)

    def score(self, support: Tensor, support_y: Tensor, query: Tensor, n_way: int) -> Tensor:  # (n_query, n_way)
        """Scores from features, (n_support, ...) and (n_query, ...), checked for their shape."""
        try:
            scores = self.head(support, support_y, query, n_way)
        except torch.OutOfMemoryError:
            raise
        except TypeError:
            _check_signature(self.head)
            raise
        except (RuntimeError, IndexError) as error:
            raise FitError(
                f"{type(self.head).__name__} fails on the encoder's features of shape {tuple(support.shape[1:])}: "
                f"{error}; build the head for that shape, or pass image_shape to find out at construction"
            ) from error
        if scores.shape != (len(query), n_way):
            raise FitError(
                f"need scores of shape (n_query, n_way) = ({len(query)}, {n_way}), "
                f"{type(self.head).__name__} gives {tuple(scores.shape)}"
            )
        return scores

    @property
    def loss_fn(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The head's loss, else cross-entropy."""
        return getattr(self.head, "loss_fn", nn.functional.cross_entropy)


def _remedy(part: str, value: Any) -> str:
    if isinstance(value, type):
        return f"make one of the class: {value.__name__}(...)"
    return f"give the {part} itself; `l2g train --{'backbone' if part == 'encoder' else part}` takes names"


class SoftmaxClassifier(nn.Module):
    """An encoder and a linear layer: images to logits of a fixed number of classes, for methods that adapt.

    Args:
        encoder: images (n, C, H, W) to features (n, ...), which are flattened.
        dim: length of the flattened features.
        n_way: classes.

    Shapes:
        (n, C, H, W) -> (n, n_way).

    Example:
        >>> from l2g_meta import Conv4
        >>> SoftmaxClassifier(Conv4(1, 8), 8, 5)(torch.randn(2, 1, 28, 28)).shape
        torch.Size([2, 5])
    """

    def __init__(self, encoder: nn.Module, dim: int, n_way: int):
        super().__init__()
        self.encoder, self.linear = encoder, nn.Linear(dim, n_way)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.linear(self.encoder(x).flatten(1))


def check_trainable(classifier: nn.Module) -> None:
    """That there is something to adapt.

    Raises:
        FitError: if no parameter requires a gradient.
    """
    if not any(p.requires_grad for p in classifier.parameters()):
        raise FitError(f"need a classifier with trainable parameters, {type(classifier).__name__} has none")


def check_ways(task: Task, n_way: int) -> None:
    """That a classifier has an output for each class of a task; further outputs are left out.

    Raises:
        FitError: if it has not.
    """
    if task.n_way > n_way:
        raise FitError(
            f"need tasks of at most {n_way} ways, one per output of the classifier, got {task.n_way}; train for that "
            "number of ways, or use a metric head, which takes any"
        )


def feature_shape(encoder: nn.Module, image_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one image's features, (C', H', W') for maps, found by a dry run.

    Raises:
        FitError: if the encoder does not take such images.

    Example:
        >>> from l2g_meta import Conv4
        >>> feature_shape(Conv4(3), (3, 84, 84))
        (64, 5, 5)
    """
    with _dry_run(encoder) as zeros:
        try:
            features = encoder(zeros(2, *image_shape))
        except (IndexError, RuntimeError) as error:
            raise FitError(
                f"{type(encoder).__name__} does not take images of shape {tuple(image_shape)}: {error}; use larger "
                "images, or another encoder"
            ) from error
    return tuple(features.shape[1:])


def build_head(head: Callable[..., nn.Module], shape: tuple[int, ...], **options: Any) -> nn.Module:
    """``head(**options)``, its ``channels``, ``map_size`` or ``dim`` arguments filled in from a feature shape.

    Args:
        head: a head's class or factory.
        shape: of one image's features, (C, H, W) for maps; ``dim`` is their product.
        options: arguments that are passed on as they are.

    Raises:
        FitError: if the head needs or takes other arguments.

    Example:
        >>> from l2g_meta import RelationHead
        >>> build_head(RelationHead, (8, 4, 4)).feature_shape
        (8, 4, 4)
    """
    known = {"channels": shape[0], "map_size": shape[1:], "dim": math.prod(shape)}
    signature = inspect.signature(head)
    arguments = {name: known[name] for name in known if name in signature.parameters} | options
    try:
        signature.bind(**arguments)
    except TypeError as error:
        name = getattr(head, "__name__", str(head))
        raise FitError(
            f"{name} does not take these options: {error}; filled in are channels, map_size and dim where a head takes "
            f"them, given are {options or 'none'}"
        ) from error
    return head(**arguments)


def _check_signature(head: Any) -> None:
    """That a head can be called with what a head is called with."""
    signature = inspect.signature(getattr(head, "forward", head))
    try:
        signature.bind("support", "support_y", "query", "n_way")
    except TypeError as error:
        raise FitError(
            f"need a head with forward(support, support_y, query, n_way) -> scores, {type(head).__name__} has "
            f"forward{signature}; give it these four"
        ) from error


@contextmanager
def _dry_run(module: nn.Module) -> Iterator[Callable[..., Tensor]]:
    """Evaluation mode, no gradients, generators as before afterwards; gives ``zeros`` on the module's device."""
    like = next(module.parameters(), torch.empty(0))
    with (
        torch.no_grad(),
        torch.random.fork_rng([like.device] if like.is_cuda else []),
        batchnorm_policy(module, "running"),
    ):
        yield functools.partial(torch.zeros, dtype=like.dtype, device=like.device)
