"""`l2g bench` in small: every variant computes the same gradient, the table and the JSON hold what they say."""

import json
import re
from dataclasses import replace

import pytest
import torch
from test_fast_operators import ours
from torch import nn

from l2g_meta import ResNet12
from l2g_meta.bench import comparison as run
from l2g_meta.bench.case import Case, build, task_stream
from l2g_meta.bench.comparison import bench
from l2g_meta.bench.variants import VARIANTS, available, prepare
from l2g_meta.cli.main import main
from l2g_meta.models.blocks import BatchNormReLU2d

SMALL = Case(image_size=20, ways=2, queries=2, device="cpu")


def gradient(case, name, dtype):
    pairs = [
        tuple(t._replace(support_x=t.support_x.to(dtype), query_x=t.query_x.to(dtype)) for t in task_stream(case)[0])
    ]
    model = build(case, layers=VARIANTS[name].layers).to(dtype)
    prepare(name, case, model)(pairs)
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def errors_of(case, names):
    """Relative to float64 on PyTorch's operators."""
    exact = gradient(case, "l2g, own network, stock operators", torch.float64)
    found = {name: gradient(case, name, torch.float32) for name in names}
    return {name: ((g - exact).norm() / exact.norm()).item() for name, g in found.items()}


def test_exact_rows_compute_the_same_gradient_and_others_do_not():
    other = [name for name in VARIANTS if "episodic" in name or "mix" in name or "first" in name]
    errors = errors_of(replace(SMALL, inner_lr=0.1), [*available(SMALL)])
    assert len(other) == 5 and all((errors[name] > 1e-3) == (name in other) for name in errors), errors


@pytest.mark.parametrize("change", [{"head": "relation"}, {"backbone": "resnet12"}, {"pairs": 2}], ids=str)
def test_other_cases(change):
    result = bench(replace(SMALL, **change), variants=["episodic", "l2g"], repeats=1, say=lambda line: None)
    by_name = {row["name"]: row for row in result["rows"]}
    assert by_name["episodic"]["ratio"] == 1.0
    assert by_name["l2g"]["ratio"] == by_name["l2g"]["seconds"] / by_name["episodic"]["seconds"]


def test_an_encoder_of_a_library_has_the_rows_of_ones_own_network():
    case, lines = Case("torchvision:resnet18", image_size=32, ways=2, queries=2, device="cpu"), []
    names = ["episodic, own network", "l2g, own network"]
    result = bench(case, variants=names, repeats=1, say=lines.append)
    episodic, l2g_row = result["rows"]
    assert [episodic["name"], l2g_row["name"]] == names
    assert l2g_row["ratio"] == l2g_row["ratio_to_fastest"] == l2g_row["seconds"] / episodic["seconds"]


def test_command_prints_the_table_and_writes_json(tmp_path, capsys):
    path = tmp_path / "bench.json"
    flags = "--image-size 20 --ways 2 --queries 2 --repeats 1 --device cpu".split()
    assert main(["bench", *flags, "--variants", "episodic", "l2g", "--json", str(path)]) == 0
    result, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert [row["name"] for row in result["rows"]] == ["episodic", "l2g"]
    for row in result["rows"]:
        assert row["seconds"] > 0 and f"{row['seconds']:.4f}" in printed


def test_errors_say_what_there_is(capsys):
    assert main(["bench", "--variants", "foo"]) == 2
    assert "need variants of episodic; " in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--image-size 8", r"Conv4 does not take images of shape \(3, 8, 8\).*; use larger images"),
        ("--image-size 8 --backbone resnet12", r"ResNet12 does not take images of shape \(3, 8, 8\).*; use larger"),
        ("--image-size 3 --head relation", r"Conv4 does not take images of shape \(3, 3, 3\).*; use larger images"),
        ("--ways 1", "need --ways to be at least 2, got 1"),
        ("--variants l2gg", "need variants of episodic; .*; got 'l2gg'; did you mean l2g\\?"),
        ("--inner-lr nan", "need --inner-lr of at least 0 and finite, got nan"),
        ("--inner-lr -1", "need --inner-lr of at least 0 and finite, got -1.0"),
        ("--backbone foo", "need --backbone to be one of conv4, .*; got 'foo'"),
        ("--backbone-options depth=3", "got options depth, fused: .* unexpected keyword argument 'depth'"),
        ("--backbone torchvision:resnet18 --variants l2g", "'l2g' needs fused layers, which only conv4 and resnet12"),
        (
            "--image-size 28 --head relation --backbone resnet12",
            r"RelationHead needs maps of at least 4×4 .*, got 1×1; .*",
        ),
    ],
)
def test_unusable_cases_are_told_in_one_line(flags, message, capsys):
    assert main(["bench", "--queries", "1", "--repeats", "1", "--device", "cpu", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("l2g: ") and error.count("\n") == 1 and re.search(message, error), error


def test_json_has_null_where_a_number_is_unknown(tmp_path, monkeypatch):
    """Ratios, where no episodes were timed."""
    path = tmp_path / "bench.json"
    flags = "--image-size 20 --ways 2 --queries 1 --repeats 1 --device cpu".split()
    assert main(["bench", *flags, "--variants", "l2g", "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))["rows"]
    assert row["ratio"] is None and row["seconds"] > 0


def test_rows_that_cannot_be_timed_are_left_out_unless_named(monkeypatch):
    def fails(*_):
        raise NotImplementedError("the derivative of an operator")

    lines, rows = [], {"l2g": VARIANTS["l2g"], "fails": VARIANTS["l2g"]._replace(make=fails)}
    monkeypatch.setitem(VARIANTS, "fails", rows["fails"])
    monkeypatch.setattr(run, "available", lambda *_, **__: rows)
    result = bench(SMALL, repeats=1, say=lines.append)
    with pytest.raises(NotImplementedError, match="the derivative"):
        bench(SMALL, variants=list(rows), repeats=1, say=lines.append)
    assert [row["name"] for row in result["rows"]] == ["l2g"]
    assert "left out: fails: the derivative of an operator" in lines


def test_rows_stand_against_episodes_of_their_own_layers(monkeypatch):
    monkeypatch.setattr(run, "available", lambda _, names, **__: {name: VARIANTS[name] for name in names})
    bases = {
        "l2g": "episodic",
        "l2g, mix 0.5": "episodic",
        "l2g, own network": "episodic, own network",
        "l2g, own network, stock operators": "episodic, own network",
        "l2g, own network, channels-last": "episodic, own network, channels-last",
    }
    names = [*dict.fromkeys(bases.values()), *bases]
    rows = {r["name"]: r for r in bench(SMALL, variants=names, repeats=1, say=str)["rows"]}
    seconds = {name: row["seconds"] for name, row in rows.items()}
    fastest = min(seconds[base] for base in bases.values())
    for name, base in bases.items():
        assert rows[name]["ratio"] == seconds[name] / seconds[base]
        assert rows[name]["ratio_to_fastest"] == seconds[name] / fastest


def test_each_row_has_the_layers_and_the_memory_format_that_it_names():
    stream = task_stream(SMALL)
    assert stream[0][0].support_x.is_contiguous()  # as a data set hands them out
    for name, norm, contiguous, operators in [
        ("l2g, own network", nn.BatchNorm2d, True, {"_ConvBackward", "_NormBackward"}),
        ("l2g, own network, channels-last", nn.BatchNorm2d, False, {"_ConvBackward", "_NormBackward"}),
        ("l2g, own network, stock operators", nn.BatchNorm2d, True, set()),
        ("episodic, own network", nn.BatchNorm2d, True, set()),
        ("episodic, own network, channels-last", nn.BatchNorm2d, False, set()),
        ("l2g", BatchNormReLU2d, False, {"_ConvBackward", "_NormBackward"}),
        ("l2g, first order", BatchNormReLU2d, False, {"_NormBackward"}),  # of the fused layers themselves
    ]:
        model, maps = build(SMALL, layers=VARIANTS[name].layers), []
        norms = {type(module) for module in model.modules() if isinstance(module, nn.BatchNorm2d)}
        model.encoder.blocks[1].conv.register_forward_hook(lambda *given, maps=maps: maps.append(given[-1]))
        prepare(name, SMALL, model)([stream[0]])
        assert norms == {norm} and maps and {y.is_contiguous() for y in maps} == {contiguous}, name
        assert ours(*maps) == operators, name


def test_precision_is_the_cases():
    gradients = []
    for precision in ("fp32", "bf16"):
        case = replace(SMALL, precision=precision)
        model = build(case, layers="fused")
        prepare("l2g", case, model)([task_stream(case)[0]])
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    plain, bf16 = gradients
    assert 1e-4 * plain.norm() < (bf16 - plain).norm() < 0.5 * plain.norm()  # last maps of one pixel: noisy
    bench(replace(SMALL, precision="tf32"), variants=["l2g"], repeats=1, say=str)
    assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    bench(SMALL, variants=["l2g"], repeats=1, say=str)
    assert not (torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)


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


def test_resnet12_under_the_relation_head():
    case = replace(SMALL, backbone="resnet12", head="relation", image_size=64)
    model, task = build(case, layers="fused"), task_stream(case)[0][0]
    with torch.no_grad():
        assert model(task).shape == (4, 2)


def test_resnet12_leaves_its_last_maps_to_heads_that_compare_them():
    maps, pooled = ResNet12(3, (4, 4, 6, 8), pooled=False).eval(), ResNet12(3, (4, 4, 6, 8)).eval()
    pooled.load_state_dict(maps.state_dict())
    x = torch.randn(2, 3, 70, 64)
    assert maps(x).shape == (2, 8, 4, 4)
    torch.testing.assert_close(maps(x).mean((2, 3), keepdim=True), pooled(x))
