r"""Algorithm 1 of L2G (Lee, Na, Lee & Hwang, arXiv 1908.01457), for any metric-based model.

::

    for each of B = 5 pairs:
        T_i, T_j ~ tasks with disjoint classes
        θ' = θ − α ∇L(θ; T_i)                            # eq. 3, one differentiable step: Learner.adapt
        (L(θ'; T_j) / B).backward()                      # eq. 4, prototypes, queries under θ'; loss: L2GWrapper.outcome
    θ ← Adam(θ, β = 1e-3)                                # eq. 5

With one inner step the meta-gradient is exactly  g_j − α H_i g_j,  g_j = ∇L(θ'; T_j), H_i = ∇²L(θ; T_i).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from numbers import Real
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from l2g_meta.errors import FitError, check_argument, one_of
from l2g_meta.inner.clone import (
    adapted_names,
    backend,
    no_copy,
    own_buffers,
    rebind,
    same_tensors,
    warn_of_unregistered,
)
from l2g_meta.inner.compiled import eagerly, plain_names, uncompiled
from l2g_meta.inner.scores import LossFn, evaluated, loss_fn_of, loss_of
from l2g_meta.inner.second_order import twice_differentiable
from l2g_meta.inner.step import InnerStep, LearnInnerLR, StepSizes, check_parts
from l2g_meta.task import Task, TaskLike


class Outcome(NamedTuple):
    """What a pair of tasks gives; every loss has its graph."""

    loss: Tensor  # (), what is descended: (1 − mix) outer + mix inner
    inner: Tensor | None = None  # (), L(θ; T_i)
    outer: Tensor | None = None  # (), L(θ'; T_j)
    learner: Learner | None = None  # at θ'


class L2GWrapper(nn.Module):
    r"""Trains a metric-based model so that one inner step on T_i helps on T_j, a task with other classes.

    ``l2g(task_i, task_j)`` is the outer loss of Algorithm 1,
    :math:`L(\theta - \alpha \nabla L(\theta; T_i);\ T_j)` (eq. 3 and 4): after ``backward()`` the gradients on the
    model are the exact meta-gradient. The same by hand::

        learner = l2g.clone()
        learner.adapt(learner.loss(task_i))
        learner.loss(task_j).backward()

    The wrapper holds the model itself, never a copy: ``l2g.module.state_dict()`` is the bare model's, and
    ``l2g.state_dict()`` adds the step sizes under ``inner_lr.``. Cloning is learn2learn's where it is installed.

    Args:
        model: ``model(task) -> scores`` of shape (n_query, n_way), higher is closer; any ``nn.Module``.
        inner_lr: step size α of the inner step (the paper: 0.01), or the initial one if it is learned.
        inner_steps: steps on T_i.
        mix: weight m of T_i's own loss in (1 − m) L(θ'; T_j) + m L(θ; T_i), in [0, 1); 0 is Algorithm 1 of the paper.
            ``l2g train`` has 0.5, which was better in what we measured and takes no more time.
        adapt: which parameters the inner step changes, by name, prefix or pattern (``["head", "encoder.layer4.*"]``),
            as in ANIL (Raghu et al. 2020); by default all. The others keep their value in θ' and are trained as well.
        first_order: treat the inner gradient as a constant: the meta-gradient loses its Hessian term.
        learn_inner_lr: ``False``; ``"scalar"``: one learned α; ``"tensor"``: one per parameter tensor;
            ``"element"``: one per element (Meta-SGD, Li et al. 2017).
        autocast: run the model under ``torch.autocast`` in this type, e.g. ``torch.bfloat16``; losses, inner steps and
            parameters stay as they are, and backward passes run outside of it.
        fast: run a learner's passes on operators with a fast second derivative, see ``twice_differentiable``.
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
        inner_lr: float,
        *,
        inner_steps: int = 1,
        mix: float = 0.0,
        adapt: Sequence[str] | None = None,
        first_order: bool = False,
        learn_inner_lr: LearnInnerLR = False,
        autocast: torch.dtype | None = None,
        fast: bool = True,
        loss_fn: LossFn | None = None,
    ):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise FitError(f"need a model to wrap, an nn.Module, got {model!r}; a class is called first: Model()")
        is_step, is_share = type(inner_steps) is int and inner_steps >= 1, isinstance(mix, Real) and 0 <= mix < 1
        is_type = autocast in (None, torch.bfloat16, torch.float16)
        check_argument("inner_steps", inner_steps, "an integer of at least 1", is_step)
        check_argument("mix", mix, "a number of at least 0 and below 1", is_share)
        check_argument("autocast", autocast, "torch.bfloat16, torch.float16 or None", is_type)
        warn_of_unregistered(model)
        self.module = model
        self.inner_lr = StepSizes(uncompiled(model), inner_lr, learn_inner_lr, adapt)
        self.step = InnerStep(self.inner_lr, adapt=adapt, first_order=first_order, whole=mix > 0)
        self.inner_steps, self.mix, self.autocast, self._loss_fn = inner_steps, mix, autocast, loss_fn
        self.first_order = one_of("first_order", first_order, (True, False))
        self.fast = one_of("fast", fast, (True, False))
        self._kinds: set[Any] = set()  # of passes that were seen to use a learner's parameters alone
        loss_fn = self.loss_fn
        is_function = callable(loss_fn) and not isinstance(loss_fn, type)
        check_argument("loss_fn", loss_fn, "a function of (scores, query_y); a class is called first", is_function)
        plain_names(self)

    def forward(self, task_i: TaskLike, task_j: TaskLike) -> Tensor:  # ()
        """Outer loss of a pair, with its graph."""
        return self.outcome(task_i, task_j).loss

    @eagerly
    def outcome(self, task_i: TaskLike, task_j: TaskLike) -> Outcome:
        """Algorithm 1 for one pair: eq. 3, then eq. 4.

        Raises:
            DataError: for tasks that are none, with labels out of range or classes without a support.
            FitError: if the model's scores are not (n_query, n_way).
        """
        task_i, task_j = Task.of(task_i).check(), Task.of(task_j).check()
        learner = self.adapted(task_i)  # θ' = θ − α ∇L(θ; T_i)
        loss_i, loss_j = learner.inner_loss, learner.loss(task_j)  # L(θ; T_i), L(θ'; T_j)
        loss = (1 - self.mix) * loss_j + self.mix * loss_i if self.mix else loss_j
        return Outcome(loss, loss_i, loss_j, learner)

    def adapted(self, task_i: TaskLike) -> Learner:
        """A learner at θ', after ``inner_steps`` steps on ``task_i``."""
        learner = self.clone()  # at θ
        for _ in range(self.inner_steps):
            learner.adapt(learner.loss(task_i))
        return learner

    def clone(self) -> Learner:
        """A learner at θ, in the mode (training or evaluation) that the model is in."""
        return Learner(self)

    def loss(self, task: TaskLike) -> Tensor:  # ()
        """L(θ; T), a plain pass of the model."""
        return loss_of(self.module, task, self.loss_fn, self.autocast)

    @property
    def loss_fn(self) -> LossFn:
        """The argument, else the model's ``loss_fn``, else cross-entropy."""
        return self._loss_fn or loss_fn_of(self.module)


class Learner:
    """A model on its way from θ to θ': its parameters are differentiable functions of the wrapped model's.

    Until its first ``adapt`` a learner's passes write the model's buffers (running statistics), afterwards private
    copies: statistics are those under θ, written once per inner task.

    Args:
        l2g: the wrapper that it is a clone of.
    """

    module: nn.Module  # computes with the learner's parameters
    updates: dict[str, Tensor]  # θ' − θ of the last step, by name
    inner_loss: Tensor  # (), that of the first step, with its graph

    @eagerly
    def __init__(self, l2g: L2GWrapper):
        clone_module, self._update_module = backend()
        self._l2g, self._source = l2g, uncompiled(l2g.module)
        self.module, self.updates, self._own_buffers = rebind(self._source, clone_module(self._source)), {}, False
        self._starts = {p.grad_fn: name for name, p in self.module.named_parameters() if p.requires_grad}
        vars(self.module)["__deepcopy__"] = no_copy

    @eagerly
    def __call__(self, task: TaskLike) -> Tensor:  # (n_query, n_way)
        """Scores of a task's queries under the learner's parameters."""
        task = Task.of(task)
        with self._pass():
            return self._own(evaluated(self.module, task, self._l2g.autocast), "scores", task.n_way)

    @eagerly
    def loss(self, task: TaskLike) -> Tensor:  # ()
        """Loss under the learner's parameters, that can be differentiated twice."""
        task, loss_fn = Task.of(task), self._l2g._loss_fn or loss_fn_of(self.module)
        with self._pass():
            return self._own(loss_of(self.module, task, loss_fn, self._l2g.autocast), "loss", task.n_way)

    @eagerly
    def adapt(self, loss: Tensor) -> Learner:
        r"""One inner step, in place: :math:`\theta' = \theta - \alpha \nabla_\theta` loss (eq. 3).

        Frozen parameters, those that ``adapt`` leaves out and those that the loss does not depend on stay as they are.

        Args:
            loss: a scalar computed with this learner.

        Raises:
            FitError: if the loss does not depend on any parameter, or on parts of the model itself instead.
        """
        if not self._own_buffers:  # before the backward pass, in which checkpointing runs this one again
            own_buffers(self._source, self.module)
            self._own_buffers = True
        step = self._l2g.step
        g = step.gradients(loss, self.module)
        self._own(loss, frozenset(g), reached=g)  # a loss of your own may compare θ' with θ
        updates = step.updates(g, self.module)
        if not self.updates:  # the first step
            self.inner_loss = step.linearised(loss, g, self.module)
        self.updates = updates
        self.module = rebind(self.module, same_tensors(self.module))  # checkpointing runs T_i's pass on the old one
        self._update_module(self.module, [updates.get(name) for name, _ in self.module.named_parameters()])
        return self

    def _own(self, out: Tensor, *kind: Any, reached: Collection[str] = ()) -> Tensor:
        """What was computed itself, after a look for adapted parts that the copy does not own, once for each kind."""
        kind = (self.module.training, not self.updates, *kind)
        if out.grad_fn is not None and kind not in self._l2g._kinds:
            names = set(adapted_names(self.module, self._l2g.step.adapt)) - set(reached)
            check_parts(out, self._starts, names)
            self._l2g._kinds.add(kind)
        return out

    def _pass(self) -> Any:
        exact = not self._l2g.first_order and torch.is_grad_enabled()
        return twice_differentiable(fast=self._l2g.fast) if exact else nullcontext()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        no_copy()
