"""The wrapper as people meet it: their tasks, their networks, checkpoints, and what is refused."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from l2g_meta import Conv4, L2GWrapper, MetricModel, PrototypicalHead, Task
from l2g_meta.errors import DataError, FitError
from l2g_meta.testing import random_task

IMAGE = (3, 16, 16)


@pytest.fixture
def tasks():
    return random_task(IMAGE, n_way=3, queries=2), random_task(IMAGE, n_way=3, queries=2)


def network():
    return MetricModel(Conv4(3, 4), PrototypicalHead()).double()


def gradients(wrapper, pair):
    wrapper.zero_grad()
    wrapper(*pair).backward()
    return [p.grad.clone() for p in wrapper.parameters()]


class TestTasks:
    def test_plain_tuples(self, tasks):
        model = network()
        expected = gradients(L2GWrapper(model, 0.1), tasks)
        for pair in (
            [tuple(t)[:4] for t in tasks],
            [list(t) for t in tasks],
            [(*t[:4], [11, 5, 7]) for t in tasks],  # easyfsl's class ids
            [tuple(part[None] for part in t[:4]) for t in tasks],  # a DataLoader's
            [(t.support_x, t.support_y * 2 + 5, t.query_x, t.query_y * 2 + 5) for t in tasks],
            [tuple(part.numpy() for part in t[:4]) for t in tasks],
            [Task(*(part.numpy() for part in t[:4]), 3) for t in tasks],
            [Task(t.support_x, t.support_y.tolist(), t.query_x, t.query_y.tolist(), 3) for t in tasks],
        ):
            found = gradients(L2GWrapper(model, 0.1), pair)
            assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
        wrapper, plain = L2GWrapper(model, 0.1), tuple(tasks[0])[:4]
        assert torch.equal(wrapper.loss(plain), wrapper.loss(tasks[0]))
        learner = wrapper.clone()
        assert torch.equal(learner(plain), learner(tasks[0])) and wrapper.adapted(plain).updates

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"n_way": 4}, r"need a support of each of the 4 classes, got none of \[3\]"),
            ({"support_y": torch.tensor([0, 1, 1])}, r"need a support of each of the 3 classes, got none of \[2\]"),
            (
                {"query_x": torch.zeros(0, *IMAGE), "query_y": torch.zeros(0).long()},
                "need at least one query, got none",
            ),
            ({"query_y": torch.tensor([0, 1, 2, 3, 1, 2])}, r"need query labels in 0 … 2, got \[0, 1, 2, 3\]"),
            ({"query_y": torch.tensor([0, 1, 2, -1, 1, 2])}, r"need query labels in 0 … 2, got \[-1, 0, 1, 2\]"),
            ({"query_y": torch.arange(3)}, "one label per query, got torch.int64 of shape"),
            ({"n_way": torch.tensor(3)}, "need n_way to be a Python int"),
            (
                {"query_x": torch.zeros(6, 3, 20, 20)},
                r"supports and queries of one shape, got \(3, 16, 16\) and \(3, 20, 20\); resize",
            ),
            (
                {"support_x": torch.zeros(3, *IMAGE).byte(), "query_x": torch.zeros(6, *IMAGE).byte()},
                r"that MetricModel computes with, torch.float64, got torch.uint8; .* by x.float\(\) / 255",
            ),
        ],
        ids=["way", "class", "queries", "high", "negative", "length", "tensor", "sizes", "uint8"],
    )
    def test_a_wrong_task_is_told_on_every_call(self, change, message, tasks):
        wrapper, wrong = L2GWrapper(network(), 0.1), tasks[0]._replace(**change)
        learner = wrapper.clone()
        for call in (
            lambda: wrapper(wrong, tasks[1]),
            lambda: wrapper(tasks[0], wrong),
            lambda: wrapper.outcome(tasks[1], wrong),
            lambda: wrapper.loss(wrong),
            lambda: wrapper.adapted(wrong),
            lambda: learner.loss(wrong),
            lambda: learner(wrong),
        ):
            wrapper(*tasks)  # that an earlier task was right does not matter
            with pytest.raises(DataError, match=message):
                call()

    def test_a_network_that_converts_images_takes_them_as_they_are(self, tasks):
        class Scaled(nn.Module):
            def __init__(self, model):
                super().__init__()
                self.encoder = model.encoder

            def forward(self, x):
                return self.encoder(x.double() / 255)

        model = network()
        bytes_ = [t._replace(support_x=(t.support_x * 40).byte(), query_x=(t.query_x * 40).byte()) for t in tasks]
        as_floats = [t._replace(support_x=t.support_x.double() / 255, query_x=t.query_x.double() / 255) for t in bytes_]
        found = L2GWrapper(MetricModel(Scaled(model), PrototypicalHead()), 0.1)(*bytes_)
        assert torch.equal(found, L2GWrapper(model, 0.1)(*as_floats))

    @pytest.mark.parametrize("thing", [None, 3, torch.zeros(4, 3), "task", (torch.zeros(2), torch.arange(2))])
    def test_what_is_no_task(self, thing, tasks):
        with pytest.raises(DataError, match="need a"):
            L2GWrapper(network(), 0.1)(tasks[0], thing)


class TestModels:
    @pytest.mark.parametrize("kind", ["sequential", "torchvision", "learn2learn"])
    def test_a_bare_encoder_is_told_to_be_wrapped(self, kind, tasks, either_backend):
        if kind == "sequential":
            encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        elif kind == "torchvision":
            encoder = pytest.importorskip("torchvision").models.resnet18(weights=None)
        else:
            library = pytest.importorskip("learn2learn", reason="learn2learn is not installed")
            encoder = library.vision.models.ConvBase(hidden=4, channels=3, max_pool=True)
        wrapper, state = L2GWrapper(encoder.double(), 0.1), copy.deepcopy(encoder.state_dict())
        for call in (lambda: wrapper(*tasks), lambda: wrapper.loss(tasks[0]), lambda: wrapper.clone()(tasks[0])):
            with pytest.raises(FitError, match=r"forward takes images; wrap it: MetricModel\(encoder, Prototypical"):
                call()
        assert all(torch.equal(state[name], value) for name, value in encoder.state_dict().items())
        assert all(m.training for m in encoder.modules())
        assert L2GWrapper(MetricModel(encoder, PrototypicalHead()), 0.1)(*tasks).isfinite()

    @pytest.mark.parametrize(
        "first", [lambda x: 2 * x - 1, lambda x: x + 0.5, lambda x: x[:, :1]], ids=["2x", "x+", "x[]"]
    )
    def test_a_bare_encoder_that_begins_with_arithmetic(self, first):
        class Scaled(nn.Conv2d):
            def forward(self, x):
                return super().forward(first(x)).flatten(1)

        x, y = torch.zeros(6, 3, 8, 8), torch.arange(6) % 2  # which do not fit
        with pytest.raises(FitError, match="forward takes images; wrap it"):
            L2GWrapper(Scaled(7, 4, 3), 0.1)(Task(x, y, x, y, 2), Task(x, y, x, y, 2))

    @pytest.mark.parametrize(
        "x", [torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.zeros(6, 1, 8, 8)], ids=["uint8", "grey"]
    )
    @pytest.mark.parametrize(
        "encoder", [Conv4(3), nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())], ids=["Conv4", "stock"]
    )
    def test_a_bare_encoder_whose_images_do_not_fit(self, encoder, x):
        task = Task(x, torch.arange(6) % 2, x, torch.arange(6) % 2, 2)
        with pytest.raises(FitError, match=r"forward takes images; wrap it: MetricModel\(encoder, Prototypical"):
            L2GWrapper(encoder, 0.1)(task, task)

    @pytest.mark.parametrize("error", [AssertionError, ValueError, RuntimeError, KeyError])
    def test_whatever_a_bare_encoder_raises(self, error, tasks):
        class Strict(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 4, 3)

            def forward(self, x):
                if not isinstance(x, torch.Tensor):
                    raise error("an image, please")
                return self.conv(x)

        with pytest.raises(FitError, match=r"Strict's forward takes images; wrap it: MetricModel") as raised:
            L2GWrapper(Strict().double(), 0.1)(*tasks)
        assert isinstance(raised.value.__cause__, error)

    def test_an_error_of_ones_own_forward_stays_what_it_is(self, tasks):
        class Wrong(nn.Module):
            def __init__(self):
                super().__init__()
                self.p = nn.Parameter(torch.ones(()))

            def forward(self, task):
                return task.suport_x * self.p

        with pytest.raises(AttributeError, match="suport_x"):
            L2GWrapper(Wrong(), 0.1)(*tasks)

    @pytest.mark.parametrize("autocast", [True, "bf16", torch.int32])
    def test_autocast_is_a_type(self, autocast):
        with pytest.raises(FitError, match=r"need autocast to be torch.bfloat16, torch.float16 or None, got"):
            L2GWrapper(network(), 0.1, autocast=autocast)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mix": "a"}, "need mix to be a number of at least 0 and below 1, got 'a'"),
            ({"mix": None}, "need mix to be a number"),
            ({"first_order": "x"}, "need first_order to be one of True, False; got 'x'"),
            ({"fast": None}, "need fast to be one of True, False; got None"),
            ({"inner_lr": [0.1]}, r"need inner_lr to be a number of at least 0, finite, got \[0.1\]"),
            ({"inner_lr": torch.tensor(0.1)}, "need inner_lr to be a number"),
            ({"adapt": 3}, "need adapt to be names or patterns, at least one, got 3"),
            ({"loss_fn": 3}, r"need loss_fn to be a function of \(scores, query_y\); .* got 3"),
            ({"loss_fn": nn.CrossEntropyLoss}, "a class is called first, got .*CrossEntropyLoss"),
        ],
    )
    def test_arguments(self, options, message):
        with pytest.raises(FitError, match=message):
            L2GWrapper(network(), **{"inner_lr": 0.1, **options})

    def test_a_loss_is_a_number(self, tasks):
        wrapper = L2GWrapper(network(), 0.1)
        for loss in (None, 1.0, wrapper.clone()(tasks[0])):
            with pytest.raises(FitError, match="need a loss as a tensor of one number, .* got"):
                wrapper.clone().adapt(loss)
        for loss_fn in (nn.CrossEntropyLoss(reduction="none"), lambda scores, y: 1.0):
            wrapper = L2GWrapper(network(), 0.1, loss_fn=loss_fn)
            for call in (lambda w: w(*tasks), lambda w: w.loss(tasks[0])):
                with pytest.raises(FitError, match=r"one number, .* got (a tensor of shape \(6,\)|1.0)"):
                    call(wrapper)

    def test_a_tied_weight_goes_by_any_of_its_names(self, either_backend):
        encoder = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        encoder[2].weight = encoder[0].weight
        model, task = MetricModel(encoder.double(), PrototypicalHead()), random_task((4,), n_way=3, queries=2)
        for adapt, adapted in (
            (["encoder.2.weight"], {"encoder.0.weight"}),
            (["encoder.2"], {"encoder.0.weight", "encoder.2.bias"}),
            (["encoder.0"], {"encoder.0.weight", "encoder.0.bias"}),
        ):
            learner = L2GWrapper(model, 0.1, adapt=adapt, learn_inner_lr="tensor").adapted(task)
            assert set(learner.updates) == adapted
            assert learner.module.encoder[0].weight is learner.module.encoder[2].weight
        with pytest.raises(FitError, match="there are encoder.0.weight, .*, encoder.2.weight"):
            L2GWrapper(model, 0.1, adapt=["encoder.1"])

    def test_parameters_that_pytorch_does_not_see(self):
        class Hidden(nn.Module):
            def __init__(self, *, kept=list):
                super().__init__()
                self.seen, self.layers = nn.Linear(4, 4), kept([nn.Linear(4, 4)])

        with pytest.warns(UserWarning, match="in the plain list 'encoder.layers' are neither adapted nor trained"):
            L2GWrapper(MetricModel(Hidden(), PrototypicalHead()), 0.1)
        hidden = Hidden()
        hidden.layers = {"w": nn.Parameter(torch.zeros(2))}
        with pytest.warns(UserWarning, match="in the plain dict 'layers'"):
            L2GWrapper(hidden, 0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            hidden.layers = [hidden.seen, 3]  # registered as well
            for model in (hidden, Hidden(kept=nn.ModuleList), nn.LSTM(3, 4)):
                L2GWrapper(model, 0.1)

    def test_a_model_is_an_instance(self):
        with pytest.raises(FitError, match=r"need a model to wrap, an nn.Module, got .*a class is called first: Model"):
            L2GWrapper(Conv4, 0.1)

    def test_a_learner_is_copied_by_clone(self, tasks):
        learner = L2GWrapper(network(), 0.1).adapted(tasks[0])
        for copied in (copy.copy, copy.deepcopy, lambda thing: copy.deepcopy({"learner": thing}), pickle.dumps):
            for thing in (learner, L2GWrapper(network(), 0.1).clone()):
                with pytest.raises(FitError, match=r"call clone\(\) for another learner, or copy learner.module.state"):
                    copied(thing)
        with pytest.raises(FitError, match=r"copy learner.module.state_dict\(\) into a copy of the model"):
            copy.deepcopy(learner.module)
        model = network()
        model.load_state_dict(learner.module.state_dict())
        assert torch.equal(model(tasks[1]), learner(tasks[1]))
        loaded = pickle.loads(pickle.dumps(learner.module))  # noqa: S301 (a file has parameters of its own)
        assert torch.equal(copy.deepcopy(loaded)(tasks[1]), learner(tasks[1]))

    def test_a_clone_is_in_the_mode_of_its_wrapper(self, tasks, either_backend):
        wrapper = L2GWrapper(network(), 0.1)
        wrapper(*tasks).backward()
        buffers = [b.clone() for b in wrapper.buffers()]
        learner = wrapper.eval().clone()
        assert not any(m.training for m in learner.module.modules())
        learner.adapt(learner.loss(tasks[0])).loss(tasks[1])
        assert not any(m.training for m in learner.module.modules())
        assert all(torch.equal(a, b) for a, b in zip(wrapper.buffers(), buffers, strict=True))
        assert all(m.training for m in wrapper.train().clone().module.modules())

    def test_recurrent_layers_compute_with_the_weights_of_the_step(self, either_backend):
        class Recurrent(nn.Module):
            def __init__(self):
                super().__init__()
                self.rnn, self.out = nn.LSTM(4, 5, bidirectional=True), nn.Linear(10, 3)

            def forward(self, task):
                return self.out(self.rnn(task.query_x)[0]) + task.support_x.sum()

        model, pair = Recurrent().double(), [random_task((4,), n_way=3, queries=2) for _ in range(2)]
        wrapper = L2GWrapper(model, 0.5, inner_steps=2)
        learner = wrapper.clone()
        for _ in range(3):
            rnn = learner.module.rnn
            assert all(w is getattr(rnn, n) for w, n in zip(rnn._flat_weights, rnn._flat_weights_names, strict=True))
            before = learner.loss(pair[0])
            learner.adapt(before)
            assert learner.loss(pair[0]) < before
        assert all(w is p for w, p in zip(model.rnn._flat_weights, model.rnn.parameters(), strict=True))
        parameters, h = list(model.parameters()), 1e-6
        found = torch.autograd.grad(wrapper(*pair), parameters)
        v, values = [torch.randn_like(p) for p in parameters], []
        for step in (h, -2 * h):
            for p, d in zip(parameters, v, strict=True):
                p.data += step * d
            values.append(wrapper(*pair).item())
        expected = (values[0] - values[1]) / (2 * h)
        assert sum((g * d).sum().item() for g, d in zip(found, v, strict=True)) == pytest.approx(expected, rel=1e-5)


CONV4 = [
    f"encoder.blocks.{k}.{name}"
    for k in range(4)
    for name in ("conv.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var",
                 "norm.num_batches_tracked")
]  # fmt: skip


@pytest.mark.parametrize("learn", [False, "scalar", "tensor", "element"])
def test_checkpoints_of_the_version_before_load(learn):
    """Their keys, written out: the model's under ``module.``, the step sizes under ``inner_lr.``."""
    sizes = ["value"] if learn in (False, "scalar") else [n for n in CONV4 if n.endswith(("weight", "bias"))]
    wrapper = L2GWrapper(network(), 0.1, learn_inner_lr=learn)
    keys = {f"module.{name}" for name in CONV4} | {f"inner_lr.{name}" for name in sizes}
    assert set(wrapper.state_dict()) == keys
    state = {key: torch.full_like(value, 2) for key, value in wrapper.state_dict().items()}
    assert wrapper.load_state_dict(state, strict=True) is not None
    assert all((value == 2).all() for value in wrapper.module.state_dict().values())
    assert (wrapper.inner_lr(CONV4[0]) == 2).all()


def test_a_task_is_a_tuple_of_five():
    task = random_task(IMAGE)
    assert Task(*task) == task and Task.of(task) is task
