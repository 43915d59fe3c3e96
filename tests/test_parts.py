"""Parts of a model wherever it holds them: the exact gradient, or an error that names what the inner step misses."""

import copy
import functools
import types
import weakref

import pytest
import torch
from torch import nn

from l2g_meta import L2GWrapper, MetricModel, PrototypicalHead, Task, check_head
from l2g_meta import algorithm as core
from l2g_meta.errors import FitError
from l2g_meta.models.maml import SoftmaxMAML
from l2g_meta.testing import functional_meta_loss, random_task

IMAGE = (2, 6, 6)
OPTIONS = [{}, {"first_order": True, "mix": 0.5}, {"inner_steps": 2, "fast": False}]
MISSED = r"need a pass or loss to use the learner's own parameters, got encoder.0.weight, 3 more of the model itself"


class Net(nn.Module):
    """Embeds supports by ``self.encoder``, and queries by what ``hold`` makes of the model."""

    def __init__(self, hold=None):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten())
        self.scale = nn.Parameter(torch.ones(()))
        self.embed = self.encoder if hold is None else hold(self)
        self.double()

    def forward(self, task):
        support = self.supports(task)
        return PrototypicalHead()(self.scale * support, task.support_y, self.embed(task.query_x), task.n_way)

    def supports(self, task):
        return self.encoder(task.support_x)


class AllByEmbed(Net):
    def supports(self, task):
        return self.embed(task.support_x)


def run(module, x):
    return module(x)


def second_of(x, module):
    return module(x)


def pointer(model):
    model.encoder[0].__dict__["whole"] = model
    return types.MethodType(lambda first, x: first.whole.encoder(x), model.encoder[0])


def patched(model):
    forward = model.encoder.forward
    model.encoder.forward = functools.wraps(forward)(lambda x: forward(x))
    return model.encoder


def in_namespace(model):
    held = types.SimpleNamespace(encoder=model.encoder)
    return lambda x: held.encoder(x)


FOUND = {
    "method": lambda model: model.encoder.forward,
    "partial": lambda model: functools.partial(run, model.encoder),
    "keyword": lambda model: functools.partial(second_of, module=model.encoder),
    "nested": lambda model: functools.partial(run, functools.partial(model.encoder.forward)),
    "pointer": pointer,
}
LOST = {
    "closure": lambda model: lambda x: model.encoder(x),
    "weak reference": lambda model: functools.partial(lambda part, x: part()(x), weakref.ref(model.encoder)),
    "namespace": in_namespace,
    "patched": patched,
}


@pytest.fixture
def pair():
    torch.manual_seed(1)
    return random_task(IMAGE, n_way=3, queries=2), random_task(IMAGE, n_way=3, queries=2)


def gradients(l2g, pair):
    return torch.autograd.grad(l2g(*pair), list(l2g.parameters()))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [Net, AllByEmbed])
@pytest.mark.parametrize("hold", FOUND.values(), ids=FOUND)
def test_what_a_copy_can_find_is_its_own(hold, kind, options, pair, either_backend):
    expected, found = (gradients(L2GWrapper(kind(h), 0.5, **options), pair) for h in (None, hold))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [Net, AllByEmbed])
@pytest.mark.parametrize("hold", LOST.values(), ids=LOST)
def test_what_a_copy_cannot_find_is_named(hold, kind, options, pair, either_backend):
    l2g = L2GWrapper(kind(hold), 0.5, **options)
    learner = l2g.clone()
    for call in (lambda: l2g(*pair), lambda: l2g(*pair), lambda: learner(pair[0]), lambda: learner.loss(pair[0])):
        with pytest.raises(FitError, match=MISSED + r".*as attributes \(self.encoder\), not by closures"):
            call()
    with torch.no_grad():  # nothing is adapted
        assert learner(pair[0]).isfinite().all() and l2g.loss(pair[0]).isfinite()


def test_a_loop_of_ones_own_is_told_as_well(pair):
    learner = L2GWrapper(AllByEmbed(LOST["closure"]), 0.5).clone()
    with pytest.raises(FitError, match=MISSED):
        learner.adapt(learner.module(pair[0]).square().mean())
    l2g = L2GWrapper(Net(), 0.5)
    with pytest.raises(FitError, match="got scale, 4 more of the model itself"):
        l2g.clone().adapt(l2g.loss(pair[0]))


def test_a_part_that_some_tasks_use_is_told_when_they_do(pair):
    class Sometimes(Net):
        def forward(self, task):
            embed = self.lost if task.n_way == 2 else self.encoder
            z = self.scale * embed(torch.cat([task.support_x, task.query_x]))
            return PrototypicalHead()(z[: len(task.support_x)], task.support_y, z[len(task.support_x) :], task.n_way)

    model = Sometimes()
    model.lost = LOST["closure"](model)
    l2g, other = L2GWrapper(model, 0.5), random_task(IMAGE)
    for tasks in ((other, pair[1]), (pair[0], other)):
        assert l2g(*pair).isfinite()
        with pytest.raises(FitError, match=MISSED):
            l2g(*tasks)


def test_what_is_not_adapted_may_lie_anywhere(pair):
    expected, found = (gradients(L2GWrapper(Net(h), 0.5, adapt=["scale"]), pair) for h in (None, LOST["closure"]))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    model = Net(LOST["closure"])
    model.encoder.requires_grad_(False)
    assert L2GWrapper(model, 0.5)(*pair).isfinite()


def test_a_loss_of_ones_own_may_compare_with_the_model(pair):
    l2g = L2GWrapper(Net(), 0.5)
    learner = l2g.adapted(pair[0])
    own = zip(learner.module.parameters(), l2g.module.parameters(), strict=True)
    learner.adapt(learner.loss(pair[0]) + sum((p - q).square().sum() for p, q in own))
    assert len(learner.updates) == 5 and learner.loss(pair[1]).isfinite()


def test_passes_are_looked_at_once_for_each_kind(pair, monkeypatch):
    looks = []
    monkeypatch.setattr(core, "check_parts", lambda *args: looks.append(1))
    l2g = L2GWrapper(Net(), 0.5, inner_steps=3)
    l2g(*pair)
    first = len(looks)
    l2g(*pair)
    assert len(looks) == first > 0
    l2g.eval()(*pair)
    assert len(looks) == 2 * first


class LearnedLoss(PrototypicalHead):
    """A temperature that the loss alone uses."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.3))

    def loss_fn(self, scores, query_y):
        return nn.functional.cross_entropy(scores * self.rate.exp(), query_y)


def test_parameters_of_a_models_loss_are_adapted(pair, either_backend):
    model = MetricModel(Net().encoder, LearnedLoss()).double()
    l2g = L2GWrapper(model, 0.5)
    assert "head.rate" in l2g.adapted(pair[0]).updates
    expected = torch.func.grad(functional_meta_loss(model, 0.5, *pair))(
        {name: p.detach().clone() for name, p in model.named_parameters()}
    )
    for g, e in zip(torch.autograd.grad(l2g(*pair), list(model.parameters())), expected.values(), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)
    assert not check_head(LearnedLoss).findings
    with pytest.raises(FitError, match="got head.rate of the model itself"):
        L2GWrapper(model, 0.5, loss_fn=model.loss_fn)(*pair)


def test_a_classifier_of_maml_is_told_as_well(either_backend):
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.last = nn.Sequential(nn.Flatten(), nn.Linear(72, 4)), nn.Linear(4, 2)
            self.embed = lambda x: self.body(x)

        def forward(self, x):
            return self.last(self.embed(x))

    with pytest.raises(FitError, match="got body.1.weight, 1 more of the model itself"):
        SoftmaxMAML(Classifier().double(), 2)(random_task(IMAGE))


def exported(encoder):
    shapes = ({0: torch.export.Dim("n", min=2)},)
    return torch.export.export(encoder, (torch.randn(6, *IMAGE).double(),), dynamic_shapes=shapes).module()


GRAPHS = {
    "fx": torch.fx.symbolic_trace,
    "inside": lambda encoder: nn.Sequential(torch.fx.symbolic_trace(encoder)),
    "compiled": lambda encoder: torch.compile(torch.fx.symbolic_trace(encoder), backend="aot_eager"),
    "export": exported,
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("traced", GRAPHS.values(), ids=GRAPHS)
def test_traced_graphs_are_adapted(traced, options, pair, either_backend):
    models = [MetricModel(part, PrototypicalHead()) for part in (Net().encoder, traced(Net().encoder))]
    expected, found = (gradients(L2GWrapper(model, 0.5, **options), pair) for model in models)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert copy.deepcopy(models[1])(pair[0]).isfinite().all()


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_scripted_parts_are_told():
    part = torch.jit.trace(Net().encoder.eval(), torch.randn(6, *IMAGE).double())
    l2g = L2GWrapper(MetricModel(Net().encoder, PrototypicalHead()), 0.5)
    l2g.module.encoder = part  # later than it was wrapped
    for wrap in (
        lambda: L2GWrapper(MetricModel(part, PrototypicalHead()), 0.5),
        lambda: SoftmaxMAML(part, 2)(random_task(IMAGE)),
        l2g.clone,
    ):
        with pytest.raises(FitError, match="got the scripted Sequential; wrap it unscripted"):
            wrap()


class Growing(nn.Module):
    """Registers a table of positions again when it meets more of them, as rotary embeddings do."""

    def __init__(self, *, part: bool = False):
        super().__init__()
        self.layer, self.part, self.n = nn.Linear(4, 3), part, 0

    def forward(self, x):
        if x.shape[1] > self.n:
            self.n = x.shape[1]
            self.register_buffer("at", torch.arange(self.n).to(x)[:, None], persistent=False)
        if self.part and not hasattr(self, "late"):
            self.late = nn.LayerNorm(3).to(x)
        return torch.tanh(self.layer(x + self.at[: x.shape[1]])).flatten(1)


def test_buffers_registered_in_a_forward(either_backend):
    torch.manual_seed(0)
    model = MetricModel(Growing().double(), PrototypicalHead())
    warm = copy.deepcopy(model)
    y = torch.arange(6) % 3
    short, long = (Task(*(torch.randn(6, n, 4).double() if k % 2 == 0 else y for k in range(4)), 3) for n in (2, 5))
    warm(long)
    found = [torch.autograd.grad(L2GWrapper(m, 0.1)(short, short), list(m.parameters())) for m in (model, warm)]
    torch.testing.assert_close(*found)
    assert model.encoder.at.shape == (2, 1) and not model.encoder.state_dict().keys() & {"at"}
    L2GWrapper(model, 0.1)(long, long).backward()
    with pytest.raises(FitError, match=r"got encoder.late, made in a forward; call model\(task\) first"):
        L2GWrapper(MetricModel(Growing(part=True).double(), PrototypicalHead()), 0.1)(short, short)
