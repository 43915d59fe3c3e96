"""Supervised pre-training: its batches, its head, the command, resuming, and what begins from it."""

import csv
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from l2g_meta import Conv4, L2GWrapper, MetricModel, PrototypicalHead
from l2g_meta.cli.main import main
from l2g_meta.data import ClassDataset
from l2g_meta.data.augment import Augment
from l2g_meta.data.batches import Batches
from l2g_meta.errors import CheckpointError, DataError, FitError, L2GError
from l2g_meta.evaluation.episodes import evaluate
from l2g_meta.files.tensors import load_tensors, read_info, save_tensors
from l2g_meta.models.linear_head import LinearHead
from l2g_meta.training.build import build_model, build_objective, build_optimizer, load_run
from l2g_meta.training.config import Config
from l2g_meta.training.loop import learning_rate, train
from l2g_meta.training.objectives import meta_gradient
from l2g_meta.training.task_stream import calls_of_update

SMALL = ["--image-size", "16", "--eval-every", "2", "--eval-episodes", "10", "--queries", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "pretrained"
    assert main(["pretrain", *SMALL, "--batch", "16", "--iterations", "4", "--out", str(out)]) == 0
    return out


def images(n_classes=4, each=6):
    labels = np.repeat(np.arange(n_classes), each)
    pixels = np.arange(len(labels), dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 1), np.uint8)
    return ClassDataset(torch.from_numpy(pixels), labels, mean=(0.0,), std=(1 / 255,))


def test_an_epoch_shows_every_image_once_with_its_class_and_a_batch_depends_on_its_position_alone():
    data = images()
    batches = Batches(data, 8, seed=3)
    epochs = [[batches[3 * epoch + k][0] for k in range(3)] for epoch in (0, 1)]
    for epoch in epochs:
        rows = torch.cat([b.query_x[:, 0, 0, 0] for b in epoch]).round().long()
        assert sorted(rows.tolist()) == list(range(24))
        assert torch.equal(torch.cat([b.query_y for b in epoch]), torch.from_numpy(data.labels)[rows])
    assert not torch.equal(epochs[0][0].query_x, epochs[1][0].query_x)
    again = Batches(data, 8, seed=3).batch([5, 1])
    assert torch.equal(again[0][0].query_x, epochs[1][2].query_x)
    assert torch.equal(again[1][0].query_y, epochs[0][1].query_y)
    assert not torch.equal(Batches(data, 8, seed=4)[0][0].query_y, epochs[0][0].query_y)
    assert batches[0][0].n_way == 4 and len(batches[0][0].support_x) == 0
    varied = Batches(data, 8, seed=3, augment=Augment(padding=1))
    assert torch.equal(varied[4][0].query_y, epochs[1][1].query_y)
    assert not torch.equal(varied[4][0].query_x, epochs[1][1].query_x)
    assert torch.equal(varied[4][0].query_x, varied.batch([2, 4])[1][0].query_x)
    with pytest.raises(DataError, match="need at least 2 classes and 30 images for a batch, got 4 classes"):
        Batches(data, 30)


def test_the_gradient_is_that_of_cross_entropy_over_the_batch():
    model = MetricModel(Conv4(1, 4), LinearHead(4, 4), image_shape=(1, 16, 16)).double()
    x, y = torch.randn(8, 1, 16, 16, dtype=torch.float64), torch.arange(8) % 4
    (batch,) = Batches(ClassDataset(x, y.numpy()), 8)[0]
    config = Config(method="supervised").resolved()
    stats = meta_gradient(build_objective(config), L2GWrapper(model, 0.1), [(batch,)])
    loss = F.cross_entropy(model.head.linear(model.encoder(batch.query_x).flatten(1)), batch.query_y)
    assert stats.loss == pytest.approx(loss.item()) and np.isnan(stats.inner_loss)
    parameters = list(model.parameters())
    for p, g in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
        torch.testing.assert_close(p.grad, g)


def test_the_head_is_nearest_prototypes_in_evaluation_mode():
    head, plain = LinearHead(4, 9, distance="euclidean"), PrototypicalHead(distance="euclidean")
    z, q, y = torch.randn(3, 4), torch.randn(5, 4), torch.arange(3)
    assert torch.equal(head.eval()(z, y, q, 3), plain(z, y, q, 3))
    with pytest.raises(FitError, match="need batches of all 9 base classes to train on, got 3; .* by --weights RUN"):
        head.train()(z, y, q, 3)
    data = ClassDataset(torch.randn(24, 1, 16, 16), np.arange(24) // 6, split="validation")
    model = MetricModel(Conv4(1, 4), head)
    for distance in ("cosine", "euclidean"):
        head.nearest.distance = distance
        other = MetricModel(model.encoder, PrototypicalHead(distance=distance))
        found, expected = (evaluate(m, data, ways=3, queries=3, episodes=5) for m in (model, other))
        assert found.accuracies == expected.accuracies


def test_schedules():
    config = Config(method="supervised", iterations=10, lr=1.0).resolved()
    rates = [learning_rate(config, k) for k in range(10)]
    assert rates[0] == 1 and rates[5] == pytest.approx(0.5) and rates == sorted(rates, reverse=True)
    step = Config(schedule="step", iterations=10, lr=1.0).resolved()
    rounded = [round(learning_rate(step, k), 6) for k in range(10)]
    assert rounded == [1.0] * 6 + [0.1] * 2 + [0.01] * 2


def test_defaults_and_what_does_not_go_together():
    config = Config(method="supervised").resolved()
    assert (config.optimizer, config.lr, config.weight_decay, config.schedule) == ("sgd", 0.05, 5e-4, "cosine")
    assert Config(method="supervised", optimizer="adam").resolved().lr == 1e-3
    assert (Config().resolved().optimizer, Config().resolved().lr, Config().resolved().batch) == ("adam", 1e-3, None)
    assert calls_of_update(Config(method="supervised", tasks_per_update=2).resolved(), 3) == [((6, 0),), ((7, 0),)]
    wrapper = L2GWrapper(MetricModel(Conv4(1, 4), LinearHead(4, 4)), 0.1)
    optimizer = build_optimizer(config, wrapper)
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["momentum"] == 0.9
    for options, message in (
        ({"method": "supervised", "head": "relation"}, "for --method supervised, got --head relation"),
        ({"method": "supervised", "first_order": True}, "--method supervised does not take --first-order"),
        ({"method": "supervised", "adapt": ("head",)}, "--method supervised does not take --adapt"),
        ({"method": "episodic", "adapt": ("head",)}, "--method episodic does not take --adapt"),
        ({"batch": 3}, "--method l2g does not take --batch"),
        ({"weight_decay": 1e-4, "learn_inner_lr": "scalar"}, "--weight-decay would shrink learned step sizes"),
        ({"backbone_options": ("widths",)}, "need options as NAME=VALUE"),
        ({"adapt": ()}, "need --adapt to be one or more texts"),
    ):
        with pytest.raises(L2GError, match=message):
            Config(**options).resolved()


def test_the_command_leaves_a_run_that_evaluates_and_says_both_distances(pretrained, capsys):
    with open(pretrained / "log.csv", newline="") as file:
        log = list(csv.DictReader(file))
    assert [int(row["iteration"]) for row in log] == [1, 2, 3, 4]
    assert [bool(row["val_accuracy"]) for row in log] == [False, True, False, True]
    assert float(log[0]["lr"]) == 0.05 > float(log[3]["lr"])
    assert read_info(pretrained / "best.safetensors")["n_classes"] == load_tensors(pretrained / "best.safetensors")[0][
        "module.head.linear.weight"
    ].shape[0]  # fmt: skip
    assert main(["train", "--resume", str(pretrained)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"best validation \d", said)
    assert main(["evaluate", str(pretrained), "--episodes", "5"]) == 0
    assert "supervised linear (distance cosine), glyphs at 16 px: 5-way 1-shot" in capsys.readouterr().out


def test_resuming_gives_the_same_bits_with_dropblock_and_augmentation(tmp_path):
    options = ["pretrain", *SMALL, "--batch", "8", "--augment", "--backbone", "resnet12", "--iterations", "4"]
    options += ["--backbone-options", "widths=2,3,4,5", "drop_rate=0.3", "ramp=4"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out in (whole, parts):
        torch.manual_seed(0)  # of dropout and DropBlock
        assert main([*options, "--out", str(out)]) == 0
    (parts / "resume-4.safetensors").unlink()
    torch.manual_seed(99)
    assert main(["pretrain", "--resume", str(parts)]) == 0
    for name in ("last.safetensors", "best.safetensors"):
        a, b = load_file(whole / name), load_file(parts / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert int(load_file(whole / "last.safetensors")["module.encoder.blocks.3.drop.passes"]) == 4
    tensors, _ = load_tensors(parts / "resume-4.safetensors")
    assert any(name.endswith("momentum_buffer") for name in tensors)


@pytest.mark.parametrize(
    "more",
    [["--method", "l2g", "--adapt", "encoder.blocks.3"], ["--method", "maml-softmax", "--backbone", "conv4"]],
    ids=lambda more: more[1],
)
def test_training_begins_with_its_encoder(more, pretrained, tmp_path):
    out = tmp_path / "run"
    options = ["train", *SMALL, "--pairs", "1", "--iterations", "1", "--lr", "1e-9", "--weights", str(pretrained)]
    assert main([*options, *more, "--out", str(out)]) == 0
    theirs, _ = load_tensors(pretrained / "best.safetensors")
    ours, _ = load_tensors(out / "last.safetensors")
    prefix = "module.classifier.encoder." if "maml-softmax" in more else "module.encoder."
    conv = "blocks.0.conv.weight"
    torch.testing.assert_close(ours[prefix + conv], theirs["module.encoder." + conv], atol=1e-7, rtol=0)
    assert main(["train", "--resume", str(out)]) == 0


def test_a_head_of_the_same_kind_comes_along_and_another_encoder_is_refused(pretrained, tmp_path, capsys):
    options = ["train", *SMALL, "--pairs", "1", "--iterations", "1", "--lr", "1e-9", "--head", "matching"]
    first, second = tmp_path / "first", tmp_path / "second"
    options += ["--learn-temperature", "--temperature", "0.5"]
    assert main([*options, "--out", str(first)]) == 0
    tensors, info = load_tensors(first / "best.safetensors")
    name = next(name for name in tensors if name.startswith("module.head."))
    save_tensors(first / "best.safetensors", {**tensors, name: tensors[name] + 1}, info)
    assert main([*options, "--weights", str(first), "--out", str(second)]) == 0
    torch.testing.assert_close(load_tensors(second / "last.safetensors")[0][name], tensors[name] + 1)
    capsys.readouterr()
    other = ["train", *SMALL, "--backbone", "conv4-32", "--weights", str(pretrained), "--out", str(tmp_path / "third")]
    assert main(other) == 2
    err = capsys.readouterr().err
    assert "a run with --backbone conv4, has" in err and "use the same --backbone and options" in err
    assert not (tmp_path / "third").exists()


def test_a_damaged_header_and_data_from_python(pretrained, tmp_path):
    run = tmp_path / "run"
    data, validation = images(6, 8), images(5, 8)
    config = Config(method="supervised", batch=8, iterations=1, eval_episodes=2, queries=2, image_size=8, device="cpu")
    model = MetricModel(nn.Flatten(), LinearHead(64, 6))
    assert isinstance(train(config, run, data=data, validation=validation, model=model, progress=False), L2GWrapper)
    with pytest.raises(FitError, match="need the number of training classes"):
        build_model(config.resolved(), (1, 16, 16))
    tensors, info = load_tensors(pretrained / "best.safetensors")
    for n in (True, -1, 2**40, "5"):
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / "x" / "config.json").write_text((pretrained / "config.json").read_text())
        save_tensors(tmp_path / "x" / "best.safetensors", tensors, {**info, "n_classes": n})
        with pytest.raises(CheckpointError, match="need the number of training classes in a checkpoint's header"):
            load_run(tmp_path / "x")
