"""Encoders of torchvision, timm and ours: second order through them, what the inner step adapts, weights, DropBlock."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision import models

from l2g_meta import Conv4, L2GWrapper, MetricModel, PrototypicalHead, RelationHead, ResNet12, Task
from l2g_meta.classify.photos import Preparation
from l2g_meta.classify.source import open_source
from l2g_meta.cli.main import main
from l2g_meta.errors import CheckpointError, FitError, L2GError
from l2g_meta.inner.clone import adapted_names, clone_module
from l2g_meta.models.dropblock import DropBlock
from l2g_meta.models.libraries import preprocessing
from l2g_meta.models.pretrained import put_encoder, read_state_dict
from l2g_meta.training.build import build_encoder, build_model, load_run
from l2g_meta.training.config import Config
from l2g_meta.training.initial_weights import initialise

VIT_TIMM = {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2}


def tasks(size=8, channels=3, n=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 2 * n, channels, size, size, dtype=dtype, generator=generator), torch.arange(n) % 2
    return [Task(x[k, :n], y, x[k, n:], y, 2) for k in (0, 1)]


def meta_loss(model, pair, **options):
    return L2GWrapper(model, 0.05, **options)(*pair)


def against_finite_differences(model, pair, *, directions=2, step=1e-5, rel=1e-4, **options):
    """The meta-gradient along random directions, against central differences of the meta-loss."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(meta_loss(model, pair, **options), parameters, allow_unused=True)
    for _ in range(directions):
        v = [torch.randn_like(p) * p.detach().norm() / max(p.numel(), 1) ** 0.5 for p in parameters]
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(parameters, v, strict=True):
                    p.add_(sign * step * d)
            values.append(meta_loss(model, pair, **options).item())
            with torch.no_grad():
                for p, d in zip(parameters, v, strict=True):
                    p.sub_(sign * step * d)
        expected = (values[0] - values[1]) / (2 * step)
        got = sum((g * d).sum().item() for g, d in zip(gradients, v, strict=True) if g is not None)
        assert got == pytest.approx(expected, rel=rel, abs=1e-7)
    return gradients


def without_kinks(encoder):
    """Piecewise linear functions made smooth, since finite differences step over their kinks."""
    for parent in encoder.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU | nn.ReLU6 | nn.Hardswish | nn.Hardsigmoid):
                setattr(parent, name, nn.Softplus())
            elif isinstance(child, nn.MaxPool2d):
                setattr(parent, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
            elif isinstance(child, nn.Dropout):
                child.p = 0.0
    return encoder


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("torchvision:resnet18", {}, 16),
        ("torchvision:mobilenet_v3_small", {}, 16),
        ("timm:vit_tiny_patch16_224", VIT_TIMM, 16),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_meta_gradient_is_that_of_finite_differences(name, options, size, either_backend):
    if name.startswith("timm:"):
        pytest.importorskip("timm", reason="timm is not installed")
    encoder = without_kinks(build_encoder(name, 3, options)).double()
    model = MetricModel(encoder, PrototypicalHead(distance="squared", dims="mean"))
    against_finite_differences(model, tasks(size), directions=1)


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.second, self.frozen = self.first, nn.Linear(12, 4).requires_grad_(False)

    def forward(self, x):
        return self.frozen(self.second(self.first(x.flatten(1)).tanh()).tanh())


@pytest.mark.parametrize("options", [{}, {"mix": 0.5}, {"adapt": ["encoder.first.weight"]}], ids=str)
def test_shared_and_frozen_parameters(options, either_backend):
    model = MetricModel(Shared().double(), PrototypicalHead(distance="squared"))
    gradients = against_finite_differences(model, tasks(2), **options)
    assert len(gradients) == 2 and all(g is not None for g in gradients)


@pytest.mark.parametrize("precision", [torch.float64, torch.float32])
def test_attention_of_torchvision_has_a_second_derivative(precision, either_backend):
    from torchvision.models import VisionTransformer

    encoder = VisionTransformer(8, 4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8)
    encoder.heads = nn.Identity()
    model = MetricModel(encoder, PrototypicalHead(distance="squared", dims="mean")).to(precision)
    pair = tasks(8, dtype=precision)
    if precision == torch.float64:
        against_finite_differences(model, pair)
    else:
        plain = torch.nn.functional.scaled_dot_product_attention(*(torch.randn(1, 1, 4, 8, requires_grad=True),) * 3)
        (g,) = torch.autograd.grad(plain.sum(), plain.grad_fn.next_functions[0][0].variable, create_graph=True)
        with pytest.raises(RuntimeError, match="not implemented|derivative"):  # what the wrapper keeps away
            g.sum().backward()
        meta_loss(model, pair).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_choice_of_the_inner_step_is_exact_against_two_lines_of_autograd(either_backend):
    torch.manual_seed(2)
    body, top = torch.randn(12, 5, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.top = nn.Parameter(body.clone()), nn.Parameter(top.clone())

        def forward(self, task):
            z = (torch.cat([task.support_x, task.query_x]).flatten(1) @ self.body).tanh() @ self.top
            return z[len(task.support_x) :, :2]

    def loss(b, t, task):
        return F.cross_entropy(((task.query_x.flatten(1) @ b).tanh() @ t)[:, :2], task.query_y)

    pair = tasks(2)
    for adapt, chosen in ((["top"], (False, True)), (["bod*"], (True, False)), (["top", "body"], (True, True))):
        b, t = body.clone().requires_grad_(), top.clone().requires_grad_()
        g = torch.autograd.grad(loss(b, t, pair[0]), (b, t), create_graph=True)
        after = [p - 0.3 * d * c for p, d, c in zip((b, t), g, chosen, strict=True)]
        expected = torch.autograd.grad(loss(*after, pair[1]), (b, t))
        model = Net()
        l2g = L2GWrapper(model, 0.3, adapt=adapt)
        learner = l2g.adapted(pair[0])
        assert set(learner.updates) == {n for n, c in zip(("body", "top"), chosen, strict=True) if c}
        learner.loss(pair[1]).backward()
        for p, e in zip((model.body, model.top), expected, strict=True):
            torch.testing.assert_close(p.grad, e, rtol=1e-12, atol=1e-14)


def test_step_sizes_are_those_of_the_chosen_parameters_and_an_unknown_pattern_names_those_there_are():
    model = MetricModel(Conv4(3, 4, pools=2), RelationHead(4, (4, 4)), image_shape=(3, 16, 16))
    l2g = L2GWrapper(model, 0.1, learn_inner_lr="tensor", adapt=["head"])
    assert [n for n, _ in l2g.inner_lr.named_parameters()] == adapted_names(model, ["head"])
    l2g(*tasks(16, dtype=torch.float32)).backward()
    assert all(p.grad is not None for p in l2g.parameters())
    with pytest.raises(FitError, match=r"adapt 'layer4', got none; there are encoder.blocks.0.conv.weight"):
        L2GWrapper(model, 0.1, adapt=["head", "layer4"])
    with pytest.raises(FitError, match="write \\['head'\\]"):
        L2GWrapper(model, 0.1, adapt="head")
    with pytest.raises(FitError, match=r"there are blocks.0.convs.\*"):
        adapted_names(ResNet12(3, (2, 2, 2, 2)), ["none"])


def test_dropblock_drops_squares_of_the_rate_it_says():
    drop, x = DropBlock(0.2, 3, ramp=0), torch.ones(64, 16, 12, 12)
    y = drop(x)
    zeros = y == 0
    assert zeros.float().mean().item() == pytest.approx(0.2, abs=0.03)  # a little less, squares overlap
    assert y.mean().item() == pytest.approx(1.0, abs=1e-5)
    corners = 1 - F.max_pool2d(1 - zeros.float(), 3, 1)  # of whole squares of zeros
    assert torch.equal(F.max_pool2d(F.pad(corners, (2, 2, 2, 2)), 3, 1).bool(), zeros)  # every zero is in one
    assert torch.equal(drop.eval()(x), x) and int(drop.passes) == 1


def test_dropblock_grows_over_its_training_passes_and_is_drawn_from_pytorchs_generator():
    drop, x = DropBlock(0.5, 2, ramp=10), torch.ones(16, 8, 8, 8)
    shares = [(drop(x) == 0).float().mean().item() for _ in range(12)]
    assert shares[0] < 0.1 < shares[5] < shares[10] and int(drop.passes) == 12
    state, passes = torch.get_rng_state(), drop.passes.clone()
    first = drop(x)
    torch.set_rng_state(state)
    drop.passes.copy_(passes)
    assert torch.equal(drop(x), first)
    assert DropBlock(0.1, 5, ramp=0)(torch.ones(2, 2, 2, 3)).shape == (2, 2, 2, 3)  # a map smaller than a square


def test_dropblock_under_cloning_counts_a_pair_once_and_has_the_exact_meta_gradient(either_backend):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.drop = nn.Conv2d(3, 4, 3, padding=1), DropBlock(0.3, 2, ramp=4)

        def forward(self, x):
            torch.manual_seed(5)  # the same squares each time, for finite differences
            self.drop.passes.fill_(2)
            return self.drop(self.conv(x).tanh()).mean((2, 3))

    against_finite_differences(MetricModel(Net().double(), PrototypicalHead(distance="squared")), tasks(6))
    model = MetricModel(ResNet12(3, (2, 2, 2, 2), drop_rate=0.2, ramp=10), PrototypicalHead())
    meta_loss(model, tasks(16, dtype=torch.float32)).backward()
    assert [int(b) for n, b in model.named_buffers() if n.endswith("passes")] == [1, 1]


def test_resnet12_is_as_before_without_dropblock():
    assert not any("drop" in name for name in ResNet12(3, (2, 2, 2, 2)).state_dict())
    model = ResNet12(3, (2, 2, 2, 2), drop_rate=0.1)
    kinds = [type(block.drop).__name__ for block in model.blocks]
    assert kinds == ["Dropout", "Dropout", "DropBlock", "DropBlock"]
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(model.eval()(x), model(x))
    with pytest.raises(FitError, match="widths of 4 blocks"):
        ResNet12(3, (2, 2))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("torchvision:resnet18x", {}, "need a name of torchvision's .* models, got 'resnet18x'; for example resnet1"),
        ("torchvision:deeplabv3_resnet50", {}, "need a name of torchvision's"),
        ("timm:hf-hub:somebody/else", {}, "need a name of timm's"),
        ("timm:resnet18", {"checkpoint_path": "x"}, "cannot set checkpoint_path of timm:resnet18; weights"),
        ("timm:resnet18", {"pretrained_cfg": "x"}, "cannot set pretrained_cfg"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "cannot set weights"),
        ("torchvision:resnet18", {"depth": 3}, "cannot be built with the options depth=3"),
        ("conv4", {"widths": 3}, "got options widths"),
        ("os:system", {}, "need a class derived from torch.nn.Module"),
    ],
)  # fmt: skip
def test_names_and_options_that_are_refused(name, options, message):
    if name.startswith("timm:"):
        pytest.importorskip("timm", reason="timm is not installed")
    with pytest.raises(FitError, match=message):
        build_encoder(name, 3, options)


@pytest.mark.parametrize("name", ["squeezenet1_1", "densenet121", "shufflenet_v2_x0_5", "mnasnet0_5"])
def test_other_families_of_torchvision_lose_their_classification_layer(name):
    encoder = build_encoder(f"torchvision:{name}", 1, {}).eval()
    features = encoder(torch.randn(2, 1, 32, 32))
    assert features.ndim == 2 and features.shape[1] != 1000


def test_weights_from_files_and_runs(tmp_path):
    import torchvision
    from safetensors.torch import save_file

    net = torchvision.models.resnet18(weights=None)
    torch.save({"state_dict": net.state_dict()}, tmp_path / "a.pt")
    save_file(net.state_dict(), tmp_path / "a.safetensors")
    for file in ("a.pt", "a.safetensors"):
        config = Config(backbone="torchvision:resnet18", weights=str(tmp_path / file), seed=1).resolved()
        model = build_model(config, (3, 32, 32))
        assert not torch.equal(model.encoder.conv1.weight, net.conv1.weight)
        initialise(model, config)
        x, net.fc = torch.randn(2, 3, 32, 32), nn.Identity()
        torch.testing.assert_close(model.encoder.eval()(x), net.eval()(x))
    with pytest.raises(CheckpointError, match="lacks .* use the same --backbone"):
        put_encoder(read_state_dict(tmp_path / "a.pt"), Conv4(3), "a.pt")
    with pytest.raises(CheckpointError, match=r"has 0.weight of shape \(1, 2\) where it takes \(1, 3\); use the same"):
        put_encoder({"0.weight": torch.ones(1, 2)}, nn.Sequential(nn.Linear(3, 1, bias=False)), "x")
    with pytest.raises(CheckpointError, match="Unexpected key"):
        put_encoder({"weight": torch.ones(1, 2), "other": torch.ones(1)}, nn.Linear(2, 1, bias=False), "x")
    torch.save([1], tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="need a state dict"):
        read_state_dict(tmp_path / "b.pt")
    for name, content in (("c.pt", b"no pickle"), ("c.safetensors", b"x")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="need a run, a .safetensors file or one of torch.save"):
            read_state_dict(tmp_path / name)
    with pytest.raises(L2GError, match="need --backbone timm:NAME or torchvision:NAME for --weights default"):
        initialise(model, Config(weights="default").resolved())


@pytest.mark.parametrize("size", [None, 96])
@pytest.mark.parametrize(
    "name",
    [
        "timm:resnet18",
        "timm:vit_tiny_patch16_224",
        "timm:convnext_atto",
        "torchvision:resnet18",
        "torchvision:vit_b_16",
    ],
)
def test_photos_are_prepared_as_the_authors_of_the_weights_do(name, size):
    library, model = name.split(":")
    if library == "timm":
        timm = pytest.importorskip("timm", reason="timm is not installed")
    encoder = build_encoder(name, 3, {})
    preparation = Preparation(**preprocessing(name, encoder, size))
    assert preparation.size == (size or 224)
    if library == "timm":
        own = None if size is None else {"input_size": (3, size, size)}
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder, own))
    else:
        crop = {} if size is None else {"crop_size": size, "resize_size": round(256 * size / 224)}
        transform = partial(models.get_model_weights(model)["DEFAULT"].transforms, **crop)()
    rng = np.random.default_rng(0)
    for height, width in ((84, 84), (200, 300), (517, 201), (60, 1000)):
        photo = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        assert torch.equal(preparation.normalised(preparation.pixels(photo)[None])[0], transform(photo))


def test_a_line_of_pixels_takes_no_memory():
    preparation = Preparation(224, 3, (0.5,), (0.5,), resize=256)
    assert preparation.pixels(Image.new("RGB", (10_000_000, 1))).shape == (224, 224, 3)


@pytest.mark.parametrize(
    "name", ["timm:vit_tiny_patch16_224", pytest.param("torchvision:vit_b_16", marks=pytest.mark.slow)]
)
def test_position_embeddings_are_resampled_for_another_size(name, tmp_path):
    if name.startswith("timm:"):
        pytest.importorskip("timm", reason="timm is not installed")
    net = build_encoder(name, 3, {}).eval()
    torch.save(net.state_dict(), tmp_path / "a.pt")
    source = open_source(name, "cpu", weights=tmp_path / "a.pt", image_size=96)
    assert source.preparation.size == 96
    own = source.model.encoder.state_dict()
    changed = [n for n, t in net.state_dict().items() if own[n].shape != t.shape]
    assert len(changed) == 1 and "pos_embed" in changed[0] and own[changed[0]].shape[1] == 37
    assert all(torch.equal(own[n], t) for n, t in net.state_dict().items() if n not in changed)
    whole = open_source(name, "cpu", weights=tmp_path / "a.pt")
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(whole.model.encoder(x), net(x))
    assert "seen ImageNet" in whole.seen("mini-imagenet", ["n01"]) and not whole.seen("glyphs", ["a"])


def test_a_file_of_torch_save_runs_no_code(tmp_path):
    class Bad:
        def __reduce__(self):
            return (print, ("run",))

    for name, thing in (("bad.pt", Bad()), ("whole.pt", nn.Linear(1, 1))):
        torch.save(thing, tmp_path / name)
        with pytest.raises(CheckpointError, match="more than names and tensors .* is not run; save model.state_dict"):
            read_state_dict(tmp_path / name)


def test_pretrained_weights_that_cannot_be_had_end_in_a_remedy(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.urlopen", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    config = Config(backbone="torchvision:resnet18", weights="default").resolved()
    with pytest.raises(L2GError, match="got: no network; run this once with a network, copy the cache, or give a file"):
        initialise(build_model(config, (3, 32, 32)), config)


def test_the_command_line_trains_such_an_encoder_and_reads_its_run(tmp_path):
    out = tmp_path / "run"
    argv = [
        "train",
        "--image-size",
        "16",
        "--pairs",
        "1",
        "--iterations",
        "1",
        "--eval-episodes",
        "5",
        "--device",
        "cpu",
    ]
    argv += ["--queries", "2", "--backbone", "torchvision:mobilenet_v3_small", "--backbone-options", "dropout=0.1"]
    assert main([*argv, "--adapt", "encoder.features.1*", "encoder.classifier", "--out", str(out)]) == 0
    stored = json.loads((out / "config.json").read_text())
    assert stored["adapt"] == ["encoder.features.1*", "encoder.classifier"]
    wrapper, config = load_run(out, checkpoint="last")
    assert config.adapt == tuple(stored["adapt"]) and config.backbone_options == ("dropout=0.1",)
    assert wrapper.step.adapt == config.adapt and isinstance(clone_module(wrapper.module), MetricModel)
    assert main(["train", "--resume", str(out)]) == 0
