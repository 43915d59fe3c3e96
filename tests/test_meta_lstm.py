import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from l2g_meta import L2GWrapper, Task, batchnorm_policy
from l2g_meta.errors import FitError
from l2g_meta.models import meta_lstm
from l2g_meta.models.meta_lstm import MetaLSTM, preprocess
from l2g_meta.training.objectives import episodic, meta_gradient


def small_task(n_way=3, per_class=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(per_class * n_way, 1, 4, 4, generator=g), torch.arange(per_class * n_way) % n_way
    x = x.double() + y[:, None, None, None] * torch.eye(4, dtype=torch.float64)  # classes that can be told apart
    return Task(x[:n_way], y[:n_way], x[n_way:], y[n_way:], n_way)


def small_model(n_way=3, norm=False, steps=3):
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3) if norm else nn.Identity(), nn.Tanh(), nn.Flatten()]
    model = MetaLSTM(nn.Sequential(*layers, nn.Linear(12, n_way)), n_way, steps=steps, hidden=4).double()
    for p in [*model.lstm.parameters(), model.input_gate.weight, model.forget_gate.weight]:
        nn.init.normal_(p, std=0.3)  # not ±0.01: every term of the recurrence counts
    return model


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def numbers(x, p=10):
    return (math.log(abs(x)) / p, math.copysign(1.0, x)) if abs(x) >= math.exp(-p) else (-1.0, math.exp(p) * x)


def step_by_hand(model, gradient, loss, theta, memory):
    """The recurrence of one parameter in Python floats: its new value, and (h, c, i, f)."""
    h, c, i, f = memory
    n = len(h)
    w_in, w_h = model.lstm.weight_ih.tolist(), model.lstm.weight_hh.tolist()
    b = (model.lstm.bias_ih + model.lstm.bias_hh).tolist()
    x = [*numbers(gradient), *numbers(loss)]
    z = [
        sum(a * v for a, v in zip(w_in[k], x, strict=True)) + sum(a * v for a, v in zip(w_h[k], h, strict=True)) + b[k]
        for k in range(4 * n)
    ]
    gates = [z[k * n : (k + 1) * n] for k in range(4)]  # in, forget, cell, out, as PyTorch orders them
    c = [sigmoid(gates[1][k]) * c[k] + sigmoid(gates[0][k]) * math.tanh(gates[2][k]) for k in range(n)]
    h = [sigmoid(gates[3][k]) * math.tanh(c[k]) for k in range(n)]

    def gate(layer, last):
        terms = zip(layer.weight[0].tolist(), [*h, theta, last], strict=True)
        return sigmoid(sum(a * v for a, v in terms) + layer.bias.item())

    i, f = gate(model.input_gate, i), gate(model.forget_gate, f)
    return f * theta - i * gradient, (h, c, i, f)


def test_the_updates_are_the_written_recurrence():
    task, model = small_task(), small_model()
    names = [name for name, _ in model.classifier.named_parameters()]
    shapes = [p.shape for p in model.classifier.parameters()]
    theta = torch.cat([p.detach().flatten() for p in model.classifier.parameters()])

    def logits(values, x):
        parts = values.split([shape.numel() for shape in shapes])
        named = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return torch.func.functional_call(model.classifier, named, (x,))

    memories = [([0.0] * 4, [0.0] * 4, 0.0, 1.0)] * len(theta)
    for _ in range(3):
        leaf = theta.clone().requires_grad_()
        loss = F.cross_entropy(logits(leaf, task.support_x), task.support_y)
        loss.backward()
        stepped = [
            step_by_hand(model, leaf.grad[k].item(), loss.item(), theta[k].item(), memories[k])
            for k in range(len(theta))
        ]
        theta = torch.tensor([value for value, _ in stepped], dtype=torch.float64)
        memories = [memory for _, memory in stepped]
    torch.testing.assert_close(model(task), logits(theta, task.query_x), rtol=0, atol=1e-12)


def test_the_meta_gradient_is_that_with_gradients_and_losses_held_fixed(monkeypatch):
    task, model = small_task(), small_model()
    recorded, constants = [], MetaLSTM._constants

    def record(self, *args):
        recorded.append(constants(self, *args))
        return recorded[-1]

    monkeypatch.setattr(MetaLSTM, "_constants", record)
    meta_gradient(episodic, L2GWrapper(model, 0.0), [(task,)])

    def loss():
        replay = iter(recorded)
        monkeypatch.setattr(MetaLSTM, "_constants", lambda self, *args: next(replay))
        return F.cross_entropy(model(task), task.query_y)

    for name, p in model.named_parameters():
        direction = torch.randn_like(p)
        losses = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                p += step * direction
                losses.append(loss())
                p -= step * direction
        torch.testing.assert_close(
            (p.grad * direction).sum(), (losses[0] - losses[1]) / 2e-5, rtol=1e-6, atol=1e-9, msg=name
        )
        assert p.grad.abs().max() > 0, name


def test_preprocessing_at_around_and_below_the_threshold():
    edge = math.exp(-10)
    x = torch.tensor([1.0, -20.0, edge * 1.001, -edge * 1.001, edge * 0.999, -edge / 2, 0.0], dtype=torch.float64)
    expected = torch.tensor([numbers(v) if v else (-1.0, 0.0) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(preprocess(x), expected)
    assert preprocess(torch.zeros(2, 3)).shape == (2, 3, 2) and preprocess(torch.tensor(1e30)).isfinite().all()


def test_it_starts_as_small_steps_that_forget_nothing():
    model = MetaLSTM(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), 3, steps=1).double()
    task, linear = small_task(), model.classifier[1]
    with torch.no_grad():
        before, after = linear(task.query_x.flatten(1)), model(task)
    assert 0 < (before - after).abs().max() < 0.3
    assert -5 <= model.input_gate.bias.item() <= -4 and 4 <= model.forget_gate.bias.item() <= 6


def test_running_statistics_are_written_once_and_evaluation_writes_nothing():
    task, model, twin = small_task(), small_model(norm=True), small_model(norm=True)
    twin.load_state_dict(model.state_dict())
    twin.classifier(task.support_x)
    model(task)
    assert model.classifier[1].num_batches_tracked.item() == 1
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    before = [b.clone() for b in model.buffers()]
    for policy in ("running", "batch"):
        with torch.no_grad(), batchnorm_policy(model, policy):
            first, second = model(task), model(task)
        assert torch.equal(first, second) and not first.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def test_gates_keep_their_precision_under_autocast(monkeypatch):
    model, task = small_model().float(), small_task()
    task = task._replace(support_x=task.support_x.float(), query_x=task.query_x.float())
    found, gate = [], meta_lstm._gate

    def watch(*inputs):
        found.append(gate(*inputs))
        return found[-1]

    monkeypatch.setattr(meta_lstm, "_gate", watch)
    L2GWrapper(model, 0.0, autocast=torch.bfloat16).loss(task).backward()
    assert len(found) == 6 and all(values.dtype == torch.float32 for values in found)


def test_it_learns():
    torch.manual_seed(0)
    model = MetaLSTM(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), 3, steps=3).double()
    wrapper, losses = L2GWrapper(model, 0.0), []
    optimizer = torch.optim.Adam(wrapper.parameters(), lr=0.03)
    for k in range(40):
        optimizer.zero_grad()
        losses.append(meta_gradient(episodic, wrapper, [(small_task(seed=k),)]).loss)
        optimizer.step()
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_other_ways_and_frozen_classifiers_are_refused():
    with pytest.raises(FitError, match=r"need tasks of at most 3 ways, one per output of the classifier, got 4; train"):
        small_model()(small_task(4))
    with pytest.raises(FitError, match="Identity has none"):
        MetaLSTM(nn.Identity(), 3)
