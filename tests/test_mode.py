"""``twice_differentiable()``: whole networks as they are, where it steps aside, and where it is off."""

import copy
import threading
from contextlib import nullcontext

import pytest
import torch
from test_fast_operators import ours
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from l2g_meta import L2GWrapper, MetricModel, PrototypicalHead, Task
from l2g_meta.inner import second_order, twice_differentiable
from l2g_meta.operators.batch_norm import batch_norm
from l2g_meta.training.objectives import l2g, meta_gradient


def pair_of(size, *, channels=3, ways=3, each=4):
    x, y = torch.randn(2, ways * each, channels, size, size, dtype=torch.float64), torch.arange(ways * each) % ways
    return [Task(x[k, :ways], y[:ways], x[k, ways:], y[ways:], ways) for k in (0, 1)]


def metric(encoder):
    return MetricModel(encoder, PrototypicalHead(distance="squared", dims="mean")).double()


def gradient(model, pair, **options):
    """The meta-gradient as one vector, of a copy; and that copy's buffers."""
    model = copy.deepcopy(model)
    meta_gradient(l2g, L2GWrapper(model, 0.05, **options), [pair])
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), dict(model.named_buffers())


def small():
    """Convolution, both norms, and a kink."""
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4)]
    return nn.Sequential(*layers, nn.Flatten())


class Hardsigmoid(nn.Module):
    """Of operators that have a second derivative."""

    def forward(self, x):
        return (x + 3).clamp(0, 6) / 6


def resnet18():
    from torchvision.models import resnet18

    encoder = resnet18(weights=None)
    encoder.fc = nn.Identity()
    return encoder


def mobilenet():
    from torchvision.models import mobilenet_v3_small

    encoder = mobilenet_v3_small(weights=None, dropout=0.0)
    encoder.classifier = nn.Identity()
    return encoder


def vit_tiny():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    return timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0)


def group_norms():
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 12, 3, groups=2)]
    return nn.Sequential(*layers, nn.GroupNorm(3, 12, affine=False), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())


def hard_activations():
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Hardswish(inplace=True), nn.Conv2d(4, 4, 3), nn.Hardsigmoid()
    return nn.Sequential(*layers, nn.Flatten())


class Checkpointed(nn.Module):
    """Its activations are computed again where a backward pass needs them; two of its layers write in place."""

    def __init__(self, on=True):
        super().__init__()
        self.body, self.on = nn.Sequential(*small()[:2], nn.ReLU(True), *small()[3:5], nn.SiLU(True), nn.Flatten()), on

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False) if self.on else self.body(x)


NETWORKS = {"torchvision ResNet-18": resnet18, "timm ViT-tiny": vit_tiny, "GroupNorm": group_norms}


class TestNetworksAsTheyAre:
    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
    def test_the_meta_gradient_is_that_of_stock_operators(self, network, channels_last):
        model, pair = metric(network()), pair_of(32)
        plain, statistics = gradient(model, pair, fast=False)
        fast, same = gradient(
            model.to(memory_format=torch.channels_last if channels_last else torch.preserve_format), pair
        )
        assert (fast - plain).norm() < 1e-10 * plain.norm()
        torch.testing.assert_close(same, statistics, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last, "a part of a map"])
    @pytest.mark.parametrize("inplace", [False, True])
    @pytest.mark.parametrize("window", [(2,), (3, 2, 1), (2, 2, 0, 1, True)])
    def test_pooling_of_a_relu_of_a_norm(self, window, inplace, layout):
        """It differentiates as one operator, that agrees with three, whatever its window and the maps' layout."""
        x = torch.randn(5, 4, 9, 18, dtype=torch.float64)
        if isinstance(layout, str):
            x = x.contiguous(memory_format=torch.channels_last)[..., ::2]
        else:
            x = x[..., ::2].contiguous(memory_format=layout)
        w, b = torch.tensor([1.0, -2, 0, 0.5]).double(), torch.tensor([0.3, 0.1, -0.2, 0]).double()
        leaves = [t.requires_grad_() for t in (x.detach(), w, b)]

        def pooled(x, w, b):
            with twice_differentiable():
                return F.max_pool2d(F.relu(F.batch_norm(x, None, None, w, b, True), inplace=inplace), *window)

        y = pooled(*leaves)
        fused = "_Norm" in type(y.grad_fn).__name__
        assert fused == (not isinstance(layout, str))
        centred = leaves[0] - leaves[0].mean((0, 2, 3), keepdim=True)  # PyTorch's has no third derivative
        normed = centred * (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).rsqrt()
        stock = F.max_pool2d((w[:, None, None] * normed + b[:, None, None]).relu(), *window)
        torch.testing.assert_close(y, stock, check_stride=True)
        found = []
        own = [batch_norm(leaves[0], w, b, relu=True, pool=True)] if window == (2,) else []
        for out in (y, stock, *own):
            v, generator = torch.linspace(1, 2, out.numel()).double().view(out.shape), torch.Generator().manual_seed(0)
            first = torch.autograd.grad((out * v).square().sum(), leaves, create_graph=True)
            at = [torch.randn(g.shape, dtype=g.dtype, generator=generator) for g in first]
            second = torch.autograd.grad(first, leaves, at, create_graph=True)
            third = torch.autograd.grad([s.square().sum() for s in second], leaves)
            found.append([*first, *second, *third])
        for derivatives in found:
            for a, e in zip(derivatives, found[1], strict=True):
                torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)

    def test_what_is_done_with_the_maps_of_a_pooled_norm(self):
        """Another use of a map, a write to what was pooled, a gradient that is kept and one that is changed."""

        def passes(x, w):
            y = F.batch_norm(x, None, None, w, None, True)
            z = F.relu(y)
            out = F.max_pool2d(z, 2)
            kept = F.relu(F.batch_norm(x * w[0], None, None, w, None, True))
            kept.retain_grad()
            changed = F.batch_norm(x * w[1], None, None, w, None, True)
            changed.register_hook(lambda g: 3 * g)
            alone = F.max_pool2d(x * w[0], 2).relu_()
            out = out.add_(1.0) + F.max_pool2d(kept, 2) + F.max_pool2d(changed.relu(), 2) + alone
            return out.square().sum() + y.sin().sum() + z.cos().sum(), kept

        x, w = torch.randn(3, 2, 4, 4).double().requires_grad_(), torch.tensor([0.5, 2.0]).double().requires_grad_()
        found = []
        for mode in (twice_differentiable, nullcontext):
            with mode():
                loss, kept = passes(x, w)
            first = torch.autograd.grad(loss, (x, w, kept), create_graph=True)
            found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, w))])
        for a, e in zip(*found, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("use", ["none", "the norm's map", "retained", "hook", "hook of a node", "hook of a norm"])
    def test_a_norm_is_pooled_as_one_only_where_nobody_looks_between(self, use):
        x, w = torch.randn(2, 3, 4, 4).double().requires_grad_(), torch.ones(3).double().requires_grad_()
        seen, kept = [], []
        with twice_differentiable():
            y = F.batch_norm(x, None, None, w, None, True)
            if use == "hook of a norm":
                y.register_hook(seen.append)
            z = F.relu(y)
            if use == "the norm's map":
                kept.append(y)
            if use == "retained":
                z.retain_grad()
            if use == "hook":
                z.register_hook(seen.append)
            if use == "hook of a node":
                z.grad_fn.register_prehook(lambda g: seen.append(g[0]))
            del y
            out = F.max_pool2d(z, 2)
        assert (type(out.grad_fn).__name__ == "_NormBackward") == (use == "none")
        out.sum().backward()
        assert len(seen) == use.startswith("hook") and (use != "retained" or z.grad is not None)

    def test_maps_that_were_changed_or_freed_before_they_are_pooled(self):
        """The error is PyTorch's, where it is an error; a pass without gradients has none."""
        w = torch.ones(3).double().requires_grad_()
        x = torch.randn(2, 3, 4, 4).double().requires_grad_()

        def normed(t):
            return F.relu(F.batch_norm(t, None, None, w, None, True))

        with twice_differentiable():
            z = normed(x)
            with torch.no_grad():
                z.add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                F.max_pool2d(z, 2).sum().backward()
            t = x * 1
            z = normed(t)
            t.add_(1)
            F.max_pool2d(z, 2)
            z = normed(x)
            z.sum().backward()
            with torch.no_grad():
                F.max_pool2d(z, 2)
            with pytest.raises(RuntimeError, match="a second time"):
                F.max_pool2d(z, 2).sum().backward()

    def test_a_graph_that_is_cut_between_norm_and_pooling(self):
        b, x = torch.zeros(3).double().requires_grad_(), torch.randn(2, 3, 4, 4).double()
        with twice_differentiable():
            z = F.relu(F.batch_norm(x, None, None, None, (c := b * 1), True))
            c.detach_()
            out = F.max_pool2d(z, 2)
        (g,) = torch.autograd.grad(out.sum(), b)
        y = F.max_pool2d(F.relu(F.batch_norm(x, None, None, None, b, True)), 2)
        torch.testing.assert_close(g, torch.autograd.grad(y.sum(), b)[0])

    def test_a_bias_that_is_changed_in_place(self):
        start, x = torch.zeros(3).double().requires_grad_(), torch.randn(2, 3, 4, 4).double()
        with twice_differentiable():
            b = start * 1
            z = F.relu(F.batch_norm(x, None, None, None, b, True))
            b.mul_(3)
            out = F.max_pool2d(z, 2)
        (g,) = torch.autograd.grad(out.sum(), start)
        y = F.max_pool2d(F.relu(F.batch_norm(x, None, None, None, start, True)), 2)
        torch.testing.assert_close(g, torch.autograd.grad(y.sum(), start)[0])

    def test_relus_that_write_without_a_graph(self):
        x = torch.tensor([-1.0, 2.0], requires_grad=True)
        with twice_differentiable():
            t = x * 3
            with torch.no_grad():
                assert F.relu(t, inplace=True) is t
            t.sum().backward()
            with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
                F.relu(x, inplace=True)
        assert x.grad.tolist() == [3, 3] and x.tolist() == [-1, 2]

    def test_relus_that_write_in_modes_within_modes(self):
        x = torch.randn(4).double().requires_grad_()
        with twice_differentiable(), twice_differentiable():
            y = F.relu(x * 1, inplace=True) + F.leaky_relu(x * 1, 0.1, inplace=True)
            z = F.leaky_relu(x * 1, 0.1)
            (y + z.mul_(2)).sum().backward()  # PyTorch's keeps its input
        one = torch.ones(4).double()
        expected = torch.where(x > 0, one, 0) + 3 * torch.where(x > 0, one, 0.1)
        torch.testing.assert_close(x.grad, expected)

    def test_mobilenet_v3_whose_hardsigmoid_has_no_second_derivative_in_pytorch(self):
        model, pair = metric(mobilenet()), pair_of(32)
        replaced = copy.deepcopy(model)
        for module in [*replaced.modules()]:
            for name, child in module.named_children():
                if isinstance(child, nn.Hardsigmoid):
                    setattr(module, name, Hardsigmoid())
        assert any(isinstance(m, Hardsigmoid) for m in replaced.modules())
        plain, statistics = gradient(replaced, pair, fast=False)
        for fast in (True, False):  # a second derivative that is missing comes either way
            found, same = gradient(model, pair, fast=fast)
            assert (found - plain).norm() < 1e-10 * plain.norm()
            torch.testing.assert_close(same, statistics, rtol=1e-10, atol=1e-10)
        x = torch.randn(3, dtype=torch.float64, requires_grad=True)
        (g,) = torch.autograd.grad(F.hardsigmoid(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="hardsigmoid_backward is not implemented"):
            g.sum().backward()

    @pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
    def test_recurrent_layers_run_without_cudnn_which_differentiates_them_once(self, kind, monkeypatch):
        seen, layer, x = [], kind(3, 4), torch.randn(2, 5, 3)
        expected = layer(x)[0]
        name = "rnn_tanh" if kind is nn.RNN else kind.__name__.lower()
        look = lambda *args: seen.append(torch.backends.cudnn.enabled) or getattr(torch, name)(*args)  # noqa: E731
        monkeypatch.setitem(second_order.MISSING, getattr(torch, name), second_order._without_cudnn(look))
        monkeypatch.setattr(torch.backends, "fp32_precision", "ieee")  # PyTorch's newer settings are not touched
        with twice_differentiable():
            assert torch.equal(layer(x)[0], expected)
        assert seen == [False] and torch.backends.cudnn.enabled

    def test_hardsigmoid_in_place(self):
        x = torch.linspace(-4, 4, 9, dtype=torch.float64)
        with twice_differentiable():
            y = x.clone()
            assert F.hardsigmoid(y, inplace=True) is y
            torch.testing.assert_close(y, Hardsigmoid()(x))

    @pytest.mark.parametrize(
        "options",
        [
            {"padding": "same"},
            {"padding": "same", "dilation": 2, "kernel_size": 2},
            {"padding": "valid"},
            {"padding": 1, "padding_mode": "circular"},
            {"padding": "same", "padding_mode": "reflect"},
            {"padding": (1, 2), "padding_mode": "replicate", "stride": 2, "groups": 3},
        ],
        ids=str,
    )
    def test_paddings_of_convolution(self, options):
        convs = (nn.Conv2d(n, m, **{"kernel_size": 3, **options}) for n, m in ((3, 6), (6, 3)))
        model, pair = metric(nn.Sequential(next(convs), nn.SiLU(), next(convs), nn.Flatten())), pair_of(8)
        fast, plain = (gradient(model, pair, fast=fast)[0] for fast in (True, False))
        assert (fast - plain).norm() < 1e-12 * plain.norm()

    @pytest.mark.parametrize("network", [group_norms, hard_activations])
    def test_finite_differences(self, network):
        model, pair, h = metric(network()), pair_of(12), 1e-5
        wrapper = L2GWrapper(model, 0.5)
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(wrapper(*pair), parameters)
        for _ in range(3):
            v, values = [torch.randn_like(p) for p in parameters], []
            for step in (h, -2 * h, h):
                for p, d in zip(parameters, v, strict=True):
                    p.data += step * d
                values.append(wrapper(*pair).item())
            expected = (values[0] - values[1]) / (2 * h)
            found = sum((g * d).sum().item() for g, d in zip(gradients, v, strict=True))
            assert found == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize(
        "network", [small, lambda: Checkpointed(on=False), Checkpointed], ids=["small", "plain", "checkpointed"]
    )
    def test_a_loop_around_learn2learns_maml(self, network):
        """A hand-written loop enters it around the forward pass only; the backward pass needs nothing.

        Checkpointed parts run again after learn2learn has put θ' into the module, on any operators: that gradient is
        not the exact one, but the mode's is the same.
        """
        learn2learn = pytest.importorskip("learn2learn", reason="learn2learn is not installed")
        model, pair = metric(network()), pair_of(8)
        found = []
        for mode in (twice_differentiable, nullcontext):
            twin = copy.deepcopy(model)
            learner = learn2learn.algorithms.MAML(twin, lr=0.1).clone()
            with mode():
                loss = twin.loss_fn(learner(pair[0]), pair[0].query_y)
            assert bool(ours(loss)) == (mode is twice_differentiable and not getattr(model.encoder, "on", False))
            learner.adapt(loss)
            twin.loss_fn(learner(pair[1]), pair[1].query_y).backward()
            found.append(torch.cat([p.grad.flatten() for p in twin.parameters()]))
        assert (found[0] - found[1]).norm() < 1e-10 * found[1].norm()


class TestStepsAside:
    """PyTorch's own operators run where something else than eager reverse-mode autograd sees them."""

    @staticmethod
    def functional(x, w):
        y = torch.conv2d(x, w, padding=1)
        return F.group_norm(F.batch_norm(y, None, None, training=True), 2).sin()

    def leaves(self):
        x, w = torch.randn(2, 2, 4, 4, dtype=torch.float64), torch.randn(4, 2, 3, 3, dtype=torch.float64)
        return x.requires_grad_(), w.requires_grad_()

    def test_it_is_there_in_the_function_of_these_tests(self):
        with twice_differentiable():
            assert ours(self.functional(*self.leaves())) == {"_ConvBackward", "_NormBackward", "_GroupNormBackward"}
        assert not ours(self.functional(*self.leaves()))

    @pytest.mark.parametrize("inside", [False, True])
    def test_grad_of_grad(self, inside):
        x, w = self.leaves()

        def loss(w):
            with twice_differentiable() if inside else nullcontext():
                return self.functional(x, w).square().sum()

        def outer(w):
            return torch.func.grad(loss)(w).square().sum()

        with nullcontext() if inside else twice_differentiable():
            found = torch.func.grad(outer)(w)
        (g,) = torch.autograd.grad(self.functional(x, w).square().sum(), w, create_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(g.square().sum(), w)[0])

    def test_vmap(self):
        _, w = self.leaves()
        x = torch.randn(3, 2, 2, 4, 4, dtype=torch.float64)
        with twice_differentiable():
            found = torch.func.vmap(self.functional, (0, None))(x, w)
        torch.testing.assert_close(found, torch.stack([self.functional(each, w) for each in x]))

    def test_forward_mode(self):
        x, w = self.leaves()
        v = torch.randn_like(w)
        _, expected = torch.func.jvp(lambda w: self.functional(x, w), (w,), (v,))
        with twice_differentiable():
            _, found = torch.func.jvp(lambda w: self.functional(x, w), (w,), (v,))
            with forward_ad.dual_level():
                by_hand = forward_ad.unpack_dual(self.functional(x, forward_ad.make_dual(w, v))).tangent
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(by_hand, expected)

    def test_a_hessian_vector_product_of_forward_over_reverse(self):
        x, w = self.leaves()
        v = torch.randn_like(w)

        def loss(w):
            y = torch.conv2d(x, w)  # norms are left out: their decompositions there are PyTorch's matter
            return y.sin().square().sum()

        with twice_differentiable():
            _, found = torch.func.jvp(torch.func.grad(loss), (w,), (v,))
        (g,) = torch.autograd.grad(loss(w), w, create_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(g, w, v)[0])

    def test_a_compiled_function_called_in_it(self):
        x, w = self.leaves()
        compiled, found = torch.compile(self.functional, backend="eager", fullgraph=True), []
        for function, mode in ((compiled, twice_differentiable), (self.functional, nullcontext)):
            with mode():
                y = function(x, w)
            (g,) = torch.autograd.grad(y.square().sum(), w, create_graph=True)
            found.append([y, g, torch.autograd.grad(g.square().sum(), w)[0]])
        torch.testing.assert_close(*found)

    def test_export(self):
        model, x = small().double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
        with twice_differentiable():
            program = torch.export.export(model, (x,))
        names = {str(node.target) for node in program.graph.nodes}
        assert {"aten.conv2d.default", "aten.batch_norm.default", "aten.group_norm.default"} <= names
        torch.testing.assert_close(program.module()(x), copy.deepcopy(model)(x))

    def test_tracing(self):
        model, x = small().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
        with twice_differentiable():
            traced = torch.jit.trace(model, (x,))
        graph = str(traced.inlined_graph)
        assert "aten::group_norm" in graph and "aten::_convolution" in graph and "PythonOp" not in graph
        torch.testing.assert_close(traced(x), model(x))

    def test_scripted_code(self):
        model, x = small().double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
        with twice_differentiable():
            y = torch.jit.script(copy.deepcopy(model))(x)
        torch.testing.assert_close(y, model(x))

    def test_a_checkpointed_part_of_a_wrapped_network(self, either_backend):
        pair, models = pair_of(8), [metric(Checkpointed(on)) for on in (True, False)]
        models[0].load_state_dict(models[1].state_dict())
        for options in ({}, {"inner_steps": 2, "mix": 0.5}):
            found, expected = (gradient(model, pair, **options)[0] for model in models)
            assert (found - expected).norm() < 1e-10 * expected.norm()
        _, statistics = gradient(models[0], pair)  # the pass that runs again writes none
        torch.testing.assert_close(statistics, gradient(models[1], pair)[1], rtol=1e-10, atol=1e-12)

    def test_saved_tensors_that_someone_else_keeps(self):
        x, w = self.leaves()
        with torch.autograd.graph.save_on_cpu(), twice_differentiable():
            assert not ours(self.functional(x, w))

    def test_subclasses_of_tensors(self):
        class Named(torch.Tensor):
            seen: set[str] = set()

            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                cls.seen.add(function.__name__)
                return super().__torch_function__(function, types, args, kwargs or {})

        x, w = self.leaves()
        with twice_differentiable():
            y = self.functional(x.as_subclass(Named), w)
        assert {"conv2d", "batch_norm", "group_norm"} <= Named.seen and type(y) is Named and not ours(y)
        torch.testing.assert_close(y.as_subclass(torch.Tensor), self.functional(x, w))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_other_devices(self, dtype):
        x, w = (t.detach().to(device="meta", dtype=dtype) for t in self.leaves())
        with twice_differentiable():
            y = self.functional(x, w)
        assert y.shape == (2, 4, 4, 4) and y.dtype == dtype and y.is_meta


class TestValuesAndErrors:
    """What a layer of PyTorch's gives or raises, it gives or raises in the mode."""

    X = torch.linspace(-5, 5, 3 * 4 * 25).view(3, 4, 5, 5).sin()

    @pytest.mark.parametrize(
        "call",
        [
            lambda x: nn.BatchNorm2d(4)(x.bfloat16()),
            lambda x: nn.BatchNorm2d(4).bfloat16()(x.bfloat16()),
            lambda x: nn.GroupNorm(2, 4)(x.bfloat16()),
            lambda x: F.batch_norm(x, None, None, torch.ones(4, 1), None, True),
            lambda x: F.batch_norm(x, None, None, None, torch.ones(4), True),
            lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4), training=True, momentum=0.0),
            lambda x: nn.BatchNorm2d(4)(x[:1].expand(3, 4, 5, 5)),
            lambda x: nn.GroupNorm(2, 4)(x.transpose(2, 3)[:, :, ::2]),
            lambda x: nn.GroupNorm(2, 4)(x[..., None].contiguous(memory_format=torch.channels_last_3d)),
            lambda x: nn.BatchNorm3d(4)(x[..., None].contiguous(memory_format=torch.channels_last_3d)),
            lambda x: F.conv2d(x, torch.ones(2, 4, 3, 3), padding=torch.tensor(1)),
            lambda x: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 2, 3))(x),
            lambda x: F.conv2d(x, torch.ones(2, 4, 3, 3)).view(size=(3, -1)),
            lambda x: torch.stack([z.view(-1) for z in F.conv2d(x, torch.ones(2, 4, 3, 3))]),
            lambda x: F.conv2d(x, torch.ones(2, 4, 3, 3)).view(3, 1, 2, 3, 3).view(3, 1, -1),
            lambda x: F.conv2d(x[:0], torch.ones(2, 4, 3, 3)),
            lambda x: F.hardsigmoid(x.bfloat16() * 4),
            lambda x: F.relu(x.transpose(1, 2)),
            lambda x: F.relu_(x.clone()) + F.relu(x.clone(), inplace=True) + x.relu() + x.clone().relu_(),
            lambda x: F.relu_(x.clone()[:, :2]),
            lambda x: F.leaky_relu(x, -0.1) + F.leaky_relu(x, 0.3) + F.leaky_relu(x.clone(), 0.2, inplace=True),
            lambda x: F.max_pool2d(x, 3, 1, 1) + F.max_pool2d(x.abs(), (3, 3), stride=1, padding=(1, 1)),
            lambda x: F.max_pool2d(x, 2, ceil_mode=True),
            lambda x: F.max_pool2d(x, 5),
            lambda x: F.max_pool2d(
                F.relu(F.batch_norm(x * torch.ones(1, requires_grad=True), None, None, training=True)), 5
            ),
            lambda x: F.max_pool2d(x, 2, return_indices=True)[1].float(),
            lambda x: F.max_pool2d(x[0], 2),
        ],
    )
    def test_values_and_strides(self, call):
        found = []
        for mode in (twice_differentiable, nullcontext):
            torch.manual_seed(0)
            with mode():
                found.append(call(self.X))
        close = {"rtol": 0.016, "atol": 1e-3} if found[0].dtype == torch.bfloat16 else {}  # a rounding to bfloat16
        torch.testing.assert_close(*found, **close, check_stride=True)

    @pytest.mark.parametrize("fast", [True, False])
    def test_weight_norm_has_its_second_derivative(self, fast):
        """PyTorch's own fails gradgradcheck."""
        v, g = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 2, 2, 2), (3, 1, 1, 1)))

        def normed(v, g):
            with twice_differentiable(fast=fast):
                return torch._weight_norm(v, g, 0)

        torch.testing.assert_close(normed(v, g), torch._weight_norm(v, g, 0))
        assert torch.autograd.gradgradcheck(normed, (v, g))

    def test_writes_through_views_reach_the_map(self):
        """What shares memory with PyTorch's operators shares it in the mode."""

        class Writes(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.norm = nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2)

            def forward(self, x):
                y = self.norm(self.conv(x))
                y.view(len(y), -1)[:, :3] = 1.0
                F.relu(y.view(len(x), -1), inplace=True)
                return F.max_pool2d(y, 2).view(len(x), -1)

        torch.manual_seed(0)
        model = MetricModel(Writes(), PrototypicalHead()).double()
        x, y = torch.randn(2, 6, 4, 7, 7, dtype=torch.float64), torch.arange(6) % 3
        pair = [Task(x[k, :3], y[:3], x[k, 3:], y[3:], 3) for k in range(2)]
        found = [
            torch.autograd.grad(L2GWrapper(model, 0.1, fast=fast)(*pair), list(model.parameters()))
            for fast in (True, False)
        ]
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize(
        "call",
        [
            lambda x: nn.BatchNorm2d(4)(x.double()),
            lambda x: nn.BatchNorm2d(4).double()(x),
            lambda x: nn.BatchNorm2d(4).bfloat16()(x),
            lambda x: nn.BatchNorm2d(4)(x.long()),
            lambda x: nn.GroupNorm(2, 4)(x.double()),
            lambda x: nn.GroupNorm(2, 4).double()(x),
            lambda x: nn.GroupNorm(2, 4)(x.long()),
            lambda x: F.group_norm(x, 3),
            lambda x: F.batch_norm(x, torch.zeros(4), None, training=True),
            lambda x: nn.Conv2d(4, 2, 3)(x.double()),
            lambda x: F.conv2d(x, torch.ones(2, 4, 3, 3), torch.ones(3)),
            lambda x: F.conv2d(x, torch.ones(2, 4, 3, 3), stride=0),
            lambda x: F.conv2d(x, torch.ones(2, 4, 3, 3), padding=(1, 1, 1)),
            lambda x: F.hardsigmoid(x.long()),
        ],
    )
    def test_errors(self, call):
        messages = []
        for mode in (twice_differentiable, nullcontext):
            with mode(), pytest.raises((RuntimeError, ValueError, NotImplementedError)) as raised:
                call(self.X)
            messages.append((raised.type, str(raised.value)))
        assert messages[0] == messages[1]


class TestOff:
    """It runs for passes that are differentiated twice, and ends with them."""

    def test_in_plain_first_order_and_stock_passes(self):
        model, pair = metric(small()), pair_of(8)
        exact, first = L2GWrapper(model, 0.1), L2GWrapper(model, 0.1, first_order=True)
        assert len(ours(exact.outcome(*pair).outer)) == 3 and len(ours(exact.clone()(pair[0]))) == 3
        for loss in (
            exact.loss(pair[0]),
            first.loss(pair[0]),
            first.outcome(*pair).outer,
            L2GWrapper(model, 0.1, fast=False).outcome(*pair).outer,
            nn.functional.cross_entropy(model(pair[0]), pair[0].query_y),
        ):
            assert loss.requires_grad and not ours(loss)

    def test_without_gradients_a_learners_pass_is_plain(self, monkeypatch):
        model, pair = metric(small()), pair_of(8)
        learner = L2GWrapper(model, 0.1).clone()
        monkeypatch.setattr("l2g_meta.algorithm.twice_differentiable", lambda **_: pytest.fail("a plain pass"))
        with torch.no_grad():
            learner.loss(pair[0])

    def test_after_an_exception(self):
        class Fails(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = small()

            def forward(self, task):
                self.net(task.support_x)
                raise KeyError("of the user's network")

        pair, before = pair_of(8), torch.backends.cuda.flash_sdp_enabled()
        with pytest.raises(KeyError, match="of the user's network"):
            L2GWrapper(Fails().double(), 0.1)(*pair)
        assert torch.overrides._get_current_function_mode_stack() == []
        assert not ours(small().double()(pair[0].query_x)) and torch.backends.cuda.flash_sdp_enabled() == before

    def test_nested(self):
        x, w = torch.randn(2, 2, 4, 4), torch.randn(3, 2, 3, 3, requires_grad=True)
        with twice_differentiable():
            with twice_differentiable():
                inner = torch.conv2d(x, w)
            outer = torch.conv2d(x, w)
        assert ours(inner) == ours(outer) == {"_ConvBackward"} and torch.equal(inner, outer)
        with twice_differentiable(fast=False):
            with twice_differentiable():
                assert ours(torch.conv2d(x, w))
            assert not ours(torch.conv2d(x, w))
        assert not ours(torch.conv2d(x, w))
        with twice_differentiable():  # the whole loop inside of it
            model, pair = metric(small()), pair_of(8)
            inside = gradient(model, pair)[0]
        torch.testing.assert_close(inside, gradient(model, pair)[0], rtol=1e-10, atol=1e-12)

    def test_each_entering_is_anew(self):
        """A mode that is stored and entered by two threads or twice at once would be one too few."""
        with twice_differentiable():
            (first,) = torch.overrides._get_current_function_mode_stack()
        with twice_differentiable():
            assert torch.overrides._get_current_function_mode_stack()[0] is not first

    def test_another_thread_is_untouched(self):
        x, w, found = torch.randn(2, 2, 4, 4), torch.randn(3, 2, 3, 3, requires_grad=True), []
        with twice_differentiable():
            thread = threading.Thread(target=lambda: found.append(ours(torch.conv2d(x, w))))
            thread.start()
            thread.join()
            assert ours(torch.conv2d(x, w)) and found == [set()]

    def test_what_two_threads_set_for_the_process_is_undone(self):
        """Entered by one thread, then by another, left by the first, then by the second."""
        import torch._dynamo.eval_frame as frames

        def state():
            cuda = torch.backends.cuda
            return frames._stance, cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()

        before, entered, other = state(), threading.Event(), threading.Event()

        def first():
            with twice_differentiable():
                entered.set()
                other.wait()

        thread = threading.Thread(target=first)
        thread.start()
        entered.wait()
        with twice_differentiable():
            other.set()
            thread.join()
            assert not torch.backends.cuda.flash_sdp_enabled() and state() != before
        assert state() == before

    def test_two_threads_at_once_have_their_own_exact_gradients(self):
        model, pair, found = metric(small()), pair_of(8), {}
        expected = gradient(model, pair)[0]

        def run(k):
            found[k] = [gradient(model, pair)[0] for _ in range(3)]

        threads = [threading.Thread(target=run, args=(k,)) for k in range(2)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert len(found) == 2
        for g in found[0] + found[1]:
            torch.testing.assert_close(g, expected, rtol=1e-10, atol=1e-12)
