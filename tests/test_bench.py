"""`l2g bench` in small: every variant computes the same gradient, the table and the JSON hold what they say."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from l2g_meta import Conv4, MetricModel, PrototypicalHead, ResNet12
from l2g_meta.bench.case import Case
from l2g_meta.bench.floor import Layer, Machine, floor, layers, passes
from l2g_meta.bench.run import bench, build, gradient_errors, peak_memory, scaling, task_stream
from l2g_meta.bench.variants import VARIANTS, available
from l2g_meta.cli import main
from l2g_meta.errors import L2GError
from l2g_meta.plots import bench_plot, scaling_plot

SMALL = Case(image_size=20, ways=2, queries=2, device="cpu")


def test_every_exact_variant_computes_the_same_gradient():
    errors = gradient_errors(SMALL, [name for name, v in available().items() if v.exact])
    assert set(errors) >= {"l2g", "l2g, recompute", "l2g, identity", "l2g, stock layers", "torch.func"}
    assert all(0 < error < 1e-4 for error in errors.values()), errors


def test_first_order_and_episodic_do_not():
    errors = gradient_errors(replace(SMALL, inner_lr=0.1), ["l2g", "l2g, first order", "episodic"])
    assert errors["l2g"] < 1e-3 < min(errors["l2g, first order"], errors["episodic"])


@pytest.mark.parametrize("change", [{"head": "relation"}, {"backbone": "resnet12"}, {"pairs": 2}], ids=str)
def test_other_cases(change):
    result = bench(
        replace(SMALL, **change), variants=["episodic", "l2g"], repeats=1, memory=False, say=lambda line: None
    )
    by_name = {row["name"]: row for row in result["rows"]}
    assert by_name["episodic"]["ratio"] == 1.0 and by_name["l2g"]["ratio"] > 1.0
    assert by_name["l2g"]["gradient_error"] < 1e-2  # float32, and a deep network on maps of one pixel


def test_command_prints_the_table_and_writes_json(tmp_path, capsys):
    path = tmp_path / "bench.json"
    flags = "--image-size 20 --ways 2 --queries 2 --repeats 1 --device cpu".split()
    assert main(["bench", *flags, "--variants", "episodic", "l2g, recompute", "--json", str(path)]) == 0
    result, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert [row["name"] for row in result["rows"]] == ["episodic", "l2g, recompute"]
    for row in result["rows"]:
        assert row["seconds"] > 0 and row["peak_bytes"] > 0 and f"{row['seconds']:.3f}" in printed
        assert row["images_per_second"] * row["seconds"] == pytest.approx(2 * 2 * 3)
    assert result["floor"]["l2g"]["floor_s"] > result["floor"]["episodic"]["floor_s"] > 0


def test_errors_say_what_there_is(capsys):
    assert main(["bench", "--variants", "foo"]) == 2
    assert "need variants of episodic; " in capsys.readouterr().err
    with pytest.raises(L2GError, match="leaves none"):
        build(replace(SMALL, head="relation", backbone="resnet12"), fused=True)
    with pytest.raises(L2GError, match="of one inner step, got 2"):
        VARIANTS["l2g, identity"].make(build(SMALL, fused=True), 0.1, 2)


def test_scaling_changes_one_thing_at_a_time():
    lines = []
    found = scaling(SMALL, variants=["l2g"], repeats=1, say=lines.append, axes={"ways": (2, 3), "inner_steps": (1, 2)})
    assert [(f["axis"], f["value"]) for f in found] == [
        ("ways", 2),
        ("ways", 3),
        ("inner_steps", 1),
        ("inner_steps", 2),
    ]
    assert found[1]["case"]["ways"] == 3 and found[1]["case"]["inner_steps"] == 1


def test_memory_of_a_step_counts_the_graph_of_both_tasks():
    small, large = (replace(SMALL, image_size=size) for size in (28, 84))
    peaks = {name: peak_memory(large, name, keep=False) for name in ("episodic", "l2g", "l2g, stock layers")}
    if None in peaks.values():
        pytest.skip("memory cannot be measured on this system")
    images = 84 * 84 * 64 * 4 * large.images / 2  # bytes of the first map of one task
    assert images < peaks["episodic"] < peaks["l2g"] < peaks["l2g, stock layers"]
    assert peak_memory(small, "l2g", keep=False) < peaks["l2g"] / 2


def test_floor_counts_convolutions_as_the_design_does():
    """Two convolution-bound episodes against one exact step: 12 F against 6 F, in the first layer 6 F against 4 F."""
    machine = Machine(bandwidth=1e30, flops=1.0)
    for first, expected in ((False, 12 / 6), (True, 6 / 4)):
        layer = [Layer("conv", 1.0, 1.0, 1.0, first)]
        two, step = (floor(layer, layer, machine, inner_steps=steps)["floor_s"] for steps in (0, 1))
        assert step / two == pytest.approx(expected)
    x, y = 3.0, 2.0
    assert sum(moved for moved, _ in passes(Layer("norm", x, y, 0.0, False), adapts=1)) == (x + y) + 2 * (2 * x + y) + (
        3 * x + 2 * y
    )


def test_floor_sees_every_layer():
    model, task = MetricModel(Conv4(3), PrototypicalHead()), task_stream(SMALL)[0][0]
    found = layers(model, task)
    assert [layer.kind for layer in found] == ["conv", "norm"] * 4
    assert [layer.first for layer in found[::2]] == [True, False, False, False]
    n = len(task.support_x) + len(task.query_x)
    assert found[0].flop == 2 * 27 * 64 * 20 * 20 * n and found[1].y == 64 * 10 * 10 * n * 4


def test_resnet12_is_the_published_one_and_fused_changes_nothing():
    assert sum(p.numel() for p in ResNet12().parameters()) == 12_424_320  # "12.4 M" in FEAT
    torch.manual_seed(0)
    fused, plain = (ResNet12(3, (4, 4, 6, 8), fused=fused).double() for fused in (True, False))
    plain.load_state_dict(fused.state_dict())
    x, gradients = torch.randn(4, 3, 20, 20, dtype=torch.float64), []
    for model in (fused, plain):
        first = torch.autograd.grad(model(x).square().sum(), list(model.parameters()), create_graph=True)
        gradients.append(torch.autograd.grad(sum(g.square().sum() for g in first), list(model.parameters())))
    for f, p in zip(*gradients, strict=True):
        torch.testing.assert_close(f, p, rtol=1e-8, atol=1e-8 * p.abs().max().item())
    assert isinstance(plain.blocks[0].convs[0], nn.Conv2d)


def test_pictures(tmp_path):
    axes = {"ways": (2, 3), "shots": (1,)}
    found = scaling(SMALL, variants=["episodic", "l2g"], repeats=1, say=lambda line: None, axes=axes)
    for path in (bench_plot(found[0], tmp_path / "bench.png"), scaling_plot(found, tmp_path / "scaling.png")):
        assert path.read_bytes().startswith(b"\x89PNG")
