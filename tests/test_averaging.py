"""Averaged weights and kept weights of a run."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from l2g_meta.errors import CheckpointError, FitError
from l2g_meta.models.backbones import Conv4
from l2g_meta.training.averaging import ETA, averaged
from l2g_meta.training.build import load_run
from l2g_meta.training.config import Config
from l2g_meta.training.loop import train


def glyphs(**more):
    settings = {"ways": 3, "queries": 2, "pairs": 1, "iterations": 6, "eval_every": 2, "eval_episodes": 5}
    return Config(**{"average": True, "device": "cpu"} | settings | more)


def test_the_average_is_the_weighted_mean_of_all_weights():
    model, t = nn.BatchNorm1d(1), 12
    average, values = averaged(model), torch.randn(t, dtype=torch.float64)
    for k, value in enumerate(values.tolist()):
        nn.init.constant_(model.weight, value)
        model.running_mean.fill_(value)
        model.num_batches_tracked.fill_(k)
        average.update_parameters(model)
    weights = torch.tensor([torch.tensor([s + i for i in range(1, ETA)]).double().prod() * s for s in range(1, t + 1)])
    expected = (weights * values).sum() / weights.sum()  # the recursion's weights: s (s + 1) … (s + η − 1)
    assert average.module.weight.item() == pytest.approx(expected.item(), rel=1e-5)
    assert average.module.running_mean.item() == pytest.approx(expected.item(), rel=1e-5)
    assert average.module.num_batches_tracked.item() == t - 1


def test_averages_survive_resuming_and_change_nothing_else(tmp_path):
    options = {"progress": False, "keep_weights": True}
    train(glyphs(), tmp_path / "whole", **options)
    train(glyphs(iterations=2), tmp_path / "parts", **options)
    train(glyphs(), tmp_path / "parts", **options, resume=True, force=True)
    train(glyphs(average=False), tmp_path / "plain", progress=False)
    for name in ("average", "last", "after-4", "after-6-average"):
        a, b = (load_file(tmp_path / run / f"{name}.safetensors") for run in ("whole", "parts"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name
    last, plain = (load_file(tmp_path / run / "last.safetensors") for run in ("whole", "plain"))
    assert all(torch.equal(last[key], plain[key]) for key in last)
    assert not list((tmp_path / "plain").glob("a*"))
    average, _ = load_run(tmp_path / "whole", checkpoint="average")
    kept, _ = load_run(tmp_path / "whole", checkpoint="after-6-average")
    assert all(torch.equal(a, b) for a, b in zip(average.parameters(), kept.parameters(), strict=True))
    assert not torch.equal(next(average.parameters()), last["module.encoder.blocks.0.conv.weight"])
    with pytest.raises(CheckpointError, match="No such file"):
        load_run(tmp_path / "plain", checkpoint="average")


def test_conv4_takes_the_channels_of_each_block():
    assert Conv4(1, (4, 6, 8, 10))(torch.randn(2, 1, 28, 28)).shape == (2, 10, 1, 1)
    with pytest.raises(FitError, match="4 blocks"):
        Conv4(1, (4, 6))
