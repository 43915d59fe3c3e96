r"""MAML (Finn, Abbeel, Levine 2017) with a softmax classifier: a model that adapts on a task's supports.

.. math:: \theta_0 = \theta, \qquad \theta_{t+1} = \theta_t - \alpha \nabla L(\theta_t; S), \qquad
          \text{scores} = h_{\theta_T}(Q)

with S the supports, Q the queries and L the cross-entropy. Training it is episodic training of that model: the mean
cross-entropy of the scores over tasks, differentiated through the T steps.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2g_meta.algorithm import L2GWrapper
from l2g_meta.inner.second_order import twice_differentiable
from l2g_meta.models.metric import check_trainable, check_ways
from l2g_meta.task import Task, TaskLike


class SoftmaxMAML(nn.Module):
    """A classifier of ``n_way`` classes that is adapted on the supports by gradient steps, ``model(task) -> scores``.

    The steps are those of ``L2GWrapper``'s learner, to the last bit learn2learn's ``MAML``.

    Args:
        classifier: images (n, C, H, W) to logits (n, n_way).
        n_way: classes of every task.
        inner_lr: step size α.
        inner_steps: T in training mode; 5 as published.
        test_steps: T in evaluation mode; 10 as published.
        first_order: treat the inner gradients as constants.

    Shapes:
        task -> scores (n_query, n_way).

    Raises:
        FitError: for a task of more ways, or a classifier without trainable parameters.

    Source:
        Finn et al., *Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks*, algorithm 2.

    Example:
        >>> model = SoftmaxMAML(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), 2)
        >>> x, y = torch.randn(6, 1, 2, 2), torch.arange(6) % 2
        >>> model(Task(x, y, x, y, 2)).shape
        torch.Size([6, 2])
    """

    def __init__(
        self,
        classifier: nn.Module,
        n_way: int,
        *,
        inner_lr: float = 0.01,
        inner_steps: int = 5,
        test_steps: int = 10,
        first_order: bool = False,
    ):
        super().__init__()
        check_trainable(classifier)
        self.classifier, self.n_way = classifier, n_way
        self.inner_lr, self.inner_steps, self.test_steps = inner_lr, inner_steps, test_steps
        self.first_order = first_order

    def forward(self, task: TaskLike) -> Tensor:  # (n_query, n_way)
        """Logits of the queries under θ_T."""
        task = Task.of(task)
        check_ways(task, self.n_way)
        exact = not self.first_order and torch.is_grad_enabled()
        with torch.enable_grad():  # the steps need gradients at test as well
            learner = L2GWrapper(self.classifier, self.inner_lr, first_order=not exact).clone()
            for _ in range(self.inner_steps if self.training else self.test_steps):
                with twice_differentiable() if exact else nullcontext():
                    logits = learner.module(task.support_x)[:, : task.n_way]  # of fewer ways: the first outputs
                learner.adapt(F.cross_entropy(logits, task.support_y))  # L(θ_t; S)
        return learner.module(task.query_x)[:, : task.n_way]
