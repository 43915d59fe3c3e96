import copy
import gc
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from l2g_meta import Conv4, L2GWrapper, MetricModel, PrototypicalHead, RelationHead, Task
from l2g_meta.algorithm import Learner
from l2g_meta.errors import DataError, FitError
from l2g_meta.inner import clone, twice_differentiable
from l2g_meta.models.heads import HEADS
from l2g_meta.models.metric import build_head, feature_shape
from l2g_meta.testing import functional_meta_loss, random_task, second_order_is_kept
from l2g_meta.training.objectives import episodic, l2g, meta_gradient

IMAGE = (2, 16, 16)


class Quadratic(nn.Module):
    """Scores that make the loss ½a(θ−b)² with (a, b) from the task: its meta-gradient is known."""

    def __init__(self, theta=0.7):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, task):
        a, b = task.query_x
        return (0.5 * a * (self.theta - b) ** 2).expand(2, 2)

    @staticmethod
    def loss_fn(scores, query_y):
        return scores.mean()


def quadratic_task(a, b):
    x = torch.tensor([a, b], dtype=torch.float64)
    return Task(x, torch.arange(2), x, torch.arange(2), 2)


def network(head=None, *, channels=4, image=IMAGE):
    return MetricModel(Conv4(image[0], channels), head or PrototypicalHead(), image_shape=image).double()


def gradient(model, loss):
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.flatten() for g in gradients])


@pytest.fixture
def tasks():
    return random_task(IMAGE, n_way=3, queries=2), random_task(IMAGE, n_way=3, queries=2)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_quadratic_closed_form(steps, either_backend):
    a, b, c, d, alpha = 1.3, 0.2, 0.9, -0.4, 0.1
    model = Quadratic()
    L2GWrapper(model, alpha, inner_steps=steps)(quadratic_task(a, b), quadratic_task(c, d)).backward()
    theta = b + (0.7 - b) * (1 - alpha * a) ** steps
    assert model.theta.grad.item() == pytest.approx(c * (theta - d) * (1 - alpha * a) ** steps, rel=1e-12)


@pytest.mark.parametrize("pools", [2, 4], ids=["relation", "prototypical"])
def test_exact_gradient_of_a_convolutional_network_against_torch_func(pools, either_backend):
    head = RelationHead(4, 4) if pools == 2 else PrototypicalHead()
    model = MetricModel(Conv4(2, 4, pools=pools), head, image_shape=IMAGE).double()
    task_i, task_j = random_task(IMAGE), random_task(IMAGE)
    actual = gradient(model, L2GWrapper(model, 0.1)(task_i, task_j))
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = torch.func.grad(functional_meta_loss(model, 0.1, task_i, task_j))(parameters)
    torch.testing.assert_close(actual, torch.cat([g.flatten() for g in expected.values()]), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("first_order", [False, True])
def test_same_bits_as_learn2learns_own_maml(head, first_order, tasks):
    learn2learn = clone.require_learn2learn()
    encoder = Conv4(2, 4, pools=2)
    model = MetricModel(encoder, build_head(HEADS[head], feature_shape(encoder, IMAGE))).double()
    twin = copy.deepcopy(model)
    maml = learn2learn.algorithms.MAML(twin, lr=0.1, first_order=first_order)
    learner = maml.clone()

    def loss(task):
        with nullcontext() if first_order else twice_differentiable():
            return twin.loss_fn(learner(task), task.query_y)

    learner.adapt(loss(tasks[0]))
    theirs = gradient(twin, loss(tasks[1]))
    ours = gradient(model, L2GWrapper(model, 0.1, first_order=first_order)(*tasks))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [{}, {"mix": 0.3}, {"mix": 0.3, "inner_steps": 2}, {"mix": 0.3, "adapt": ["encoder.blocks.3"]}, {"fast": False}],
    ids=str,
)  # fmt: skip
def test_finite_differences_of_step_sizes_and_model(options, tasks, either_backend):
    model = network()
    wrapper = L2GWrapper(model, 0.05, learn_inner_lr="element", **options)
    loss = wrapper(*tasks)
    loss.backward()
    h = 1e-6
    for p in (*model.parameters(), *wrapper.inner_lr.parameters()):
        v = torch.randn_like(p)
        values = []
        for sign in (1, -1, 0):
            p.data += sign * h * v
            values.append(wrapper(*tasks).item())
            p.data -= sign * h * v
        numeric = (values[0] - values[1]) / (2 * h)
        torch.testing.assert_close((p.grad * v).sum().item(), numeric, rtol=1e-5, atol=1e-7)


def test_a_mix_is_the_sum_of_both_gradients(tasks, either_backend):
    model = network()
    own = gradient(model, L2GWrapper(model, 0.1).loss(tasks[0]))
    outer = gradient(model, L2GWrapper(model, 0.1)(*tasks))
    mixed = L2GWrapper(model, 0.1, mix=0.25)
    torch.testing.assert_close(gradient(model, mixed(*tasks)), 0.75 * outer + 0.25 * own, rtol=1e-10, atol=1e-12)
    value = 0.75 * L2GWrapper(model, 0.1)(*tasks) + 0.25 * L2GWrapper(model, 0.1).loss(tasks[0])
    torch.testing.assert_close(mixed(*tasks), value)
    stats, plain = (meta_gradient(l2g, L2GWrapper(model, 0.1, mix=m), [tasks]) for m in (0.25, 0.0))
    assert stats.loss == pytest.approx(value.item()) and stats.alignment == pytest.approx(plain.alignment)
    with pytest.raises(FitError, match="mix to be a number of at least 0 and below 1, got 1"):
        L2GWrapper(model, 0.1, mix=1.0)


def test_half_a_mix_without_a_step_is_episodic_training_on_both_tasks(tasks, either_backend):
    model = network()
    both = gradient(model, episodic(L2GWrapper(model, 0.1), *tasks).loss)
    mixed = gradient(model, L2GWrapper(model, 0.0, mix=0.5)(*tasks))
    torch.testing.assert_close(mixed, both, rtol=1e-10, atol=1e-12)


def test_a_sum_over_queries_is_a_mean_with_as_many_times_the_step(tasks, either_backend):
    """So that ``reduction`` adds nothing to a search over α: Adam does not see the scale of the meta-gradient."""
    n, model = len(tasks[0].query_y), network()
    mean = gradient(model, L2GWrapper(model, 0.1)(*tasks))
    model.head.reduction = "sum"
    summed = gradient(model, L2GWrapper(model, 0.1 / n)(*tasks))
    torch.testing.assert_close(summed / n, mean, rtol=1e-9, atol=1e-11)


def test_alpha_zero_and_first_order(tasks, either_backend):
    model = network()
    plain = gradient(model, L2GWrapper(model, 0.1).loss(tasks[1]))
    torch.testing.assert_close(gradient(model, L2GWrapper(model, 0.0)(*tasks)), plain, rtol=1e-10, atol=1e-12)
    exact = gradient(model, L2GWrapper(model, 0.1)(*tasks))
    first = gradient(model, L2GWrapper(model, 0.1, first_order=True)(*tasks))
    assert (exact - first).norm() > 1e-3 * exact.norm()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(exact, plain)


def test_a_lost_graph_is_noticed(monkeypatch):
    def detaching_update(module, updates):
        return clone.update_module(module, [None if u is None else u.detach() for u in updates])

    monkeypatch.setattr("l2g_meta.algorithm.backend", lambda: (clone.clone_module, detaching_update))
    with pytest.raises(AssertionError, match="graph lost"):
        second_order_is_kept(PrototypicalHead().double(), (4, 4, 4))


def test_by_hand_equals_forward(tasks):
    wrapper = L2GWrapper(network(), 0.1)
    learner = wrapper.clone()
    assert isinstance(learner, Learner) and learner(tasks[0]).shape == (6, 3)
    learner.adapt(learner.loss(tasks[0]))
    assert torch.equal(learner.loss(tasks[1]), wrapper(*tasks))


@pytest.mark.parametrize("learn", ["scalar", "tensor", "element"])
def test_learned_step_sizes_get_minus_gi_gj(learn, tasks):
    model = network()
    wrapper = L2GWrapper(model, 0.1, learn_inner_lr=learn)
    wrapper(*tasks).backward()
    plain = L2GWrapper(model, 0.1)
    learner = plain.adapted(tasks[0])
    g_j = torch.autograd.grad(learner.loss(tasks[1]), list(learner.module.parameters()))
    products = {n: u / 0.1 * g for (n, u), g in zip(learner.updates.items(), g_j, strict=True)}  # −g_i g_j
    if learn == "scalar":
        torch.testing.assert_close(wrapper.inner_lr.value.grad, sum(p.sum() for p in products.values()))
        return
    for name, product in products.items():
        expected = product if learn == "element" else product.sum()
        torch.testing.assert_close(wrapper.inner_lr(name).grad, expected)


def test_alignment_is_the_step_sizes_gradient(tasks):
    wrapper = L2GWrapper(network(), 0.1, learn_inner_lr="scalar")
    other = tuple(reversed(tasks))
    values = []
    for pair in (tasks, other):
        loss = wrapper(*pair)
        (slope,) = torch.autograd.grad(loss, wrapper.inner_lr.value)
        values.append((-0.1 * slope / loss).item())
    stats = meta_gradient(l2g, wrapper, [tasks, other])
    assert stats.alignment == pytest.approx(sum(values) / 2, rel=1e-9)


@pytest.mark.parametrize("learn", [False, "scalar", "tensor", "element"])
def test_state_dicts(learn):
    model = network()
    wrapper = L2GWrapper(model, 0.3, learn_inner_lr=learn)
    assert wrapper.module is model
    network().load_state_dict(wrapper.module.state_dict(), strict=True)
    state = wrapper.state_dict()
    added = {key for key in state if not key.startswith("module.")}
    assert added and all(key.startswith("inner_lr.") for key in added)
    if learn in ("tensor", "element"):
        assert added == {"inner_lr." + name for name, _ in model.named_parameters()}
    other = L2GWrapper(network(), 0.1, learn_inner_lr=learn)
    other.load_state_dict(state, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), state.values(), strict=True))
    expected = torch.tensor(0.3, dtype=torch.float64)
    assert torch.equal(other.inner_lr("encoder.blocks.0.conv.weight").flatten()[0], expected)


def test_a_fixed_step_size_is_exact_in_any_dtype():
    wrapper = L2GWrapper(network(), 0.01)
    assert wrapper.half().double().inner_lr("anything").item() == 0.01


class Partial(nn.Module):
    """A frozen layer, and one that only even-way tasks use."""

    def __init__(self):
        super().__init__()
        self.used, self.frozen = nn.Linear(3, 4), nn.Linear(4, 4)
        self.sometimes = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)

    def forward(self, task):
        z = self.frozen(torch.tanh(self.used(torch.cat([task.support_x, task.query_x]))))
        if task.n_way % 2 == 0:
            z = self.sometimes(z)
        n = len(task.support_x)
        return PrototypicalHead()(z[:n], task.support_y, z[n:], task.n_way)


def test_frozen_and_unused_parameters_go_by_name_and_silently(either_backend, capfd):
    model = Partial().double()
    two, three = random_task((3,)), random_task((3,), n_way=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner = L2GWrapper(model, 0.1).adapted(three)
        learner.loss(two).backward()
    assert capfd.readouterr() == ("", "")
    assert set(learner.updates) == {"used.weight", "used.bias"}
    assert model.frozen.weight.grad is None and torch.equal(learner.module.frozen.weight, model.frozen.weight)
    assert model.sometimes.weight.grad is not None and model.used.weight.grad is not None


def test_running_statistics_are_written_once_by_the_pass_under_theta(tasks, either_backend):
    model = network()
    expected = copy.deepcopy(model)
    expected(tasks[0])
    L2GWrapper(model, 0.5)(*tasks).backward()
    for (name, buffer), other in zip(model.named_buffers(), expected.buffers(), strict=True):
        assert torch.equal(buffer, other), name
    assert model.encoder.blocks[0].norm.num_batches_tracked.item() == 1


class Assigning(nn.Module):
    """Statistics that are assigned anew instead of written in place."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("nothing", None)

    def forward(self, task):
        self.mean = 0.9 * self.mean + 0.1 * task.query_x.mean()
        return -((self.weight * task.query_x - task.support_x.mean()) ** 2).expand(-1, task.n_way)


def test_assigned_statistics_follow_the_same_rule(either_backend):
    task_i, task_j = (Task(x, torch.arange(2), x, torch.arange(2), 2) for x in torch.rand(2, 2, 1))
    model, expected = Assigning(), Assigning()
    expected(task_i)
    learner = L2GWrapper(model, 0.1).adapted(task_i)
    assert torch.equal(model.mean, expected.mean)
    learner.loss(task_j)
    assert torch.equal(model.mean, expected.mean) and not torch.equal(learner.module.mean, expected.mean)


def test_a_norm_shared_by_two_names_is_written_once(either_backend):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.second = nn.BatchNorm1d(3)

        def forward(self, task):
            n = len(task.support_x)
            z = self.second(self.first(torch.cat([task.support_x, task.query_x])))
            return PrototypicalHead()(z[:n], task.support_y, z[n:], task.n_way)

    model, expected = Twice().double(), Twice().double()
    task_i, task_j = random_task((3,)), random_task((3,))
    expected(task_i)
    learner = L2GWrapper(model, 0.1).adapted(task_i)
    learner.loss(task_j)
    assert torch.equal(model.first.running_mean, expected.first.running_mean)
    assert learner.module.first.running_mean is learner.module.second.running_mean


def test_loss_is_the_arguments_then_the_models_then_cross_entropy(tasks):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, task):
            return self.net(task)

    bare = Bare()
    scores = bare(tasks[0])
    assert torch.equal(L2GWrapper(bare, 0.1).loss(tasks[0]), nn.functional.cross_entropy(scores, tasks[0].query_y))
    model = network(PrototypicalHead(reduction="sum"))
    torch.testing.assert_close(
        L2GWrapper(model, 0.1).loss(tasks[0]),
        nn.functional.cross_entropy(model(tasks[0]), tasks[0].query_y, reduction="sum"),
    )
    assert L2GWrapper(model, 0.1, loss_fn=lambda s, y: s.sum() * 0)(*tasks) == 0


def test_errors_say_what_to_do(tasks):
    wrapper = L2GWrapper(network(), 0.1)
    assert not hasattr(wrapper, "adapt")  # of the model itself
    learner = wrapper.clone()
    with pytest.raises(FitError, match="a loss of another learner"):
        learner.adapt(torch.ones((), requires_grad=True) * 2)
    with pytest.raises(FitError, match="without a graph"), torch.no_grad():
        learner.adapt(learner.loss(tasks[0]))
    with pytest.raises(FitError, match="no trainable|without|trainable parameters"):
        L2GWrapper(nn.Identity(), 0.1)
    with pytest.raises(FitError, match="learn_inner_lr"):
        L2GWrapper(network(), 0.1, learn_inner_lr="all")
    for alpha in (float("nan"), -1, "0.1"):
        with pytest.raises(FitError, match="inner_lr to be a number of at least 0"):
            L2GWrapper(network(), alpha)
    for adapt in ([], [3]):
        with pytest.raises(FitError, match="need adapt to be names or patterns, at least one"):
            L2GWrapper(network(), 0.1, adapt=adapt)
    for steps in (-1, 0, 1.5, True):
        with pytest.raises(FitError, match="inner_steps"):
            L2GWrapper(network(), 0.1, inner_steps=steps)

    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.ones(()))

        def forward(self, task):
            return self.p * task.query_x.flatten(1)

    with pytest.raises(FitError, match=r"need scores of shape \(n_query, n_way\) = \(6, 3\) from Wrong.forward"):
        L2GWrapper(Wrong(), 0.1).loss(tasks[0])
    with pytest.raises(DataError, match=r"query labels in 0 … 2, got \[0, 1, 2, 9\]"):
        L2GWrapper(network(), 0.1)(tasks[0], tasks[1]._replace(query_y=torch.tensor([0, 1, 2, 9, 1, 2])))
    frozen = network()
    frozen.encoder.blocks[0].requires_grad_(False)
    wrapper = L2GWrapper(frozen, 0.1, learn_inner_lr="tensor")
    frozen.requires_grad_(True)
    with pytest.raises(FitError, match="step size for 'encoder.blocks.0.conv.weight'"):
        wrapper(*tasks)


def test_shared_parameters_stay_shared(either_backend):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)
            self.b = nn.Linear(3, 3)
            self.b.weight = self.a.weight

        def forward(self, task):
            z = self.b(torch.tanh(self.a(torch.cat([task.support_x, task.query_x]))))
            n = len(task.support_x)
            return PrototypicalHead()(z[:n], task.support_y, z[n:], task.n_way)

    model = Tied().double()
    task_i, task_j = random_task((3,)), random_task((3,))
    learner = L2GWrapper(model, 0.1).adapted(task_i)
    assert learner.module.a.weight is learner.module.b.weight
    expected = torch.func.grad(functional_meta_loss(model, 0.1, task_i, task_j))(
        {name: p.detach().clone() for name, p in model.named_parameters()}
    )
    actual = torch.autograd.grad(learner.loss(task_j), list(model.parameters()))
    for g, e in zip(actual, expected.values(), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)


def test_memory_is_flat_over_meta_steps():
    model = MetricModel(Conv4(1, 4), PrototypicalHead(), image_shape=(1, 16, 16))
    wrapper = L2GWrapper(model, 0.01, learn_inner_lr="tensor")
    optimizer = torch.optim.Adam(wrapper.parameters())
    x, y = torch.randn(2, 6, 1, 16, 16), torch.arange(6) % 3
    pair = tuple(Task(x[k, :3], y[:3], x[k, 3:], y[3:], 3) for k in range(2))
    totals = []
    for step in range(60):
        optimizer.zero_grad()
        meta_gradient(l2g, wrapper, [pair, pair])
        optimizer.step()
        if step in (10, 59):
            gc.collect()
            live = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]
            totals.append((len(live), sum(t.numel() for t in live)))
            del live
    assert totals[0] == totals[1]
