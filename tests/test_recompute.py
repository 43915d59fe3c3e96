"""Recomputing the inner step: the same meta-gradient without its graph, and g_j − α H_i g_j as the identity says."""

import copy
import weakref

import pytest
import torch
from torch import nn

from l2g_meta import Conv4, L2GWrapper, MetricModel, PrototypicalHead, Task
from l2g_meta.objectives import l2g, maml, meta_gradient

OPTIONS = [
    {},
    {"inner_steps": 0},
    {"inner_steps": 3},
    {"learn_inner_lr": "scalar", "inner_steps": 2},
    {"learn_inner_lr": "element"},
    {"first_order": True},
    {"mix": 0.5, "unit_step": True},
]


def pair(image=(1, 18, 18)):
    x, y = torch.randn(2, 9, *image, dtype=torch.float64), torch.arange(9) % 3
    return tuple(Task(x[k, :3], y[:3], x[k, 3:], y[3:], 3) for k in range(2))


class Recurrent(nn.Module):
    """Weights held twice, tied weights, a frozen and an unused parameter."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(18, 6, batch_first=True)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.unused = nn.Linear(2, 2)
        self.a.bias.requires_grad_(False)

    def forward(self, x):
        return self.b(torch.tanh(self.a(self.lstm(x[:, 0])[0][:, -1])))


ENCODERS = {
    "conv4": lambda: Conv4(1, 4),
    "stock": lambda: Conv4(1, 4, fused=False),
    "dropout": lambda: nn.Sequential(Conv4(1, 4), nn.Dropout(0.4)),
    "recurrent": Recurrent,
    "spectral": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(1, 8, 3)), nn.Tanh(), nn.Flatten()),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_same_loss_gradients_buffers_and_random_numbers(encoder, options, either_backend):
    model = MetricModel(ENCODERS[encoder](), PrototypicalHead(learn_temperature=True)).double()
    batch, seen = [pair(), pair()], []
    for recompute in (False, True):
        wrapper = L2GWrapper(copy.deepcopy(model), 0.1, recompute=recompute, **options)
        torch.manual_seed(5)
        stats = meta_gradient(l2g, wrapper, batch)
        gradients = {name: p.grad for name, p in wrapper.named_parameters()}
        seen.append((stats, gradients, dict(wrapper.named_buffers()), torch.get_rng_state()))
    plain, again = seen
    assert again[0] == pytest.approx(plain[0], rel=1e-12, nan_ok=True)
    for name, g in plain[1].items():
        assert (g is None) == (again[1][name] is None), name
        if g is not None:
            torch.testing.assert_close(again[1][name], g, rtol=1e-10, atol=1e-13)
    for name, buffer in plain[2].items():
        assert torch.equal(again[2][name], buffer), name
    assert torch.equal(plain[3], again[3])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("method", [l2g, maml])
def test_the_gradient_is_what_the_identity_says(method, recompute):
    """g_j − α H_i g_j, with g_j at θ' and the Hessian-vector product at θ, each by itself."""
    alpha, tasks = 0.1, pair()
    model = MetricModel(Conv4(1, 4), PrototypicalHead()).double()
    inner, outer = tasks if method is l2g else (tasks[0], tasks[0])
    parameters = list(model.parameters())

    def loss(model, task):
        return model.head.loss_fn(model(task), task.query_y)

    g_i = torch.autograd.grad(loss(model, inner), parameters, create_graph=True)
    moved = copy.deepcopy(model)
    for p, g in zip(moved.parameters(), g_i, strict=True):
        p.data -= alpha * g.detach()
    g_j = torch.autograd.grad(loss(moved, outer), list(moved.parameters()))
    h_g = torch.autograd.grad(g_i, parameters, g_j)

    meta_gradient(method, L2GWrapper(model, alpha, recompute=recompute), [tasks if method is l2g else tasks[:1]])
    for p, g, h in zip(parameters, g_j, h_g, strict=True):
        torch.testing.assert_close(p.grad, g - alpha * h, rtol=1e-10, atol=1e-13)


class Box:
    """A saved tensor, alive as long as the graph that holds it."""

    def __init__(self, tensor):
        self.tensor = tensor


def test_no_graph_of_the_inner_step_is_kept():
    """What the adapted learner holds on to: parameters, not feature maps."""
    kept = {}
    for recompute in (False, True):
        wrapper = L2GWrapper(MetricModel(Conv4(1, 4), PrototypicalHead()).double(), 0.1, recompute=recompute)
        boxes = weakref.WeakSet()

        def pack(t, boxes=boxes):
            boxes.add(box := Box(t))
            return box

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
            learner = wrapper.adapted(pair()[0])
        kept[recompute] = sum(box.tensor.numel() for box in boxes)
        del learner
    parameters = sum(p.numel() for p in wrapper.module.parameters())
    assert kept[True] <= 3 * parameters < kept[False] / 3


def test_autocast_is_the_same_the_second_time():
    model = MetricModel(Conv4(1, 4), PrototypicalHead())
    tasks = tuple(Task(t.support_x.float(), t.support_y, t.query_x.float(), t.query_y, 3) for t in pair())
    gradients = []
    for recompute in (False, True):
        wrapper = L2GWrapper(copy.deepcopy(model), 0.1, recompute=recompute)
        with torch.autocast("cpu", torch.bfloat16):
            loss = wrapper(*tasks)
        loss.backward()
        gradients.append([p.grad for p in wrapper.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_differentiating_the_meta_gradient_is_refused():
    """It would be silently wrong without the graph."""
    wrapper = L2GWrapper(MetricModel(Conv4(1, 4), PrototypicalHead()).double(), 0.1, recompute=True)
    parameters = list(wrapper.parameters())
    with pytest.raises(RuntimeError, match="use recompute=False, or leave create_graph out"):
        torch.autograd.grad(wrapper(*pair()), parameters, create_graph=True)
