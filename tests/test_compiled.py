"""Networks under ``torch.compile``: the exact gradient, and the names that users know."""

import copy

import pytest
import torch
from torch import nn

from l2g_meta import L2GWrapper, MetricModel, PrototypicalHead, Task
from l2g_meta.data import ClassDataset
from l2g_meta.errors import FitError
from l2g_meta.evaluation.episodes import evaluate
from l2g_meta.inner import clone as clone_room
from l2g_meta.inner import twice_differentiable
from l2g_meta.models.maml import SoftmaxMAML

BACKEND = "aot_eager"  # refuses a second derivative, as the default does, and compiles in no time


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 4, 3))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, task):
        z = self.encoder(torch.cat([task.support_x, task.query_x])).mean((2, 3))
        support, query = z[: len(task.support_x)], z[len(task.support_x) :]
        prototypes = torch.stack([support[task.support_y == k].mean(0) for k in range(task.n_way)])
        return -self.scale * (query[:, None] - prototypes).square().sum(-1)


class Decorated(Net):
    @torch.compile(backend=BACKEND)
    def forward(self, task):
        return super().forward(task)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["learn2learn", "built-in"])
def _backend(request, monkeypatch):
    if request.param == "learn2learn":
        pytest.importorskip("learn2learn")
    clone_room.backend.cache_clear()
    monkeypatch.setattr(clone_room, "has_learn2learn", lambda: request.param == "learn2learn")
    yield
    clone_room.backend.cache_clear()


@pytest.fixture(name="net")
def _net():
    torch.manual_seed(0)
    return Net().double()


@pytest.fixture(name="pair")
def _pair():
    torch.manual_seed(1)
    x, y = torch.randn(2, 9, 1, 6, 6, dtype=torch.double), torch.arange(9) % 3
    return tuple(Task(x[k, :3], y[:3], x[k, 3:], y[3:], 3) for k in (0, 1))


def encoder_in_place(net, **options):
    net.encoder.compile(backend=BACKEND)
    return L2GWrapper(net, 0.05, **options)


def encoder(net, **options):
    net.encoder = torch.compile(net.encoder, backend=BACKEND)
    return L2GWrapper(net, 0.05, **options)


def model(net, **options):
    return L2GWrapper(torch.compile(net, backend=BACKEND), 0.05, **options)


def model_in_place(net, **options):
    net.compile(backend=BACKEND)
    return L2GWrapper(net, 0.05, **options)


def wrapper(net, **options):
    return torch.compile(L2GWrapper(net, 0.05, **options), backend=BACKEND)


def wrapper_in_place(net, **options):
    l2g = L2GWrapper(net, 0.05, **options)
    l2g.compile(backend=BACKEND)
    return l2g


def later(net, **options):
    l2g = L2GWrapper(net, 0.05, **options)
    net.encoder = torch.compile(net.encoder, backend=BACKEND)
    return l2g


def decorated(net, **options):
    net.__class__ = Decorated
    return L2GWrapper(net, 0.05, **options)


COMPILED = [encoder_in_place, encoder, model, model_in_place, wrapper, wrapper_in_place, later, decorated]


def tensors(l2g):
    """Gradients and buffers by plain name."""
    named = [(name, p.grad) for name, p in l2g.named_parameters()] + list(l2g.named_buffers())
    return {name.replace("_orig_mod.", ""): t for name, t in named}


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("compiled", COMPILED, ids=lambda f: f.__name__)
def test_meta_gradient_is_that_of_the_uncompiled_network(compiled, net, pair):
    plain, l2g = L2GWrapper(copy.deepcopy(net), 0.05, mix=0.5), compiled(net, mix=0.5)
    for each in (plain, l2g):
        each(*pair).backward()
    torch.testing.assert_close(tensors(l2g), tensors(plain), rtol=1e-12, atol=1e-14)
    first_order = L2GWrapper(copy.deepcopy(plain.module), 0.05, mix=0.5, first_order=True)
    first_order.zero_grad()
    first_order(*pair).backward()
    difference = tensors(first_order)["module.encoder.0.weight"] - tensors(l2g)["module.encoder.0.weight"]
    assert difference.abs().max() > 1e-6  # the second-order term is there


@pytest.mark.parametrize("options", [{"first_order": True}, {"inner_steps": 2}, {"fast": False}], ids=str)
@pytest.mark.parametrize("compiled", [encoder, wrapper, decorated], ids=lambda f: f.__name__)
def test_options_with_compiled_networks(compiled, options, net, pair):
    plain, l2g = L2GWrapper(copy.deepcopy(net), 0.05, mix=0.3, **options), compiled(net, mix=0.3, **options)
    for each in (plain, l2g):
        each(*pair).backward()
    torch.testing.assert_close(tensors(l2g), tensors(plain), rtol=1e-12, atol=1e-14)


def test_a_loop_by_hand_may_be_compiled(net, pair):
    plain, l2g = L2GWrapper(copy.deepcopy(net), 0.05), L2GWrapper(net, 0.05)

    def step(task_i, task_j):
        learner = l2g.clone()
        learner.adapt(learner.loss(task_i))
        return learner.loss(task_j)

    plain(*pair).backward()
    torch.compile(step, backend=BACKEND)(*pair).backward()
    torch.testing.assert_close(tensors(l2g), tensors(plain), rtol=1e-12, atol=1e-14)


def test_compiled_functions_are_differentiated_twice_in_loops_of_your_own():
    squares = torch.compile(lambda x: (x**3).sum(), backend=BACKEND)
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    with twice_differentiable():
        y = squares(x)
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    assert torch.equal(torch.autograd.grad(g.sum(), x)[0], 6 * x)


def test_plain_passes_still_run_compiled(net, pair):
    runs = []

    def counting(graph, inputs):
        return lambda *args: runs.append(1) or graph.forward(*args)

    net.encoder.compile(backend=counting)
    l2g = L2GWrapper(net, 0.05)
    l2g(*pair)
    assert not runs
    l2g.loss(pair[0])
    assert runs or torch.__version__ < "2.9"  # 2.8 stays uncompiled after a pass that had to be


@pytest.mark.parametrize("compiled", [encoder_in_place, encoder, model, later], ids=lambda f: f.__name__)
def test_names_are_those_of_the_uncompiled_network(compiled, net):
    plain = L2GWrapper(copy.deepcopy(net), 0.05, learn_inner_lr="tensor")
    l2g = compiled(net, learn_inner_lr="tensor")
    assert set(l2g.state_dict()) == set(plain.state_dict())
    assert "inner_lr.encoder.0.weight" in l2g.state_dict()
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(1)
    l2g.load_state_dict(plain.state_dict())
    torch.testing.assert_close(dict(l2g.state_dict()), dict(plain.state_dict()))
    plain.load_state_dict(l2g.state_dict())


@pytest.mark.parametrize("compiled", [encoder, model], ids=lambda f: f.__name__)
def test_patterns_and_learned_step_sizes_take_plain_names(compiled, net, pair):
    options = {"adapt": ["encoder.0", "scale"], "learn_inner_lr": "element"}
    plain, l2g = L2GWrapper(copy.deepcopy(net), 0.05, **options), compiled(net, **options)
    assert [n for n, _ in l2g.inner_lr.named_parameters()] == [n for n, _ in plain.inner_lr.named_parameters()]
    for each in (plain, l2g):
        each(*pair).backward()
    torch.testing.assert_close(tensors(l2g), tensors(plain), rtol=1e-12, atol=1e-14)
    assert set(l2g.adapted(pair[0]).updates) == {"scale", "encoder.0.weight", "encoder.0.bias"}


def test_names_outside_of_the_wrapper_are_left_alone(net):
    whole = nn.ModuleDict({"other": torch.compile(nn.Linear(1, 1), backend=BACKEND), "l2g": encoder(net)})
    names = set(whole.state_dict())
    assert "other._orig_mod.weight" in names and "l2g.module.encoder.0.weight" in names
    whole.load_state_dict(whole.state_dict())
    compiled = torch.compile(whole["l2g"], backend=BACKEND)
    compiled.load_state_dict(compiled.state_dict())


def test_a_compiled_forward_set_on_an_instance_is_the_copys(net, pair):
    plain = L2GWrapper(copy.deepcopy(net), 0.05)
    net.encoder.forward = torch.compile(net.encoder.forward, backend=BACKEND)
    l2g = L2GWrapper(net, 0.05)
    for each in (plain, l2g):
        each(*pair).backward()
    torch.testing.assert_close(tensors(l2g), tensors(plain), rtol=1e-12, atol=1e-14)


class Chooses(nn.Module):
    """Its forward is one of its methods, held by the instance, as timm's FasterNet has it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 16, dtype=torch.float64))
        self.forward = self.flat

    def flat(self, x):
        return torch.tanh(x.flatten(1) @ self.weight.T)


def test_a_method_that_an_instance_holds_is_the_copys_own(either_backend):
    class Plain(Chooses):
        def __init__(self):
            super().__init__()
            del self.forward

        def forward(self, x):
            return self.flat(x)

    torch.manual_seed(0)
    x, y = torch.randn(2, 6, 1, 4, 4, dtype=torch.float64), torch.arange(6) % 3
    pair = [Task(x[k, :3], y[:3], x[k, 3:], y[3:], 3) for k in range(2)]
    found = []
    for kind in (Chooses, Plain):
        torch.manual_seed(1)
        encoder = kind()
        L2GWrapper(MetricModel(nn.Sequential(encoder, nn.Tanh()), PrototypicalHead()), 0.5, inner_steps=2)(
            *pair
        ).backward()
        found.append(encoder.weight.grad)
    assert torch.equal(*found)
    encoder = Plain()
    encoder.forward = lambda x: encoder.flat(x)
    with pytest.raises(FitError, match="got encoder.weight of the model itself"):
        L2GWrapper(MetricModel(encoder, PrototypicalHead()), 0.5)(*pair)


class Embeds(Net):
    """Calls its encoder through a bound method that it holds, compiled if asked for."""

    def __init__(self, compiled=False):
        super().__init__()
        forward = self.encoder.forward
        self.embed = torch.compile(forward, backend=BACKEND) if compiled else forward

    def forward(self, task):
        z = self.embed(torch.cat([task.support_x, task.query_x])).mean((2, 3))
        support, query = z[: len(task.support_x)], z[len(task.support_x) :]
        prototypes = torch.stack([support[task.support_y == k].mean(0) for k in range(task.n_way)])
        return -self.scale * (query[:, None] - prototypes).square().sum(-1)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_method_of_a_part_that_a_model_holds_is_the_copys(compiled, net, pair, either_backend):
    L2GWrapper(net, 0.5)(*pair).backward()
    torch.manual_seed(0)
    held = Embeds(compiled).double()
    held.load_state_dict(net.state_dict())
    L2GWrapper(held, 0.5)(*pair).backward()
    for p, q in zip(net.parameters(), held.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-10, atol=1e-12)


class Lists(Embeds):
    """Calls its parts from a plain list, and keeps what a hook of its own saw."""

    def __init__(self):
        super().__init__()
        self.parts, self.seen = [("encoder", self.encoder)], None
        self.embed = self.through
        self.encoder[0].register_forward_hook(self.save)

    def save(self, module, args, out):
        self.seen = out

    def through(self, x):
        return self.parts[0][1](x) + 0 * self.seen.sum()


def test_parts_in_lists_and_hooks_are_the_copys(net, pair, either_backend):
    L2GWrapper(net, 0.5)(*pair).backward()
    torch.manual_seed(0)
    held = Lists().double()
    held.load_state_dict(net.state_dict())
    L2GWrapper(held, 0.5)(*pair).backward()
    for p, q in zip(net.parameters(), held.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-10, atol=1e-12)


def test_a_compiled_wrapper_is_evaluated_and_loaded_from(net):
    data = ClassDataset(torch.randn(24, 1, 6, 6, dtype=torch.double), torch.arange(24) // 6)
    l2g, options = L2GWrapper(net, 0.05), {"ways": 3, "shots": 1, "queries": 2, "episodes": 3}
    compiled = torch.compile(l2g, backend=BACKEND)
    assert evaluate(compiled, data, **options) == evaluate(l2g, data, **options)
    L2GWrapper(Net().double(), 0.05).load_state_dict(compiled.state_dict())


def test_scripted_modules_are_refused(net):
    net.encoder = torch.jit.script(net.encoder)
    with pytest.raises(FitError, match="got the scripted Sequential; wrap it unscripted"):
        L2GWrapper(net, 0.05)


def test_maml_rebinds_methods_that_an_instance_holds(either_backend):
    x, y = torch.randn(2, 6, 1, 4, 4, dtype=torch.float64), torch.arange(6) % 3
    torch.manual_seed(1)
    classifier = Chooses()
    model = SoftmaxMAML(classifier, 3, inner_lr=0.5, inner_steps=2)
    before = torch.tanh(x[1].flatten(1) @ classifier.weight.T)
    scores = model(Task(x[0], y, x[1], y, 3))
    assert not torch.allclose(scores, before)  # the steps moved what the pass computes with
    (gradient,) = torch.autograd.grad(scores.sum(), classifier.weight)
    assert gradient.norm() > 0
