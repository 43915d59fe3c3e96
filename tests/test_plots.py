import sys

import pytest
import torch
from PIL import Image

from l2g_meta import Conv4, L2GWrapper, MetricModel, PrototypicalHead
from l2g_meta.data import ClassDataset
from l2g_meta.errors import L2GError
from l2g_meta.training.curves import learning_curve, tsne
from l2g_meta.training.log import COLUMNS


def write_log(run, iterations, *, every):
    run.mkdir()
    lines = [",".join(COLUMNS)]
    for k in range(1, iterations + 1):
        done = k % every == 0
        lines.append(f"{k},{1 / k},,,0.001,4,0.1,0,{40 + k if done else ''},{2.0 if done else ''},,")
    (run / "log.csv").write_text("\n".join(lines) + "\n")
    return run


def test_learning_curves_of_several_runs(tmp_path):
    runs = [write_log(tmp_path / name, n, every=5) for name, n in (("a", 20), ("b", 120))]
    path = learning_curve(runs, tmp_path / "curve.png", labels=["A", "B"])
    with Image.open(path) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1_000_000)}
        assert image.width > 1000 and {(31, 119, 180), (255, 127, 14)} <= colours  # both lines are drawn


def test_a_run_without_a_log_is_named(tmp_path):
    with pytest.raises(L2GError, match="need a run's log in .*nothing.*log.csv"):
        learning_curve([tmp_path / "nothing"], tmp_path / "curve.png")


def test_tsne_shows_each_model_side_by_side(tmp_path):
    pytest.importorskip("sklearn")
    data = ClassDataset(torch.randn(60, 1, 16, 16), torch.arange(60) // 10, name="noise", split="test")
    models = {name: MetricModel(Conv4(1, 4), PrototypicalHead()) for name in ("one", "two")}
    models["two"] = L2GWrapper(models["two"], 0.1)
    with Image.open(tsne(models, data, tmp_path / "tsne.png", ways=3, shots=2, queries=4)) as image:
        assert image.width == 1200
    assert models["one"].training


def test_tsne_without_scikit_learn_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(ImportError, match=r"pip install scikit-learn"):
        tsne({}, None, tmp_path / "x.png")
