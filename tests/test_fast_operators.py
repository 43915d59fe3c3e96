"""Operators with a fast double backward: equal to PyTorch's own and to finite differences, in every shape and mode."""

import copy
import itertools
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from l2g_meta import Conv4, L2GWrapper, MetricModel, PrototypicalHead, Task, operators
from l2g_meta.inner import twice_differentiable
from l2g_meta.models.batchnorm_policy import batchnorm_policy
from l2g_meta.models.blocks import BatchNormReLU2d, ConvBlock
from l2g_meta.models.heads import HEADS
from l2g_meta.models.metric import build_head, feature_shape
from l2g_meta.operators import norm_passes
from l2g_meta.operators.batch_norm import batch_norm
from l2g_meta.operators.convolution import Geometry, conv2d
from l2g_meta.operators.group_norm import group_norm
from l2g_meta.training.objectives import OBJECTIVES, meta_gradient

FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
MAPS = [(3, 2, 4, 4), (2, 2, 5, 3)]
CASES = [(shape, s, "contiguous") for shape in [(5, 2), (3, 2, 3), (2, 2, 2, 3, 2)] for s in ("",)]
CASES += list(itertools.product(MAPS, ["", "relu", "pool", "relu pool"], FORMATS))
GEOMETRIES = [
    Geometry((1, 1), (1, 1), (1, 1), groups=1),
    Geometry((2, 1), (0, 1), (1, 2), groups=1),
    Geometry((1, 1), (1, 1), (1, 1), groups=2),
]
OPTIONS = [
    {},
    {"fast": False},
    {"first_order": True},
    {"inner_steps": 2},
    {"learn_inner_lr": "element"},
    {"mix": 0.5, "learn_inner_lr": "scalar"},
    {"mix": 0.5, "inner_steps": 2, "learn_inner_lr": "tensor"},
    {"mix": 0.5, "first_order": True},
    {"adapt": ["encoder.blocks.3"]},
    {"adapt": ["encoder.blocks.3"], "mix": 0.5},
    {"adapt": ["encoder.blocks.3"], "mix": 0.5, "first_order": True},
]
OURS = {"_NormBackward", "_GroupNormBackward", "_ConvBackward"}  # nodes of the graph


def ours(*outputs):
    """Which of our operators a graph has."""
    nodes, found = [t.grad_fn for t in outputs if t.grad_fn is not None], set()
    while nodes:
        node = nodes.pop()
        if node not in found:
            found.add(node)
            nodes += [n for n, _ in node.next_functions if n is not None]
    return {node.name() for node in found} & OURS


def with_and_without(layer, x):
    """Values, strides, gradients and state of a layer of PyTorch's, in the mode and outside of it.

    Returns:
        Both, and which of our operators ran in the mode.
    """
    found, ran = [], set()
    for p in layer.parameters():
        nn.init.uniform_(p, 0.5, 2.0)
    for mode in (twice_differentiable, nullcontext):
        module, results = copy.deepcopy(layer), []
        for scale in (1.0, 3.0, 0.5):
            leaves = [(scale * x + scale).requires_grad_(), *module.parameters()]
            with mode():
                y = module(leaves[0])
            ran |= ours(y) if mode is twice_differentiable else set()
            first = torch.autograd.grad(y.exp().sum(), leaves, create_graph=True)
            second = torch.autograd.grad(sum((g**3).sum() for g in first), leaves, materialize_grads=True)
            strides = torch.tensor(y.stride()) if y.numel() else torch.zeros(())
            results += [y, strides, *first, *second, copy.deepcopy(module.state_dict())]
        found.append(results)
    return *found, ran


def leaf(*shape, dtype=torch.float64, memory_format=torch.contiguous_format):
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()


def plain_norm(x, w, b, eps=1e-5, relu=False, pool=False):
    """Batch normalisation spelled out: PyTorch's own operator has no third derivative."""
    dims, shape = [d for d in range(x.ndim) if d != 1], [1, -1] + [1] * (x.ndim - 2)
    centred = x - x.mean(dims, keepdim=True)
    y = centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt() * w.view(shape) + b.view(shape)
    y = y.relu() if relu else y
    return F.max_pool2d(y, 2) if pool else y


def derivatives(function, inputs, orders=3):
    """Gradients of a chain of scalar functions, one more order each, all concatenated."""
    outputs, found = function(*inputs), []
    for _ in range(orders):
        weights = [torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view(t.shape) / t.numel() for t in outputs]
        total = sum((w * t + w * t.square() / 2).sum() for w, t in zip(weights, outputs, strict=True))
        outputs = torch.autograd.grad(total, inputs, create_graph=True, materialize_grads=True)
        found += outputs
    return found


class TestBatchNorm:
    @pytest.mark.parametrize("shape, steps, layout", CASES)
    def test_derivatives_to_third_order(self, shape, steps, layout):
        torch.manual_seed(0)
        options = {"relu": "relu" in steps, "pool": "pool" in steps}
        inputs = leaf(*shape, memory_format=FORMATS[layout]), leaf(2), leaf(2)

        def fast(x, w, b):
            return batch_norm(x, w, b, **options)

        assert torch.autograd.gradcheck(fast, inputs)
        assert torch.autograd.gradgradcheck(fast, inputs)
        found = derivatives(lambda *t: [fast(*t)], inputs)
        expected = derivatives(lambda *t: [plain_norm(*t, **options)], inputs)
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e, rtol=1e-8, atol=1e-10)

    @pytest.mark.parametrize("shape, steps, layout", CASES)
    def test_the_kernels_are_the_closed_form_as_written(self, shape, steps, layout):
        """With the graph of a graph asked for, the readable formula runs; without, the kernels."""
        torch.manual_seed(1)
        inputs = leaf(*shape, memory_format=FORMATS[layout]), leaf(2), leaf(2)
        y = batch_norm(*inputs, relu="relu" in steps, pool="pool" in steps)
        first = torch.autograd.grad(y.cos().sum(), inputs, create_graph=True)
        total = sum((t**3).sum() for t in first)
        kernels = torch.autograd.grad(total, inputs, retain_graph=True)
        readable = torch.autograd.grad(total, inputs, create_graph=True)
        for k, r in zip(kernels, readable, strict=True):
            assert r.requires_grad and not k.requires_grad
            torch.testing.assert_close(k, r, rtol=1e-10, atol=1e-11)

    @pytest.mark.parametrize(
        "stock, x",
        [
            (nn.BatchNorm1d(4), torch.randn(6, 4)),
            (nn.BatchNorm1d(4, affine=False), torch.randn(3, 4, 5)),
            (nn.BatchNorm2d(4), torch.randn(3, 4, 5, 6)),
            (nn.BatchNorm2d(4, momentum=None), torch.randn(3, 4, 5, 6)),
            (nn.BatchNorm2d(4, momentum=0.5, eps=0.1), torch.randn(3, 4, 5, 6)),
            (nn.BatchNorm2d(4, affine=False), torch.randn(3, 4, 5, 6).contiguous(memory_format=torch.channels_last)),
            (nn.BatchNorm2d(4, track_running_stats=False), torch.randn(3, 4, 5, 6)),
            (nn.BatchNorm3d(4), torch.randn(2, 4, 2, 3, 3)),
        ],
        ids=lambda value: repr(value) if isinstance(value, nn.Module) else "",
    )
    def test_drop_in_for_the_stock_layers(self, stock, x):
        """Values, strides, gradients to second order, running statistics over several passes, state dict."""
        stock = copy.deepcopy(stock).double()
        fast, plain, ran = with_and_without(stock, x.double())
        torch.testing.assert_close(fast, plain)
        assert ran == {"_NormBackward"} and list(fast[-1]) == list(stock.state_dict())
        with twice_differentiable():
            assert ours(stock.eval()(x.double())) == set() or not stock.track_running_stats
            with batchnorm_policy(stock, "batch"):
                found = stock(x.double().requires_grad_())
                assert ours(found) == {"_NormBackward"}
        with batchnorm_policy(stock, "batch"):
            torch.testing.assert_close(found, stock(x.double()))

    @pytest.mark.parametrize(
        "options", [{"affine": False}, {"momentum": None}, {"track_running_stats": False}], ids=str
    )
    def test_second_derivatives_without_scales_or_statistics(self, options):
        norm = nn.BatchNorm2d(2, **options).double()

        def fast(x):
            with twice_differentiable():
                return norm(x)

        assert ours(fast(leaf(3, 2, 3, 2))) == {"_NormBackward"}
        assert torch.autograd.gradgradcheck(fast, (leaf(3, 2, 3, 2),))

    @pytest.mark.parametrize(
        "x, options, need",
        [
            (torch.randint(0, 9, (4, 3, 2, 2)), {}, "floating-point inputs"),
            (torch.randn(4), {}, "floating-point inputs"),
            (torch.randn(4, 3, 5), {"pool": True}, "need maps .* to pool"),
        ],
        ids=["integers", "one dimension", "no map"],
    )
    def test_what_is_no_batch_of_maps_is_refused(self, x, options, need):
        with pytest.raises(ValueError, match=need):
            batch_norm(x, **options)

    def test_one_value_per_channel_is_refused_as_by_pytorch(self):
        for norm, mode in ((nn.BatchNorm2d(3), False), (nn.BatchNorm2d(3), True), (BatchNormReLU2d(3), False)):
            with twice_differentiable() if mode else nullcontext():
                with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
                    norm(torch.randn(1, 3, 1, 1))
                with pytest.raises(ValueError, match="expected 4D input"):
                    norm(torch.randn(2, 3))
        with twice_differentiable():
            assert nn.BatchNorm1d(3).eval()(torch.randn(1, 3)).shape == (1, 3)

    @pytest.mark.parametrize("steps", ["", "relu", "pool", "relu pool"])
    @pytest.mark.parametrize("affine", [True, False])
    def test_an_empty_batch_as_in_pytorch(self, affine, steps):
        """Values, gradients, second derivatives and buffers; the batch counts, its statistics do not."""
        parts = [nn.BatchNorm2d(3, affine=affine)]
        parts += [nn.ReLU()] * ("relu" in steps) + [nn.MaxPool2d(2)] * ("pool" in steps)
        stock = nn.Sequential(*parts)
        fast = copy.deepcopy(stock)
        if "relu" in steps:
            fast = nn.Sequential(BatchNormReLU2d(3, pool="pool" in steps, affine=affine))
        found = []
        for layer, mode in ((stock, nullcontext()), (fast, twice_differentiable())):
            x = torch.randn(0, 3, 4, 4, requires_grad=True)
            with mode:
                y = layer(x)
            first = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()], create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, *layer.parameters()])
            found.append([y, *first, *second, layer[0].state_dict()])
        torch.testing.assert_close(*found)
        assert found[0][-1]["num_batches_tracked"] == 1 and found[0][-1]["running_var"].tolist() == [1.0] * 3

    @pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
    @pytest.mark.parametrize("channels", [2, 6])
    def test_another_number_of_channels_is_refused_as_by_pytorch(self, channels, options):
        norm = nn.BatchNorm2d(4, **options)
        for mode in (nullcontext(), twice_differentiable()):
            with mode, pytest.raises(RuntimeError, match=f"should contain {channels} elements not 4"):
                norm(torch.randn(3, channels, 5, 5))

    def test_gradients_may_be_written_to_before_the_second_pass(self):
        """As clipping by hand does; PyTorch's operator takes it."""
        x, found = torch.randn(4, 3, 4, 4, dtype=torch.float64), []
        for norm in (batch_norm, lambda x, w: F.batch_norm(x, None, None, w, training=True)):
            w = torch.linspace(0.5, 2, 3, dtype=torch.float64).requires_grad_()
            (g,) = torch.autograd.grad(norm(x, w).sin().sum(), w, create_graph=True)
            found.append(torch.autograd.grad(g.mul_(2).square().sum(), w)[0])
        torch.testing.assert_close(*found)

    @pytest.mark.parametrize("mean", [0, 3, 30, 1000])
    @pytest.mark.parametrize("shape", [(40, 6, 21, 21), (64, 5), (3, 4, 7)])
    def test_statistics_are_exact_far_from_zero(self, shape, mean):
        """Contiguous maps have a pass of their own, which would lose digits where the mean is large."""
        x, dims = torch.randn(shape) + mean, [d for d in range(len(shape)) if d != 1]
        ours, stock = ([torch.zeros(shape[1]), torch.ones(shape[1])] for _ in range(2))
        y = batch_norm(x, running_mean=ours[0], running_var=ours[1])
        F.batch_norm(x, *stock, training=True)
        torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6)
        centred = x.double() - x.double().mean(dims, keepdim=True)
        expected = centred / (centred.square().mean(dims, keepdim=True) + 1e-5).sqrt()
        assert (y - expected).abs().max() < 1e-5 * max(1, mean)

    def test_negative_and_zero_scales_pool_the_right_value(self):
        torch.manual_seed(0)
        block = BatchNormReLU2d(3, pool=True).double()
        plain = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)).double()
        for norm in (block, plain[0]):
            norm.weight.data = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
            norm.bias.data = torch.tensor([0.2, 0.1, -0.3], dtype=torch.float64)
        x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
        torch.testing.assert_close(block(x), plain(x))


class TestGroupNorm:
    @pytest.mark.parametrize("shape, groups", [((3, 4), 2), ((2, 6, 3), 3), ((2, 4, 2, 3), 1), ((1, 2, 2, 2, 2), 2)])
    def test_derivatives_to_third_order(self, shape, groups):
        inputs = leaf(*shape), leaf(shape[1]), leaf(shape[1])
        assert torch.autograd.gradcheck(lambda x, w, b: group_norm(x, groups, w, b), inputs)
        assert torch.autograd.gradgradcheck(lambda x, w, b: group_norm(x, groups, w, b), inputs)

        def plain(x, w, b):
            rows = x.view(len(x), groups, -1)
            y = (rows - rows.mean(2, True)) * (rows.var(2, correction=0, keepdim=True) + 1e-5).rsqrt()
            per_channel = [-1] + [1] * (x.ndim - 2)
            return [w.view(per_channel) * y.view(x.shape) + b.view(per_channel)]

        found = derivatives(lambda x, w, b: [group_norm(x, groups, w, b)], inputs)
        for f, e in zip(found, derivatives(plain, inputs), strict=True):
            torch.testing.assert_close(f, e, rtol=1e-8, atol=1e-10)

    @pytest.mark.parametrize(
        "stock, shape, layout",
        [
            (nn.GroupNorm(2, 6), (3, 6, 4, 5), "contiguous"),
            (nn.GroupNorm(3, 6, affine=False), (3, 6, 4, 5), "channels-last"),
            (nn.GroupNorm(1, 4, eps=0.1), (2, 4), "contiguous"),
            (nn.GroupNorm(4, 4), (2, 4, 3), "contiguous"),
            (nn.GroupNorm(4, 4), (2, 4, 1), "contiguous"),  # one value each
            (nn.GroupNorm(2, 4), (0, 4, 3), "contiguous"),
        ],
        ids=str,
    )
    def test_drop_in_for_the_stock_layers(self, stock, shape, layout):
        """Values, strides, gradients to second order, state dict."""
        x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=FORMATS[layout])
        fast, plain, ran = with_and_without(copy.deepcopy(stock).double(), x)
        torch.testing.assert_close(fast, plain)
        assert ran == ({"_GroupNormBackward"} if x.shape[1:].numel() > stock.num_groups and len(x) else set())

    def test_one_group_is_layer_norm_and_one_per_channel_instance_norm(self):
        x = torch.randn(5, 6, 4, 3, dtype=torch.float64)
        torch.testing.assert_close(group_norm(x, 1), F.layer_norm(x, x.shape[1:]))
        torch.testing.assert_close(group_norm(x, 6), F.instance_norm(x))
        torch.testing.assert_close(group_norm(x, 3)[2:4], group_norm(x[2:4], 3))

    def test_what_pytorch_refuses_is_refused_alike(self):
        for mode in (False, True):
            with twice_differentiable() if mode else nullcontext():
                with pytest.raises(RuntimeError, match="to be a vector of size equal to the number of channels"):
                    nn.GroupNorm(2, 4)(torch.randn(2, 6, 3))
                with pytest.raises(RuntimeError, match="at least 2 dimensions"):
                    nn.GroupNorm(2, 4)(torch.randn(4))
                with pytest.raises(ValueError, match="more than 1 value per channel"):
                    nn.GroupNorm(4, 4)(torch.randn(1, 4))


NORMS = [nn.BatchNorm2d(8), nn.GroupNorm(2, 8)]


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: type(norm).__name__)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.04), (torch.float16, 4e-3)])
def test_other_dtypes_against_float64(norm, dtype, tolerance, layout):
    """Relative error of value, gradient and second derivative: float32 1e-4, bfloat16 4 %, float16 0.4 %."""
    torch.manual_seed(0)
    x = (torch.randn(16, 8, 10, 10) * 2 + 1).contiguous(memory_format=FORMATS[layout]).to(dtype)
    norm = copy.deepcopy(norm).double()
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    c = torch.randn(x.shape).to(dtype).double()

    def run(norm, x):
        x = x.detach().requires_grad_()
        with twice_differentiable():
            y = norm(x)
        assert ours(y)
        first = torch.autograd.grad((y.double() * c).sin().sum(), x, create_graph=True)[0]
        second = torch.autograd.grad((first.double() * c).square().sum(), [x, norm.weight])
        return y, first, *second

    expected = run(norm, x.double())
    for parameters in (dtype, torch.float32):
        for found, e in zip(run(copy.deepcopy(norm).to(parameters), x), expected, strict=True):
            assert found.dtype in (dtype, parameters)
            assert (found.double() - e).norm() < tolerance * e.norm()


class TestConv:
    @pytest.mark.parametrize("layout", FORMATS)
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("geometry", GEOMETRIES)
    def test_derivatives_to_third_order(self, geometry, bias, layout):
        torch.manual_seed(0)
        x = leaf(2, 2, 5, 5, memory_format=FORMATS[layout])
        inputs = (x, leaf(4, 2 // geometry.groups, 3, 3)) + ((leaf(4),) if bias else ())

        def fast(x, w, b=None):
            return conv2d(x, w, b, geometry)

        assert torch.autograd.gradcheck(fast, inputs)
        assert torch.autograd.gradgradcheck(fast, inputs)
        found = derivatives(lambda *t: [fast(*t)], inputs)
        expected = derivatives(lambda x, w, b=None: [torch.conv2d(x, w, b, *geometry)], inputs)
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-11)

    def test_images_need_no_gradient(self):
        """The first layer: no input gradient is computed, the second derivative is the same."""
        x, w = torch.randn(2, 2, 5, 5).double(), leaf(3, 2, 3, 3)
        found = derivatives(lambda w: [conv2d(x, w)], [w])
        expected = derivatives(lambda w: [torch.conv2d(x, w)], [w])
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize(
        "stock",
        [
            nn.Conv2d(2, 4, 3, padding="same"),
            nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"),
            nn.Conv2d(2, 4, (3, 1), stride=2, dilation=(1, 2), groups=2),
        ],
        ids=str,
    )
    def test_drop_in_for_the_stock_layer(self, stock):
        stock = stock.double()
        for x in (torch.randn(2, 2, 6, 6).double(), torch.randn(2, 6, 6).double()):
            fast, plain, ran = with_and_without(stock, x)
            torch.testing.assert_close(fast, plain)
            assert ran == (set() if x.ndim == 3 or stock.padding == "same" else {"_ConvBackward"})

    @pytest.mark.parametrize(
        "call",
        [
            lambda x, w: F.conv2d(x, w, None, 2),
            lambda x, w: torch.conv2d(x, w, stride=(1, 2), padding=[1]),
            lambda x, w: F.conv2d(input=x, weight=w, dilation=2, padding=(2, 1)),
            lambda x, w: F.conv2d(x, w, padding="valid"),
        ],
    )
    def test_arguments_as_people_write_them(self, call):
        torch.manual_seed(0)
        inputs, found = (leaf(2, 2, 7, 7), leaf(3, 2, 3, 3)), []
        for mode in (twice_differentiable(), nullcontext()):
            with mode:
                y = call(*inputs)
            found.append([y, *derivatives(lambda *_, y=y: [y], inputs, orders=2)])
        torch.testing.assert_close(*found)

    @pytest.mark.parametrize(
        "message, shape", [("to have 2 channels", (2, 3, 6, 6)), ("can't be greater", (2, 2, 1, 1))]
    )
    def test_what_pytorch_refuses_is_refused_alike(self, message, shape):
        for mode in (twice_differentiable(), nullcontext()):
            with mode, pytest.raises(RuntimeError, match=message):
                nn.Conv2d(2, 4, 3)(torch.randn(shape))

    @pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
    def test_complex_numbers_are_pytorchs_own(self, dtype):
        layer, found = nn.Conv2d(2, 4, 3, padding=1, dtype=dtype), []
        data = torch.randn(2, 2, 5, 5, dtype=dtype)
        for mode in (twice_differentiable(), nullcontext()):
            leaves = [data.clone().requires_grad_(), *layer.parameters()]
            with mode:
                y = layer(leaves[0])
            assert not ours(y)
            first = torch.autograd.grad((y * y).real.sum(), leaves, create_graph=True)
            found.append([y, *first, *torch.autograd.grad(sum(g.abs().square().sum() for g in first), leaves)])
        assert found[0][0].dtype == dtype
        torch.testing.assert_close(*found)

    def test_autocast_computes_in_bfloat16_and_differentiates_in_float32(self):
        layer, x = nn.Conv2d(2, 3, 3), torch.randn(2, 2, 6, 6)
        with torch.autocast("cpu", torch.bfloat16), twice_differentiable():
            y = layer(x)
        assert y.dtype == torch.bfloat16 and ours(y)
        (gradient,) = torch.autograd.grad(y.float().square().sum(), layer.weight, create_graph=True)
        assert gradient.dtype == torch.float32
        (second,) = torch.autograd.grad(gradient.square().sum(), layer.weight)
        reference = copy.deepcopy(layer).double()
        exact = torch.autograd.grad(reference(x.double()).square().sum(), reference.weight, create_graph=True)[0]
        exact = torch.autograd.grad(exact.square().sum(), reference.weight)[0]
        assert (second - exact).norm() < 0.03 * exact.norm()


class TestSelection:
    """ReLU and max-pooling: PyTorch's values and derivatives to third order, to the bit."""

    CALLS = {
        "relu": lambda x: F.relu(x),
        "in place": lambda x: F.relu(x * 2, inplace=True),
        "method": lambda x: (x * 2).relu_().relu(),
        "leaky": lambda x: F.leaky_relu(x, 0.1) + F.leaky_relu(x * 2, 0.2, inplace=True),
        "pool": lambda x: F.max_pool2d(x, 2),
        "overlapping": lambda x: F.max_pool2d(x, 3, 2, 1),
        "dilated": lambda x: F.max_pool2d(x, 2, 1, 0, 2, ceil_mode=True),
        "both": lambda x: nn.MaxPool2d(2)(nn.ReLU()(x)),
    }

    @pytest.mark.parametrize("layout", FORMATS)
    @pytest.mark.parametrize("name", CALLS)
    def test_derivatives_to_third_order(self, name, layout):
        torch.manual_seed(0)
        x = leaf(2, 3, 7, 6, memory_format=FORMATS[layout])

        def fast(x):
            with twice_differentiable():
                return self.CALLS[name](x)

        assert torch.autograd.gradcheck(fast, (x,)) and torch.autograd.gradgradcheck(fast, (x,))
        found = [derivatives(lambda x, f=f: [f(x)], [x]) + [f(x)] for f in (fast, self.CALLS[name])]
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class TestUnderTorchFunc:
    @pytest.mark.parametrize("pool", [False, True])
    def test_grad_of_grad_and_hessian_vector_products(self, pool):
        block = ConvBlock(2, 3, pool=pool).double()
        plain = ConvBlock(2, 3, pool=pool, fused=False).double()
        plain.load_state_dict(block.state_dict())
        x = torch.randn(3, 2, 6, 6, dtype=torch.float64)

        def meta(model):
            def loss(parameters):
                return torch.func.functional_call(model, parameters, x).square().sum()

            def outer(parameters):
                inner = torch.func.grad(loss)(parameters)
                return loss({name: p - 0.01 * inner[name] for name, p in parameters.items()})

            with batchnorm_policy(model, "batch"):  # buffers cannot be written under torch.func
                return torch.func.grad(outer)(dict(model.named_parameters()))

        torch.testing.assert_close(meta(block), meta(plain))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("method", OBJECTIVES)
@pytest.mark.parametrize("head", HEADS)
def test_fast_and_plain_give_the_same_meta_gradient(head, method, options):
    """Every head, objective and option, in float64: fused operators and the mode against stock layers without it."""
    torch.manual_seed(0)
    pools = 2 if head == "relation" else 4
    fast, plain = Conv4(1, 4, pools=pools), Conv4(1, 4, pools=pools, fused=False)
    shape = feature_shape(fast, (1, 18, 18))
    head_options = [{"fused": True}, {"fused": False}] if head == "relation" else [{}, {}]
    heads = [build_head(HEADS[head], shape, **o) for o in head_options]
    models = [MetricModel(encoder, h).double() for encoder, h in zip((fast, plain), heads, strict=True)]
    models[1].load_state_dict(models[0].state_dict())
    x, y = torch.randn(2, 9, 1, 18, 18, dtype=torch.float64), torch.arange(9) % 3
    tasks = [Task(x[k, :3], y[:3], x[k, 3:], y[3:], 3) for k in range(2)]
    batch = [tasks if method == "l2g" else tasks[:1]]
    wrappers = [L2GWrapper(m, 0.05, **o) for m, o in zip(models, (options, options | {"fast": False}), strict=True)]
    losses = [meta_gradient(OBJECTIVES[method], wrapper, batch).loss for wrapper in wrappers]
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    for (name, f), p in zip(wrappers[0].named_parameters(), wrappers[1].parameters(), strict=True):
        if p.grad is None:
            assert f.grad is None, name
        else:
            torch.testing.assert_close(f.grad, p.grad, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(dict(fast.named_buffers()), dict(plain.named_buffers()))
    for policy in ("running", "batch"):
        with batchnorm_policy(models[0], policy), batchnorm_policy(models[1], policy):
            torch.testing.assert_close(models[0](tasks[0]), models[1](tasks[0]))
            gradients = [
                torch.autograd.grad(OBJECTIVES[method](w, *batch[0]).loss, list(m.parameters()), allow_unused=True)
                for w, m in zip(wrappers, models, strict=True)
            ]
        for f, p in zip(*gradients, strict=True):
            torch.testing.assert_close(f, p, rtol=1e-8, atol=1e-10)


def test_where_our_operators_have_not_run_pytorchs_do(monkeypatch):
    """As on CUDA by default: the same state, scores and meta-gradient, from graphs that hold no operator of ours."""
    torch.manual_seed(0)
    ours = MetricModel(Conv4(1, 4), HEADS["prototypical"]()).double()
    theirs = copy.deepcopy(ours)
    x, y = torch.randn(2, 9, 1, 18, 18, dtype=torch.float64), torch.arange(9) % 3
    pair = [Task(x[k, :3], y[:3], x[k, 3:], y[3:], 3) for k in range(2)]
    meta_gradient(OBJECTIVES["l2g"], L2GWrapper(ours, 0.05), [pair])
    monkeypatch.setattr(operators, "DEVICES", ())
    wrapper, names, seen = L2GWrapper(theirs, 0.05), set(), [theirs(pair[0]).grad_fn]
    with twice_differentiable():
        seen.append(theirs(pair[0]).grad_fn)
    while seen:
        node = seen.pop()
        if node is not None:
            names.add(type(node).__name__)
            seen += [before for before, _ in node.next_functions]
    assert "NativeBatchNormBackward0" in names and not {n for n in names if n.startswith("_")}, names
    meta_gradient(OBJECTIVES["l2g"], wrapper, [pair])
    for (name, f), p in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(f.grad, p.grad, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


def test_sums_are_asked_for_as_cuda_can_give_them(monkeypatch):
    """CUDA's kernels take the type of a norm's sums from its scale: without one they fail, where a CPU's do not."""

    class Aten:
        def __getattr__(self, name):
            return getattr(torch.ops.aten, name)

        def native_batch_norm_backward(self, g, x, w, *rest):
            assert w is not None
            return torch.ops.aten.native_batch_norm_backward(g, x, w, *rest)

    monkeypatch.setattr(norm_passes, "aten", Aten())
    x = torch.randn(4, 2, 6, 6, requires_grad=True)
    for y in (batch_norm(x), batch_norm(x, relu=True, pool=True), group_norm(x, 2)):
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        torch.autograd.grad(g.square().sum(), x)


def test_fast_and_plain_agree_under_autocast_as_far_as_bfloat16_goes():
    torch.manual_seed(0)
    fast, plain = (MetricModel(Conv4(1, 16, fused=fused), PrototypicalHead()) for fused in (True, False))
    plain.load_state_dict(fast.state_dict())
    x, y = torch.randn(2, 20, 1, 32, 32), torch.arange(20) % 5
    tasks = [Task(x[k, :5], y[:5], x[k, 5:], y[5:], 5) for k in range(2)]
    exact, *rounded = (
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(L2GWrapper(m, 0.01, autocast=a)(*tasks), [*m.parameters()])]
        )
        for m, a in ((plain, None), (fast, torch.bfloat16), (plain, torch.bfloat16))
    )
    errors = [((r - exact).norm() / exact.norm()).item() for r in rounded]
    assert 1e-4 < errors[0] < max(1.5 * errors[1], 0.05) and errors[1] < 0.5


def test_a_users_own_network_as_it_is():
    """A residual network of stock layers: the same meta-gradient with the mode as without."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(1, 4, 3, stride=2, bias=True)
            self.norm = nn.BatchNorm2d(4)
            self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
            self.out = nn.BatchNorm2d(4)

        def forward(self, x):
            x = F.gelu(self.norm(self.stem(x)))
            return (x + self.out(self.conv(x))).mean((2, 3))

    torch.manual_seed(0)
    plain = MetricModel(Residual(), HEADS["prototypical"]()).double()
    fast = copy.deepcopy(plain)
    x, y = torch.randn(2, 9, 1, 10, 10, dtype=torch.float64), torch.arange(9) % 3
    pair = [Task(x[k, :3], y[:3], x[k, 3:], y[3:], 3) for k in range(2)]
    for model in (fast, plain):
        meta_gradient(OBJECTIVES["l2g"], L2GWrapper(model, 0.1, inner_steps=2, fast=model is fast), [pair])
    for (name, f), p in zip(fast.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(f.grad, p.grad, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(fast.state_dict(), plain.state_dict())


@pytest.mark.parametrize("lazy", [nn.LazyBatchNorm2d(), nn.LazyConv2d(4, 3)], ids=lambda m: type(m).__name__)
def test_lazy_layers_get_their_parameters_in_the_mode(lazy):
    with twice_differentiable():
        assert ours(lazy(torch.randn(2, 3, 5, 5)))
    assert not any(nn.parameter.is_lazy(p) for p in lazy.parameters())
