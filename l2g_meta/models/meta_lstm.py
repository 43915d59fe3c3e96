r"""The LSTM meta-learner (Ravi & Larochelle 2017): a learned optimiser, and learned parameters to start it from.

The update θ_{t-1} → θ_t of a learner's parameters is that of an LSTM's cell state, each parameter on its own with
shared weights. With ∇_t the gradient and L_t the loss of the supports under θ_{t-1},

.. math::
    h_t &= \mathrm{LSTM}([p(\nabla_t), p(L_t)], h_{t-1}) \\
    i_t &= \sigma(W_I [h_t, \theta_{t-1}, i_{t-1}] + b_I) \\
    f_t &= \sigma(W_F [h_t, \theta_{t-1}, f_{t-1}] + b_F) \\
    \theta_t &= f_t \odot \theta_{t-1} - i_t \odot \nabla_t  && \text{(eq. 2 and 3)}

where p is the preprocessing of ``preprocess`` and θ_0 is learned. As published the meta-gradient is first-order: ∇_t
and L_t count as constants.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from l2g_meta.inner.clone import trainable_parameters
from l2g_meta.models.metric import check_trainable, check_ways
from l2g_meta.task import Task, TaskLike


def preprocess(x: Tensor, *, p: float = 10.0) -> Tensor:  # (...) -> (..., 2)
    r"""Numbers of very different size as two of about one (Andrychowicz et al. 2016, appendix A).

    :math:`(\log|x| / p, \mathrm{sgn}\,x)` where :math:`|x| \ge e^{-p}`, else :math:`(-1, e^p x)`.

    Shapes: x (...) -> (..., 2).

    Example:
        >>> preprocess(torch.tensor([1.0, -1.0, 0.0])).tolist()
        [[0.0, 1.0], [0.0, -1.0], [-1.0, 0.0]]
    """
    large = x.abs() >= math.exp(-p)
    size = torch.where(large, x.abs().clamp(min=math.exp(-p)).log() / p, -1.0)
    return torch.stack([size, torch.where(large, x.sign(), math.exp(p) * x)], -1)


class MetaLSTM(nn.Module):
    """A classifier of ``n_way`` classes that an LSTM adapts on the supports, ``model(task) -> scores``.

    Its parameters are those of the LSTM, and the classifier's: θ_0.

    Args:
        classifier: images (n, C, H, W) to logits (n, n_way).
        n_way: classes of every task.
        steps: updates on the supports, each on all of them; 12 for one shot and 5 for five as published.
        hidden: size of h.

    Shapes:
        task -> scores (n_query, n_way).

    Raises:
        FitError: for a task of more ways, or a classifier without trainable parameters.

    Source:
        Ravi & Larochelle, *Optimization as a Model for Few-Shot Learning*, section 3.

    Example:
        >>> model = MetaLSTM(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), 2)
        >>> x, y = torch.randn(6, 1, 2, 2), torch.arange(6) % 2
        >>> model(Task(x, y, x, y, 2)).shape
        torch.Size([6, 2])
    """

    def __init__(self, classifier: nn.Module, n_way: int, *, steps: int = 5, hidden: int = 20):
        super().__init__()
        check_trainable(classifier)
        self.classifier, self.n_way, self.steps = classifier, n_way, steps
        self.lstm = nn.LSTMCell(4, hidden)
        self.input_gate, self.forget_gate = nn.Linear(hidden + 2, 1), nn.Linear(hidden + 2, 1)
        for p in [*self.lstm.parameters(), *self.input_gate.parameters(), *self.forget_gate.parameters()]:
            nn.init.uniform_(p, -0.01, 0.01)
        # To begin with, small steps of gradient descent that forget nothing.
        nn.init.uniform_(self.input_gate.bias, -5, -4)
        nn.init.uniform_(self.forget_gate.bias, 4, 6)

    def forward(self, task: TaskLike) -> Tensor:  # (n_query, n_way)
        """Logits of the queries under θ_T."""
        task = Task.of(task)
        check_ways(task, self.n_way)
        theta = torch.cat([p.flatten() for p in trainable_parameters(self.classifier).values()])  # (n,)
        i, f = torch.zeros_like(theta), torch.ones_like(theta)
        h = c = theta.new_zeros(self.lstm.hidden_size, len(theta))
        # Running statistics are those of the first pass, under θ_0; later passes write copies.
        buffers = dict(self.classifier.named_buffers())
        for _ in range(self.steps):
            loss, gradient = self._constants(theta, buffers, task)
            buffers = {name: b.clone() for name, b in buffers.items()}
            inputs = torch.cat([preprocess(gradient).T, preprocess(loss)[:, None].expand(2, len(theta))])  # (4, n)
            with torch.autocast(theta.device.type, enabled=False):  # bf16 does not tell a gate of 0.995 from 1
                h, c = _read(self.lstm, inputs, h, c)
                i = _gate(self.input_gate, h, theta, i)
                f = _gate(self.forget_gate, h, theta, f)
            theta = f * theta - i * gradient
        return self._logits(theta, buffers, task.query_x)[:, : task.n_way]

    def _constants(self, theta: Tensor, buffers: dict[str, Tensor], task: Task) -> tuple[Tensor, Tensor]:  # (), (n,)
        """L_t and ∇_t."""
        with torch.enable_grad():
            theta = theta.detach().requires_grad_()
            logits = self._logits(theta, buffers, task.support_x)[:, : task.n_way]  # of fewer ways: the first outputs
            loss = F.cross_entropy(logits, task.support_y)
            (gradient,) = torch.autograd.grad(loss, theta)
        return loss.detach(), gradient

    def _logits(self, theta: Tensor, buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        parameters = trainable_parameters(self.classifier)
        parts = theta.split([p.numel() for p in parameters.values()])
        values = {name: part.view_as(p) for (name, p), part in zip(parameters.items(), parts, strict=True)}
        return functional_call(self.classifier, values | buffers, (x,))


def _read(
    lstm: nn.LSTMCell,
    x: Tensor,  # (inputs, n)
    h: Tensor,  # (hidden, n)
    c: Tensor,  # (hidden, n)
) -> tuple[Tensor, Tensor]:
    """What ``lstm`` does, on columns: its gates lie in one piece then, and a CPU's tanh is several times as fast."""
    weight, bias = torch.cat([lstm.weight_ih, lstm.weight_hh], 1), lstm.bias_ih + lstm.bias_hh
    i, f, g, o = torch.addmm(bias[:, None], weight, torch.cat([x, h])).chunk(4)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gate(gate: nn.Linear, h: Tensor, theta: Tensor, last: Tensor) -> Tensor:  # (hidden, n), (n,), (n,) -> (n,)
    return torch.addmm(gate.bias, gate.weight, torch.cat([h, theta[None], last[None]])).sigmoid().squeeze(0)
