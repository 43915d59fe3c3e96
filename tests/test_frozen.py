"""Heads on frozen features, and other data sets than a run's, by `l2g evaluate`."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

from l2g_meta import Conv4, MetricModel, PrototypicalHead, evaluate, load, load_run
from l2g_meta.classify.photos import Preparation
from l2g_meta.classify.prepared_data import open_data
from l2g_meta.cli.main import main
from l2g_meta.data.sets.folder import listed_files
from l2g_meta.errors import DataError
from l2g_meta.evaluation import frozen
from l2g_meta.evaluation.episodes import paired_difference
from l2g_meta.models.maml import SoftmaxMAML

EPISODES = {"ways": 3, "shots": 2, "queries": 4, "episodes": 12}


@pytest.fixture
def test_data(blob_run):
    return load("folder", "test", root=blob_run.parent / "data", image_size=16)


def test_heads_share_episodes_and_features_and_the_trained_one_is_what_evaluate_says(blob_run, test_data):
    model, seen = load_run(blob_run, device="cpu")[0].module, []
    model.encoder.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    found = frozen.evaluate_heads(model, test_data, **EPISODES)
    assert list(found) == ["trained", *frozen.HEADS] and sum(seen) <= len(test_data)
    assert found["trained"] == evaluate(model, test_data, **EPISODES)
    squared = MetricModel(model.encoder, PrototypicalHead(distance="squared"))
    assert found["nearest"] == evaluate(squared, test_data, **EPISODES)
    paired_difference(found["simpleshot"], found["logistic"])


def test_simpleshot_is_centred_by_the_training_classes():
    z = torch.randn(12, 5)
    s, q, y = z[:6], z[6:], torch.arange(6) % 3
    c = torch.randn(5)
    expected = [
        [-sum((F.normalize(x - c, dim=0) - F.normalize(s[y == k] - c, dim=1).mean(0)) ** 2) for k in range(3)]
        for x in q
    ]
    torch.testing.assert_close(frozen.SimpleShotHead(c)(s, y, q, 3), torch.tensor(expected))
    torch.testing.assert_close(frozen.SimpleShotHead()(s, y, q, 3), frozen.SimpleShotHead(s.mean(0))(s, y, q, 3))
    base = frozen.Features(nn.Flatten(), load("glyphs", "train", image_size=8))
    rows = np.concatenate(base.index)
    torch.testing.assert_close(base.mean(len(rows)), base.dataset.gather(rows).flatten(1).mean(0), rtol=1e-4, atol=1e-4)


def test_logistic_regression_is_scikit_learns():
    z, y = torch.randn(20, 6), torch.arange(10) % 5
    unit = F.normalize(z).double().numpy()
    expected = LogisticRegression(max_iter=1000).fit(unit[:10], y).predict_log_proba(unit[10:])
    np.testing.assert_allclose(frozen.LogisticHead()(z[:10], y, z[10:], 5), expected, rtol=1e-5)


def test_models_without_features_have_their_own_result_alone(test_data):
    model = SoftmaxMAML(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3)), 3, inner_lr=0.1)
    assert list(frozen.evaluate_heads(model, test_data, **EPISODES)) == ["trained"]
    metric = MetricModel(Conv4(3, 4), PrototypicalHead())
    assert list(frozen.evaluate_heads(metric, test_data, **EPISODES, bn="batch")) == ["trained"]


def said(capsys, *words):
    code = main(["evaluate", *map(str, words), "--episodes", "8", "--queries", "2", "--device", "cpu", "--json"])
    out, err = capsys.readouterr()
    return json.loads(out) if code == 0 else err


def test_the_command_shows_three_heads_beside_the_trained_one(blob_run, capsys):
    found = said(capsys, blob_run)
    assert list(found["heads"]) == ["trained", *frozen.HEADS]
    assert found["heads"]["trained"]["accuracy_mean"] == found["accuracy_mean"]
    alone = said(capsys, blob_run, "--head", "logistic")
    assert alone["accuracy_mean"] == found["heads"]["logistic"]["accuracy_mean"] and list(alone["heads"]) == [
        "logistic"
    ]
    main(["evaluate", str(blob_run), "--episodes", "8", "--device", "cpu"])
    assert "frozen features, no training: nearest prototype" in capsys.readouterr().out


def test_another_data_set_and_other_splits(blob_run, capsys):
    root = blob_run.parent / "data"
    own = said(capsys, blob_run)
    assert said(capsys, blob_run, "--data", "folder", "--root", root)["accuracies"] == own["accuracies"]
    glyphs = said(capsys, blob_run, "--data", "glyphs", "--split", "validation")
    assert glyphs["split"] == "validation" and glyphs["accuracy_mean"] < 100
    everything = said(capsys, blob_run, "--split", "all", "--shots", "20")  # classes have 12 images a split
    assert everything["split"] == "all" and everything["shots"] == 20
    assert "need" in said(capsys, blob_run, "--split", "test", "--shots", "20")


def test_an_encoder_without_a_run(blob_run, capsys):
    root = blob_run.parent / "data"
    found = said(capsys, "--data", "folder", "--root", root, "--ways", "5")
    assert found["checkpoints"] == ["the embedded model"] and found["accuracy_mean"] > 90
    assert found["heads"]["logistic"]["accuracy_mean"] > 90
    assert "need RUN, or --data" in said(capsys, "--ways", "5")
    assert "got both" in said(capsys, blob_run, "--model", "timm:resnet18")


def test_all_classes_of_several_splits_prepared_for_another_size():
    preparation = Preparation(20, 3, (0.5,), (0.25,))
    data = open_data("glyphs", "all", preparation)
    parts = [load("glyphs", split, image_size=20) for split in ("train", "validation", "test")]
    assert data.n_classes == sum(part.n_classes for part in parts)
    last = [data.index[data.class_names.index(parts[-1].class_names[-1])][k] for k in (0, -1)]
    grey = parts[-1].images[parts[-1].index[-1][[0, -1]]].permute(0, 3, 1, 2).expand(-1, 3, -1, -1).float() / 255
    torch.testing.assert_close(data.gather(last), (grey - 0.5) / 0.25)


@pytest.fixture
def listed(tmp_path, blobs):
    blobs(tmp_path / "images", 4, 3)
    return tmp_path


def flat(root):
    """As the published mini-ImageNet: all images in one folder."""
    (root / "flat" / "images").mkdir(parents=True)
    rows = ["filename,label"]
    for file in sorted((root / "images").glob("*/*.png")):
        rows.append(f"{file.parent.name}{file.name},{file.parent.name}")
        shutil.copy(file, root / "flat" / "images" / f"{file.parent.name}{file.name}")
    return root / "flat", "test.csv", "\n".join(rows[:7])


def easyfsl_csv(root):
    rows = [f"{k},class0{c},{k}.png" for c in (0, 1) for k in range(3)]
    return root / "images", "test_images.csv", "\n".join([",class_name,image_name", *rows])


def easyfsl_json(root):
    values = {"class_names": ["class00", "class01"], "class_roots": ["./data/images/class00", "class01"]}
    return root / "images", "test.json", json.dumps(values)


@pytest.mark.parametrize("kind", [flat, easyfsl_csv, easyfsl_json], ids=lambda kind: kind.__name__)
def test_split_files_of_others(kind, listed, capsys):
    root, name, text = kind(listed)
    (listed / name).write_text(text)
    found = listed_files(listed / name, root)
    assert list(found) == ["class00", "class01"] and all(len(files) == 3 for files in found.values())
    words = ["--data", "folder", "--root", root, "--split-file", listed / name, "--ways", "2"]
    assert said(capsys, *words)["split"] == "test"
    assert "belongs to --data folder" in said(capsys, *words[4:], "--data", "glyphs")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "filename,label\n../secret.png,a"),
        ("a.csv", "filename,label\n{root}/../secret.png,a"),
        ("a.csv", "filename,label\nnone.png,a"),
        ("a.csv", "filename,label\nsecret.txt,a"),
        ("a.csv", "file,class\na.png,b"),
        ("a.csv", ""),
        ("a.csv", "filename,label\n\0,a"),
        ("a.json", '{{"class_names": ["a"], "class_roots": [".."]}}'),
        ("a.json", '{{"class_names": ["a"], "class_roots": []}}'),
        ("a.json", "[" * 100_000),
        ("a.json", "3"),
        ("none.json", None),
    ],
)
def test_split_files_that_lead_elsewhere_or_nowhere(name, text, listed):
    root = listed / "images"
    (listed / "secret.png").write_bytes(b"")
    (root / "secret.txt").write_text("")
    if text is not None:
        (listed / name).write_text(text.format(root=root))
    with pytest.raises(DataError):
        listed_files(listed / name, root)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_no_split_file(listed):
    os.mkfifo(listed / "a.csv")
    with pytest.raises(DataError, match="no regular file"):
        listed_files(listed / "a.csv", listed / "images")
