"""L2GWrapper: any metric-based module, one differentiable inner step, the cross-task outer loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from l2g_meta.errors import FitError
from l2g_meta.inner.clone import adapted_names, backend, own_buffers, trainable_parameters
from l2g_meta.inner.step import LearnInnerLR, StepSizes
from l2g_meta.inner.twice_differentiable import twice_differentiable
from l2g_meta.recompute import recomputed_gradient
from l2g_meta.task import Task

TINY = 1e-24  # beside the squared norm of a gradient, which may be 0
LossFn = Callable[[Tensor, Tensor], Tensor]


class L2GWrapper(nn.Module):
    r"""Trains a metric-based model so that one inner step on T_i helps on T_j, a task with other classes.

    ``l2g(task_i, task_j)`` is the outer loss of Lee et al. (arXiv 1908.01457),

    .. math:: L(\theta - \alpha \nabla_\theta L(\theta; T_i);\ T_j) \qquad \text{(eq. 3 and 4)}

    with its graph: after ``backward()`` the gradients on the model are the exact meta-gradient. The same by hand::

        learner = l2g.clone()
        learner.adapt(learner.loss(task_i))
        learner.loss(task_j).backward()

    The wrapper holds the model itself, never a copy, so ``l2g.module.state_dict()`` is the bare model's;
    ``l2g.state_dict()`` adds the step sizes under ``inner_lr.``. Cloning is learn2learn's where it is installed.

    Args:
        model: ``model(task) -> scores`` of shape (n_query, n_way), higher is closer; any ``nn.Module``.
        inner_lr: step size α of the inner step (the paper: 0.01), or the initial one if it is learned.
        adapt: which parameters the inner step changes, by name, prefix or pattern (``["head", "encoder.layer4.*"]``),
            as in ANIL (Raghu et al. 2020); by default all. The others have the same value in θ' and are still trained,
            through the inner step too.
        first_order: treat the inner gradient as a constant: the meta-gradient loses its Hessian term.
        learn_inner_lr: ``False``; ``"scalar"``: one learned α; ``"tensor"``: one per parameter tensor;
            ``"element"``: one per element (Meta-SGD, Li et al. 2017).
        inner_steps: inner steps on T_i taken by ``forward``.
        mix: share m of T_i's own loss in what ``forward`` returns, (1 − m) L(θ'; T_j) + m L(θ; T_i), in [0, 1); 0 is
            Algorithm 1. Its gradient is the g_i of the inner step, so that it costs nothing. ``l2g train`` has 0.5,
            which was better in all that we measured (``docs/findings.md``).
        unit_step: divide the inner gradient by its norm over all adapted parameters, so that θ' lies at the distance α
            from θ; differentiated, too.
        recompute: keep no graph of an inner step: its loss is computed a second time in the backward pass. The same
            gradient with less memory, and about one plain episode more of time. For ``forward`` and ``adapted``. Only
            the model's parameters and step sizes get a gradient through the inner step, no other tensor (inputs, a
            ``loss_fn``'s own parameters), and the meta-gradient cannot be differentiated again.
        autocast: run the model under ``torch.autocast`` in this type, e.g. ``torch.bfloat16``; losses, inner steps and
            parameters stay as they are, and backward passes run outside of it.
        loss_fn: ``loss_fn(scores, query_y) -> ()``; by default the model's own ``loss_fn``, else cross-entropy.

    Raises:
        FitError: for an unknown option, a model without trainable parameters, or a pattern that fits none.

    Example:
        >>> import torch
        >>> from l2g_meta import Conv4, L2GWrapper, MetricModel, PrototypicalHead, Task
        >>> l2g = L2GWrapper(MetricModel(Conv4(1), PrototypicalHead()), inner_lr=0.01)
        >>> x, y = torch.randn(2, 10, 1, 16, 16), torch.arange(10) % 5
        >>> task_i, task_j = (Task(x[k, :5], y[:5], x[k, 5:], y[5:], 5) for k in (0, 1))
        >>> loss = l2g(task_i, task_j)
        >>> loss.backward()
    """

    def __init__(
        self,
        model: nn.Module,
        inner_lr: float | StepSizes,
        *,
        adapt: Sequence[str] | None = None,
        first_order: bool = False,
        learn_inner_lr: LearnInnerLR = False,
        inner_steps: int = 1,
        mix: float = 0.0,
        unit_step: bool = False,
        recompute: bool = False,
        autocast: torch.dtype | None = None,
        loss_fn: LossFn | None = None,
    ):
        super().__init__()
        if not isinstance(inner_steps, int) or inner_steps < 0:
            raise FitError(f"need inner_steps to be an integer of at least 0, got {inner_steps!r}")
        if not 0 <= mix < 1:
            raise FitError(f"need mix to be at least 0 and below 1, got {mix!r}")
        self.module = model
        self.adapt_only = adapt
        if not isinstance(inner_lr, StepSizes):
            inner_lr = StepSizes(model, inner_lr, learn_inner_lr, adapt)
        self.inner_lr = inner_lr
        self.first_order, self.inner_steps, self.recompute = first_order, inner_steps, recompute
        self.mix, self.unit_step, self.autocast = mix, unit_step, autocast
        self._loss_fn, self._checked = loss_fn, False
        self.source: nn.Module | None = None
        self.adapted_steps = 0
        self.updates: dict[str, Tensor] = {}
        self.inner_loss: Tensor | None = None
        self._first: Tensor | None = None  # L(θ; T_i), with the inner gradient as its gradient

    def forward(self, task_i: Task, task_j: Task) -> Tensor:  # ()
        """Outer loss L(θ'; T_j) after ``inner_steps`` steps on ``task_i``, with its graph; mixed, if asked for."""
        self._check_first(task_i, task_j)
        learner = self.adapted(task_i)
        return learner.mixed(learner.loss(task_j))

    def adapted(self, task_i: Task) -> L2GWrapper:
        """A learner that has taken the inner steps on ``task_i``."""
        learner = self.clone()
        for _ in range(self.inner_steps):
            if self.recompute and not self.first_order and torch.is_grad_enabled():
                learner._take_step(
                    *recomputed_gradient(learner.module, lambda: learner.loss(task_i), of=learner._wanted_names())
                )
            else:
                learner.adapt(learner.loss(task_i))
        return learner

    def clone(self) -> L2GWrapper:
        """A learner: the model with parameters that are differentiable copies, and the same step sizes.

        Until its first ``adapt`` a learner's passes write the model's buffers (running statistics), afterwards
        private copies, so that statistics are those under θ and are updated once per inner task.
        """
        clone_module, _ = backend()
        learner = L2GWrapper(
            clone_module(self.module),
            self.inner_lr,
            adapt=self.adapt_only,
            first_order=self.first_order,
            inner_steps=self.inner_steps,
            mix=self.mix,
            unit_step=self.unit_step,
            recompute=self.recompute,
            autocast=self.autocast,
            loss_fn=self._loss_fn,
        )
        # Not a submodule: the learner's parameters are the clone's alone.
        object.__setattr__(learner, "source", self.module)
        return learner

    def adapt(self, loss: Tensor) -> L2GWrapper:
        r"""One inner step on a learner, in place: :math:`\theta' = \theta - \alpha \nabla_\theta` loss (eq. 3).

        Frozen parameters, those that ``adapt`` leaves out and those that the loss does not depend on stay as they are;
        afterwards ``updates`` holds
        θ' − θ by name for the others, and ``inner_loss`` the loss.

        Args:
            loss: a scalar computed with this learner.

        Returns:
            The learner.

        Raises:
            FitError: on a wrapper that is no learner, or if the loss does not depend on any parameter.
        """
        if self.source is None:
            raise FitError("need a learner to adapt, got the wrapper of the model itself; call clone() first")
        parameters = dict(self.module.named_parameters())
        trainable = {name: parameters[name] for name in self._wanted_names()}
        if not loss.requires_grad:
            raise FitError(
                "need a loss that depends on the learner's parameters, got one without a graph; compute it with this "
                "learner (learner.loss(task)), with gradients enabled, and leave some parameter trainable"
            )
        gradients = torch.autograd.grad(
            loss, list(trainable.values()), create_graph=not self.first_order, allow_unused=True
        )
        g = {name: gradient for name, gradient in zip(trainable, gradients, strict=True) if gradient is not None}
        return self._take_step(loss, g)

    def _adapted_names(self) -> list[str]:
        return adapted_names(self.module, self.adapt_only)

    def mixed(self, outer: Tensor) -> Tensor:  # ()
        """(1 − ``mix``) outer + ``mix`` L(θ; T_i), for an adapted learner; ``outer`` itself where ``mix`` is 0."""
        return outer if not self.mix or self._first is None else (1 - self.mix) * outer + self.mix * self._first

    def _wanted_names(self) -> list[str]:
        """Parameters whose inner gradient is wanted: T_i's own loss in a mix trains those, too, that no step adapts."""
        return list(trainable_parameters(self.module)) if self.mix else self._adapted_names()

    def _take_step(self, loss: Tensor, g: dict[str, Tensor]) -> L2GWrapper:
        if self.mix and not self.adapted_steps:
            self._first = _linearised(loss, g, trainable_parameters(self.module))
        g = {name: g[name] for name in self._adapted_names() if name in g}
        if not g:
            raise FitError("need a loss computed with this learner, got one that depends on none of its parameters")
        if not self.adapted_steps:
            own_buffers(self.source, self.module)  # type: ignore[arg-type]
        if self.unit_step:
            norm = sum(gradient.square().sum() for gradient in g.values()).add(TINY).sqrt()  # type: ignore[union-attr]
            g = {name: gradient / norm for name, gradient in g.items()}
        self.updates = {name: -self.inner_lr(name) * g[name] for name in g}
        _, update_module = backend()
        update_module(self.module, [self.updates.get(name) for name, _ in self.module.named_parameters()])
        self.adapted_steps += 1
        self.inner_loss = loss.detach()
        return self

    def loss(self, task: Task) -> Tensor:  # ()
        """Loss of the current parameters on a task's queries.

        Raises:
            FitError: if the scores are not (n_query, n_way).
            DataError: if the first task that the wrapper sees has labels out of range, or of another type.
        """
        if self.source is None:
            self._check_first(task)
        second_order = self.source is not None and not self.first_order and torch.is_grad_enabled()
        with twice_differentiable() if second_order else nullcontext():
            scores = self._scores(task)
        if self.autocast is not None:
            scores = scores.to(task.query_x.dtype) if isinstance(scores, Tensor) else scores
        expected = (len(task.query_y), task.n_way)
        if not isinstance(scores, Tensor) or scores.shape != expected:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise FitError(
                f"need scores of shape (n_query, n_way) = {expected} from {type(self.module).__name__}.forward(task), "
                f"got {got}"
            )
        return self.loss_fn(scores, task.query_y)

    def _scores(self, task: Task) -> Tensor:
        if self.autocast is None:
            return self.module(task)
        # The cache would hand the inner step's casts of θ, or their graph, to later passes.
        with torch.autocast(task.query_y.device.type, self.autocast, cache_enabled=False):
            return self.module(task)

    @property
    def loss_fn(self) -> LossFn:
        """The argument, else the model's ``loss_fn``, else cross-entropy."""
        return self._loss_fn or getattr(self.module, "loss_fn", None) or nn.functional.cross_entropy

    def _check_first(self, *tasks: Task) -> None:
        # Once: reading labels waits for the device.
        if not self._checked:
            for task in tasks:
                task.check()
            self._checked = True


def _linearised(loss: Tensor, g: dict[str, Tensor], parameters: dict[str, Tensor]) -> Tensor:  # ()
    """The loss's value, with the gradient g that is known already in place of its graph."""
    slope = sum((g[name].detach() * parameters[name]).sum() for name in g)
    return loss.detach() + (slope - slope.detach())  # type: ignore[union-attr]
