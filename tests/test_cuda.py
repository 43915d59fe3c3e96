"""What a GPU must compute as a CPU in float64 does; `make gpu` runs it, and with CPU=1 each step of it on a CPU."""

import copy
import os
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from l2g_meta import Conv4, L2GWrapper, MetricModel, PrototypicalHead, operators
from l2g_meta.data import host as placement
from l2g_meta.data.augment import Augment
from l2g_meta.data.dataset import ClassDataset
from l2g_meta.data.pairs import TaskPairs
from l2g_meta.evaluation.world import join, shutdown
from l2g_meta.inner.second_order import twice_differentiable
from l2g_meta.models.heads import HEADS
from l2g_meta.models.libraries import torchvision_encoder
from l2g_meta.models.metric import build_head, feature_shape
from l2g_meta.operators.batch_norm import batch_norm
from l2g_meta.operators.convolution import Geometry, conv2d
from l2g_meta.operators.group_norm import group_norm
from l2g_meta.operators.selection import max_pool2d, relu
from l2g_meta.testing import random_task
from l2g_meta.training.objectives import l2g, meta_gradient

DEVICE = os.environ.get("L2G_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
IMAGES = np.random.default_rng(0).integers(0, 256, (72, 16, 16, 1), dtype=np.uint8)
DATA = ClassDataset(IMAGES, np.arange(72) // 6)


@pytest.fixture(autouse=True)
def _float32_products():
    """PyTorch lets convolutions use TF32 unless told otherwise."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    allow_tf32(False)
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def allow_tf32(yes):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = yes


@pytest.fixture
def deterministic(monkeypatch):
    """What the same bits are claimed for."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def error(found, expected):
    """Relative, of all tensors together, in float64 on the CPU."""
    found, expected = (torch.cat([t.detach().double().cpu().flatten() for t in ts]) for ts in (found, expected))
    return ((found - expected).norm() / expected.norm()).item()


def cosine(found, expected):
    return torch.cosine_similarity(
        *(torch.cat([t.double().cpu().flatten() for t in ts]) for ts in (found, expected)), 0
    )


def derivatives(function, inputs):
    """Values, gradients of a scalar of them, and gradients of a scalar of those."""
    ramp = lambda t: torch.linspace(-1, 2, t.numel(), dtype=torch.float64).view(t.shape).to(t)  # noqa: E731
    y = function(*inputs)
    first = torch.autograd.grad((ramp(y) * y.sin()).sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum((ramp(g) * g.square()).sum() for g in first), inputs)
    return [y, *first, *second]


def stock_norm(x, w, b, relu=False, pool=False):
    y = F.batch_norm(x, None, None, w, b, training=True)
    y = y.relu() if relu else y
    return F.max_pool2d(y, 2) if pool else y


STRIDED = Geometry((2, 1), (0, 1), (1, 2), groups=2)
OVERLAPPING = [3, 3], [2, 2], [1, 1], [1, 1]  # ResNet's
OPERATORS = {  # ours, PyTorch's, shape of its weights; the name up to a comma is PyTorch's
    "conv2d": (lambda *t: conv2d(*t, Geometry(padding=(1, 1))), lambda *t: F.conv2d(*t, padding=1), (8, 6, 3, 3)),
    "conv2d, strided": (lambda *t: conv2d(*t, STRIDED), lambda *t: F.conv2d(*t, *STRIDED), (8, 3, 3, 3)),
    "batch_norm": (batch_norm, stock_norm, (6,)),
    "batch_norm, relu": (lambda *t: batch_norm(*t, relu=True), lambda *t: stock_norm(*t, relu=True), (6,)),
    "batch_norm, relu, pool": (
        lambda *t: batch_norm(*t, relu=True, pool=True), lambda *t: stock_norm(*t, relu=True, pool=True), (6,),
    ),
    "group_norm": (lambda x, w, b: group_norm(x, 3, w, b), lambda x, w, b: F.group_norm(x, 3, w, b), (6,)),
    "relu": (relu, torch.relu, None),
    "relu_": (lambda x: relu(1 * x, inplace=True), torch.relu, None),
    "leaky_relu": (lambda x: relu(x, 0.1), lambda x: F.leaky_relu(x, 0.1), None),
    "leaky_relu, in place": (lambda x: relu(1 * x, 0.1, inplace=True), lambda x: F.leaky_relu(x, 0.1), None),
    "max_pool2d": (lambda x: max_pool2d(x, [2, 2], [2, 2], [0, 0], [1, 1]), lambda x: F.max_pool2d(x, 2), None),
    "max_pool2d, overlapping": (
        lambda x: max_pool2d(x, *OVERLAPPING, True), lambda x: F.max_pool2d(x, 3, 2, 1, 1, True), None,
    ),
}  # fmt: skip


def inputs(shape):
    """Maps, and weights of that shape with a bias, if any."""
    weights = [] if shape is None else [torch.randn(shape), torch.randn(shape[0])]
    return [t.double() for t in (torch.randn(4, 6, 9, 8), *weights)]


class TestOperators:
    @pytest.mark.parametrize("dtype, most", [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["float64", "float32"])
    @pytest.mark.parametrize("layout", FORMATS)
    @pytest.mark.parametrize("name", OPERATORS)
    def test_equal_to_pytorchs_on_the_cpu_to_second_order(self, name, layout, dtype, most):
        ours, stock, shape = OPERATORS[name]
        given = inputs(shape)
        given[0] = given[0].contiguous(memory_format=FORMATS[layout])
        expected = derivatives(stock, [t.clone().requires_grad_() for t in given])
        found = derivatives(ours, [t.to(DEVICE, dtype, copy=True).requires_grad_() for t in given])
        for f, e in zip(found, expected, strict=True):
            assert f.device.type == DEVICE and error([f], [e]) < most

    @pytest.mark.parametrize("layout", FORMATS)
    def test_running_statistics(self, layout):
        x = torch.randn(4, 6, 9, 8).contiguous(memory_format=FORMATS[layout])
        found, expected = ([torch.zeros(6, device=d), torch.ones(6, device=d)] for d in (DEVICE, "cpu"))
        for scale in (1.0, 3.0):
            batch_norm(scale * x.to(DEVICE) + 1, running_mean=found[0], running_var=found[1])
            F.batch_norm(scale * x + 1, *expected, training=True)
        assert error(found, expected) < 1e-5


def network(name, head):
    """A network, its images' shape, and one that leaves maps for the relation head."""
    maps = head == "relation"
    if name == "Conv4":
        return Conv4(3, 8, pools=2 if maps else 4), (3, 28, 28)
    pytest.importorskip("torchvision")
    net = torchvision_encoder("resnet18", 3, {})
    return (nn.Sequential(*list(net.children())[:6]) if maps else net), (3, 32, 32)


def gradient(model, tasks, device, *, dtype=torch.float64, inner_lr=0.05, **options):
    """The meta-gradient of a copy of the model there."""
    wrapper = L2GWrapper(copy.deepcopy(model), inner_lr, **options).to(device, dtype)
    cast = [t._replace(support_x=t.support_x.to(dtype), query_x=t.query_x.to(dtype)).to(device) for t in tasks]
    meta_gradient(l2g, wrapper, [cast])
    return [p.grad for p in wrapper.parameters() if p.grad is not None]


class TestMetaGradient:
    @pytest.mark.parametrize("way", ["mode", "mode, channels-last", "stock"])
    @pytest.mark.parametrize("net", ["Conv4", "ResNet-18"])
    @pytest.mark.parametrize("head", HEADS)
    def test_equal_to_the_cpus(self, head, net, way):
        encoder, shape = network(net, head)
        model = MetricModel(encoder, build_head(HEADS[head], feature_shape(encoder, shape)))
        tasks = [random_task(shape, n_way=3, queries=2) for _ in range(2)]
        expected = gradient(model, tasks, "cpu", fast=False)
        if "channels-last" in way:
            model.to(memory_format=torch.channels_last)
        assert error(gradient(model, tasks, DEVICE, fast=way != "stock"), expected) < 1e-7

    @pytest.mark.parametrize("options", [{"inner_steps": 2}, {"mix": 0.5}, {"learn_inner_lr": "element"}], ids=str)
    def test_options(self, options):
        model, tasks = MetricModel(Conv4(3, 8), PrototypicalHead()), [random_task((3, 28, 28), n_way=3) for _ in "ij"]
        assert error(gradient(model, tasks, DEVICE, **options), gradient(model, tasks, "cpu", **options)) < 1e-9


class Attention(nn.Module):
    """Attention over pixels, weight norm and hardsigmoid: what is replaced whatever ``DEVICES`` says."""

    def __init__(self):
        super().__init__()
        self.conv = weight_norm(nn.Conv2d(3, 24, 4, stride=4))

    def forward(self, x):
        q, k, v = self.conv(x).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, -1)  # (n, 1, pixels, 8) each
        return F.hardsigmoid(F.scaled_dot_product_attention(q, k, v)).flatten(1)


def recurrent(x, *weights):
    """Outputs of an LSTM (n, t, h) for inputs (n, t, d)."""
    start = x.new_zeros(1, len(x), weights[1].shape[1])
    return torch.lstm(x, (start, start), weights, True, 1, 0.0, False, False, True)[0]


def stepwise(x, w, u, b, c):
    """The same by elementary operations."""
    h = state = x.new_zeros(len(x), u.shape[1])
    outputs = []
    for step in x.unbind(1):
        i, f, g, o = (step @ w.T + h @ u.T + b + c).chunk(4, 1)
        state = f.sigmoid() * state + i.sigmoid() * g.tanh()
        outputs.append(h := o.sigmoid() * state.tanh())
    return torch.stack(outputs, 1)


REPLACED = {  # in the mode; as elementary operations; shapes
    "hardsigmoid": (F.hardsigmoid, lambda x: (x + 3).clamp(0, 6) / 6, [(4, 6, 9, 8)]),
    "hardsigmoid, in place": (
        lambda x: F.hardsigmoid(1 * x, inplace=True), lambda x: (x + 3).clamp(0, 6) / 6, [(4, 6, 9, 8)],
    ),
    "weight norm": (
        lambda v, g: torch._weight_norm(v, g, 0),
        lambda v, g: v * g / v.square().sum((1, 2, 3), keepdim=True).sqrt(),
        [(6, 4, 3, 3), (6, 1, 1, 1)],
    ),
    "attention": (
        F.scaled_dot_product_attention,
        lambda q, k, v: (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v,
        [(2, 4, 16, 32)] * 3,
    ),
    "lstm": (recurrent, stepwise, [(3, 5, 4), (24, 4), (24, 6), (24,), (24,)]),
}  # fmt: skip


class TestByDefault:
    """As on CUDA without ``L2G_FAST_CUDA=1``: PyTorch's operators, but for second derivatives that it lacks."""

    @pytest.fixture(autouse=True)
    def _default(self, monkeypatch):
        monkeypatch.setattr(operators, "DEVICES", ())

    @pytest.mark.parametrize("layout", FORMATS)
    @pytest.mark.parametrize("head", HEADS)
    def test_meta_gradients_of_all_heads(self, head, layout):
        encoder, shape = network("Conv4", head)
        model = MetricModel(encoder, build_head(HEADS[head], feature_shape(encoder, shape)))
        tasks = [random_task(shape, n_way=3, queries=2) for _ in "ij"]
        expected = gradient(model, tasks, "cpu", fast=False)
        assert error(gradient(model.to(memory_format=FORMATS[layout]), tasks, DEVICE), expected) < 1e-7

    @pytest.mark.parametrize("dtype, most", [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["float64", "float32"])
    @pytest.mark.parametrize("name", REPLACED)
    def test_what_is_replaced_to_second_order(self, name, dtype, most):
        function, elementary, shapes = REPLACED[name]
        given = [2 * torch.randn(shape).double() for shape in shapes]
        expected = derivatives(elementary, [t.clone().requires_grad_() for t in given])
        before = kernels()
        with twice_differentiable():
            assert kernels() == {"flash": False, "mem_efficient": False, "cudnn": False, "math": True}
            found = derivatives(function, [t.to(DEVICE, dtype, copy=True).requires_grad_() for t in given])
        assert kernels() == before and before["flash"]
        for f, e in zip(found, expected, strict=True):
            assert f.device.type == DEVICE and error([f], [e]) < most

    @pytest.mark.parametrize("dtype, most", [(torch.float64, 1e-9), (torch.float32, 1e-3)], ids=["float64", "float32"])
    def test_meta_gradient_of_a_network_of_them(self, dtype, most):
        model, tasks = MetricModel(Attention(), PrototypicalHead()), [random_task((3, 28, 28), n_way=3) for _ in "ij"]
        expected = gradient(model, tasks, "cpu")
        assert error(gradient(model, tasks, DEVICE, dtype=dtype), expected) < most


def kernels():
    """Which kernels attention may take."""
    kinds = "flash", "mem_efficient", "cudnn", "math"
    return {kind: getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in kinds}


class TestPrecision:
    """Lower precision points the same way, its Hessian term included."""

    def found(self, **options):
        model, tasks = MetricModel(Conv4(3, 16), PrototypicalHead()), [random_task((3, 28, 28), n_way=5) for _ in "ij"]
        expected, found = [], []
        for first_order in (False, True):
            expected.append(gradient(model, tasks, "cpu", inner_lr=0.1, first_order=first_order))
            low = {"dtype": torch.float32, "inner_lr": 0.1, "first_order": first_order}
            found.append(gradient(model, tasks, DEVICE, **low, **options))
        hessian = [[a - b for a, b in zip(*both, strict=True)] for both in (found, expected)]
        return found[0], expected[0], *hessian

    def test_float32(self):
        found, expected, *_ = self.found()
        assert error(found, expected) < 1e-3

    def test_tf32(self):
        allow_tf32(True)
        found, expected, hessian, exact = self.found()
        assert cosine(found, expected) > 0.95 and cosine(hessian, exact) > 0.9

    def test_bf16(self):
        found, expected, hessian, exact = self.found(autocast=torch.bfloat16)
        assert all(g.dtype == torch.float32 for g in found)
        assert cosine(found, expected) > 0.8 and cosine(hessian, exact) > 0.8


class TestRuns:
    @pytest.mark.filterwarnings("ignore:need .* GB on")
    def test_updates_from_host_memory_have_the_bits_of_resident_images(self, monkeypatch, deterministic):
        """Images are copied from pinned memory while the device is at work on those before."""
        states = []
        for free in (None, 0):
            monkeypatch.setattr(placement, "free_memory", lambda device, free=free: free)
            torch.manual_seed(0)
            wrapper = L2GWrapper(MetricModel(Conv4(1, 8), PrototypicalHead()), 0.05).to(DEVICE)
            optimizer = torch.optim.Adam(wrapper.parameters())
            pairs = TaskPairs(DATA, ways=3, shots=1, queries=4, seed=3, augment=Augment(2), device=DEVICE)
            assert (pairs.source.dataset.gathered_on is None) == (free is None)
            for k in range(8):
                optimizer.zero_grad()
                meta_gradient(l2g, wrapper, pairs.batch(range(2 * k, 2 * k + 2)))
                optimizer.step()
            states.append(wrapper.state_dict())
        assert all(torch.equal(states[1][name], value) for name, value in states[0].items())

    @pytest.mark.parametrize("options", [{}, {"precision": "bf16", "learn_inner_lr": "tensor"}], ids=str)
    def test_resuming_gives_the_same_bits(self, options, tmp_path, deterministic):
        for package in ("safetensors", "tqdm", "matplotlib"):
            pytest.importorskip(package)
        from l2g_meta.training.config import Config
        from l2g_meta.training.loop import train

        config = Config(
            ways=3, queries=2, pairs=2, iterations=4, eval_every=2, eval_episodes=4, augment=True, deterministic=True,
            device=DEVICE, **options,
        )  # fmt: skip
        given = {"data": DATA, "validation": DATA, "progress": False}
        whole = train(config, tmp_path / "whole", **given)
        train(replace(config, iterations=2), tmp_path / "parts", **given)
        resumed = train(config, tmp_path / "parts", resume=True, force=True, **given)
        assert next(whole.parameters()).device.type == DEVICE
        assert all(torch.equal(resumed.state_dict()[name], value) for name, value in whole.state_dict().items())


class TestProcesses:
    def test_two_give_the_gradient_of_one(self, tmp_path):
        if DEVICE == "cuda" and torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        for size in (1, 2):
            torch.multiprocessing.spawn(_update, (size, port, tmp_path), nprocs=size)
        one, two = (torch.load(tmp_path / f"{size}.pt", weights_only=True) for size in (1, 2))
        assert error(two, one) < 1e-10


def _update(rank, size, port, folder):
    """One update's meta-gradient on so many processes, saved by the first."""
    from l2g_meta.training.build import build_pairs
    from l2g_meta.training.config import Config
    from l2g_meta.training.update import Updater

    torch.set_num_threads(1)
    if size > 1:
        of_rank = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        os.environ |= {name: str(value) for name, value in of_rank.items()}
    world, device = join(torch.device(DEVICE))
    config = Config(ways=2, queries=2, pairs=3, iterations=1, device=DEVICE).resolved()
    torch.manual_seed(0)
    wrapper = L2GWrapper(MetricModel(Conv4(1, 8), PrototypicalHead()), 0.05).double().to(device)
    data = ClassDataset(torch.from_numpy(IMAGES).permute(0, 3, 1, 2).double() / 255, DATA.labels)
    optimizer = torch.optim.SGD(wrapper.parameters(), 0.0)
    update = Updater(config, l2g, wrapper, optimizer, build_pairs(config, data, device), world)
    assert update(0).finite and world.size == size
    if world.main:
        torch.save([p.grad.cpu() for p in wrapper.parameters()], folder / f"{size}.pt")
    shutdown()
