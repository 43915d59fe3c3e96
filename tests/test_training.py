import csv
import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from l2g_meta import Conv4, L2GWrapper, MetricModel, PrototypicalHead
from l2g_meta.cli.main import main
from l2g_meta.data import ClassDataset, TaskPairs
from l2g_meta.errors import CheckpointError, L2GError
from l2g_meta.files.sealed import opened
from l2g_meta.files.tensors import load_tensors, save_tensors
from l2g_meta.training.build import build_model, load_run
from l2g_meta.training.config import Config
from l2g_meta.training.loop import train
from l2g_meta.training.task_stream import calls_of_update, tasks_of_calls


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder data set: 12 classes of 8 noisy blobs for every split."""
    from PIL import Image

    root, rng = tmp_path_factory.mktemp("blobs"), np.random.default_rng(0)
    for split in ("train", "validation", "test"):
        for c in range(12):
            centre = rng.integers(0, 200, (4, 4, 3))
            target = root / split / f"class{c:02d}"
            target.mkdir(parents=True)
            for k in range(8):
                pixels = np.kron(centre + rng.integers(0, 56, (4, 4, 3)), np.ones((4, 4, 1))).astype(np.uint8)
                Image.fromarray(pixels).save(target / f"{k}.png")
    return root


def flags(folder, out, *more, iterations=4):
    return [
        "train", "--data", "folder", "--root", str(folder), "--image-size", "16", "--ways", "3", "--queries", "2",
        "--pairs", "2", "--iterations", str(iterations), "--eval-every", "2", "--eval-episodes", "10",
        "--device", "cpu", "--out", str(out), *more,
    ]  # fmt: skip


def rows(out):
    with open(out / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "more",
    [
        ["--method", "l2g"],
        ["--method", "episodic"],
        ["--method", "episodic", "--tasks-per-update", "3"],
        ["--method", "maml"],
        ["--method", "maml", "--tasks-per-update", "1", "--first-order"],
        ["--head", "relation", "--reduction", "sum", "--bn", "batch"],
        ["--head", "matching", "--learn-inner-lr", "element", "--temperature", "0.1", "--learn-temperature"],
        ["--outer-ways", "5", "--outer-shots", "2", "--inner-steps", "2", "--distance", "squared", "--dims", "mean"],
        ["--shots", "1,2", "--outer-ways", "3,4", "--tasks-per-update", "3", "--method", "maml"],
        ["--head", "matching-fce", "--method", "episodic"],
        ["--method", "maml-softmax", "--inner-steps", "2", "--first-order"],
        ["--method", "meta-lstm", "--inner-steps", "2", "--tasks-per-update", "1", "--bn", "batch"],
    ],
    ids=" ".join,
)
def test_every_method_trains_logs_saves_and_evaluates(more, folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(flags(folder, out, *more)) == 0
    names = {p.name for p in out.iterdir()}
    assert names >= {"config.json", "log.csv", "last.safetensors", "best.safetensors", "curve.png"}
    log = rows(out)
    assert [int(row["iteration"]) for row in log] == [1, 2, 3, 4]
    assert [bool(row["val_accuracy"]) for row in log] == [False, True, False, True]
    bilevel = not {"episodic", "maml-softmax", "meta-lstm"} & set(more)
    assert all(bool(row["alignment"]) == bilevel for row in log)
    assert all((row["val_loss"] != "") == (row["val_accuracy"] != "") for row in log)
    wrapper, config = load_run(out, checkpoint="last")
    wrapper.load_state_dict(load_file(out / "last.safetensors"), strict=True)
    build_model(config, (3, 16, 16)).load_state_dict(wrapper.module.state_dict(), strict=True)
    assert main(["evaluate", str(out), "--episodes", "5", "--queries", "2", "--json", str(tmp_path / "r.json")]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert {"accuracy_mean", "ci95_episodes", "ci95_runs", "bn", "split"} <= set(result)
    assert 0 <= result["accuracy_mean"] <= 100 and result["ci95_runs"] is None and result["split"] == "test"
    assert "best validation" in capsys.readouterr().out


def test_resuming_gives_the_same_bits_and_a_finished_run_exits_0(folder, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["--learn-inner-lr", "tensor"]
    assert main(flags(folder, whole, *options, iterations=6)) == 0
    assert main(flags(folder, parts, *options, iterations=4)) == 0
    assert main(["train", "--resume", str(parts), "--iterations", "6", "--force"]) == 0
    for name in ("last.safetensors", "best.safetensors"):
        a, b = load_file(whole / name), load_file(parts / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    drop = ("seconds", "crc32")  # the latter of a row with the former
    assert [{k: v for k, v in r.items() if k not in drop} for r in rows(whole)] == [
        {k: v for k, v in r.items() if k not in drop} for r in rows(parts)
    ]
    assert sorted(p.name for p in parts.glob("resume-*")) == ["resume-4.safetensors", "resume-6.safetensors"]
    before = (parts / "last.safetensors").read_bytes()
    assert main(["train", "--resume", str(parts)]) == 0
    assert (parts / "last.safetensors").read_bytes() == before and len(rows(parts)) == 6


def test_several_runs_are_seeds(folder, tmp_path, capsys):
    outs = [tmp_path / str(seed) for seed in (1, 2)]
    for seed, out in zip((1, 2), outs, strict=True):
        assert main(flags(folder, out, "--seed", str(seed), iterations=2)) == 0
    json_file = tmp_path / "deep" / "r.json"
    options = ["--episodes", "5", "--queries", "2", "--json", str(json_file)]
    assert main(["evaluate", str(outs[0]), str(outs[0])]) == 2
    assert "need runs with different seeds" in capsys.readouterr().err
    twin = tmp_path / "twin"
    assert main(flags(folder, twin, "--seed", "1", iterations=2)) == 0
    assert main(["evaluate", str(outs[0]), str(twin), "--json", str(tmp_path / "no.json")]) == 2
    assert "need runs with different seeds" in capsys.readouterr().err and not (tmp_path / "no.json").exists()
    other = tmp_path / "other"
    assert main(flags(folder, other, "--method", "episodic", iterations=2)) == 0
    assert main(["evaluate", str(outs[0]), str(other)]) == 2
    assert "need runs that differ in their seed alone, got --method l2g, not episodic; " in capsys.readouterr().err
    assert main(["evaluate", str(outs[0]), *options, "--against", str(other)]) == 0
    five = tmp_path / "five"
    assert main(flags(folder, five, "--shots", "2", iterations=2)) == 0
    capsys.readouterr()
    assert main(["evaluate", str(outs[0]), *options, "--against", str(five)]) == 2
    out, err = capsys.readouterr()
    assert "need the same shots to compare" in err and "choose by --shots" in err and not out
    assert main(["evaluate", *map(str, outs), *options, "--against", *map(str, reversed(outs))]) == 0
    result = json.loads(json_file.read_text())
    assert result["ci95_runs"] > 0 or result["run_means"][0] == result["run_means"][1]
    assert result["difference_mean"] == pytest.approx(0) and len(result["against"]) == 2
    assert [c["seed"] for c in result["against_configs"]] == [2, 1] and len(result["against_run_means"]) == 2
    printed = capsys.readouterr().out
    assert "over 2 trained models" in printed and "difference, paired over the same episodes: +0.00" in printed


def test_training_learns(folder, tmp_path):
    config = Config(
        data="folder", root=str(folder), image_size=16, ways=3, queries=2, pairs=2, iterations=30, eval_every=30,
        eval_episodes=50, device="cpu", method="episodic",
    )  # fmt: skip
    train(config, tmp_path / "run", progress=False)
    losses = [float(row["loss"]) for row in rows(tmp_path / "run")]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_own_data_and_model_from_python(tmp_path, capsys):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = MetricModel(Conv4(1, 4), PrototypicalHead())

        def forward(self, task):
            return self.net(task)

    data = ClassDataset(torch.randn(60, 1, 16, 16), torch.arange(60) // 6)
    config = Config(ways=3, queries=2, iterations=2, eval_every=2, eval_episodes=3, device="cpu")
    wrapper = train(config, tmp_path / "own", data=data, validation=data, model=Own(), progress=False)
    assert isinstance(wrapper, L2GWrapper) and isinstance(wrapper.module, Own)
    with pytest.raises(CheckpointError, match="holds a model given from Python"):
        load_run(tmp_path / "own")
    train(config, tmp_path / "own-data", data=data, validation=data, progress=False)
    assert load_run(tmp_path / "own-data")[0].module.encoder.blocks[0].conv.in_channels == 1
    for command in (["evaluate", str(tmp_path / "own-data")], ["train", "--resume", str(tmp_path / "own-data")]):
        assert main(command) == 2
        assert "was given its data from Python" in capsys.readouterr().err


def test_methods_share_one_stream():
    data = ClassDataset(torch.arange(96.0)[:, None], torch.arange(96) // 6)
    pairs = TaskPairs(data, ways=2, shots=1, queries=2, seed=3)

    def rows_of(config, k=1):
        return [
            [t.support_x.flatten().tolist() for t in tasks]
            for tasks in tasks_of_calls(pairs, calls_of_update(config, k))
        ]

    l2g = rows_of(Config(pairs=2).resolved())
    # one task's graph at a time
    assert rows_of(Config(method="episodic", pairs=2).resolved()) == [[task] for tasks in l2g for task in tasks]
    assert rows_of(Config(method="maml", pairs=2).resolved()) == [[tasks[0]] for tasks in l2g]
    singles = rows_of(Config(method="episodic", pairs=2, tasks_per_update=4).resolved())
    assert sum(singles, []) == sum(l2g, [])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ways", "7"], "a disjoint pair needs 14 classes, the train split has 12; lower ways to 6 each, or add"),
        (["--tasks-per-update", "3"], "--method l2g does not take --tasks-per-update"),
        (["--pairs", "0"], "--pairs to be at least 1, got 0"),
        (["--seed", "-1"], "--seed"),
        (["--lr", "0"], "--lr above 0"),
        (["--temperature", "0"], "--temperature above 0 and finite, got 0.0"),
        (
            ["--head", "nothing"],
            "--head to be one of prototypical, relation, matching, matching-fce or package.module:Class",
        ),
        (["--head", "nowhere.at_all:Head"], "cannot load --head nowhere.at_all:Head"),
        (
            ["--head", "relation", "--distance", "cosine"],
            "RelationHead does not take these options: got an unexpected keyword",
        ),
        (["--backbone", "conv4", "--head", "relation"], "at least 4×4"),
        (["--root", "/nowhere"], "/nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_exits_2_with_one_line(more, message, folder, tmp_path, capsys):
    assert main(flags(folder, tmp_path / "run", *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("l2g: ") and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_run_is_never_overwritten(folder, tmp_path, capsys):
    assert main(flags(folder, tmp_path / "run", iterations=1)) == 0
    assert main(flags(folder, tmp_path / "run", iterations=1)) == 2
    assert "already holds a run; --resume" in capsys.readouterr().err
    assert main(["train", "--resume", str(tmp_path / "run"), "--seed", "3"]) == 2
    assert "was trained with so far, got --seed 3, not 0; leave that out" in capsys.readouterr().err
    assert main(["train", "--resume", str(tmp_path / "nothing")]) == 2
    assert main(["evaluate", str(tmp_path / "nothing")]) == 2
    (tmp_path / "file").write_text("")
    assert main(flags(folder, tmp_path / "file" / "run", iterations=1)) == 2
    assert "cannot make" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    data = ClassDataset(torch.full((60, 1, 16, 16), float("nan")), torch.arange(60) // 6)
    config = Config(ways=3, queries=2, iterations=2, device="cpu")
    with pytest.raises(
        L2GError,
        match=r"update 0 \(pairs 0 to 1 of the stream of seed 0\) found a number that is not finite: inner loss nan",
    ):
        train(config, tmp_path / "run", data=data, validation=data, progress=False)


def test_users_own_parts_by_name(folder, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "from l2g_meta import PrototypicalHead\n"
        "class Head(nn.Module):\n"
        "    def __init__(self, dim):\n"
        "        super().__init__(); self.fc = nn.Linear(dim, 5); self.inner = PrototypicalHead()\n"
        "    def forward(self, s, y, q, n):\n"
        "        return self.inner(self.fc(s.flatten(1)), y, self.fc(q.flatten(1)), n)\n"
        "class Backbone(nn.Module):\n"
        "    def __init__(self, in_channels):\n"
        "        super().__init__(); self.conv = nn.Conv2d(in_channels, 3, 3, stride=4)\n"
        "    def forward(self, x):\n"
        "        return self.conv(x)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "run"
    assert main(flags(folder, out, "--head", "mine:Head", "--backbone", "mine:Backbone", iterations=2)) == 0
    assert type(load_run(out, trust=True)[0].module.head).__name__ == "Head"
    assert main(flags(folder, tmp_path / "x", "--backbone", "torch.nn:Conv2d")) == 2


def test_damaged_and_foreign_checkpoints(folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(flags(folder, out, iterations=1)) == 0
    save_tensors(out / "best.safetensors", {"x": torch.ones(2)}, load_tensors(out / "best.safetensors")[1])
    assert main(["evaluate", str(out)]) == 2
    assert "belongs to another model" in capsys.readouterr().err
    (out / "best.safetensors").write_bytes(b"torn")
    assert main(["evaluate", str(out)]) == 2
    assert "need a checkpoint in" in capsys.readouterr().err


def test_the_module_is_the_command(capsys):
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-m", "l2g_meta", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0.2.0"
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "--learn-inner-lr" in capsys.readouterr().out


def test_devices_that_are_not_there(folder, tmp_path, capsys):
    for device in ("cuda:7", "gpu"):
        arguments = flags(folder, tmp_path / "run")
        arguments[arguments.index("cpu")] = device
        assert main(arguments) == 2
        assert f"cannot use --device {device}" in capsys.readouterr().err


def test_validation_data_is_needed_beside_data(tmp_path):
    data = ClassDataset(torch.randn(60, 1, 16, 16), torch.arange(60) // 6)
    with pytest.raises(L2GError, match="need validation data beside data"):
        train(Config(device="cpu"), tmp_path / "run", data=data)


def test_a_run_stopped_before_its_first_validation_resumes(folder, tmp_path, monkeypatch, capsys):
    import l2g_meta.training.loop as training

    def stop(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "validate", stop)
        assert main(flags(folder, tmp_path / "run")) == 130
    assert "--resume" in capsys.readouterr().err
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert [int(row["iteration"]) for row in rows(tmp_path / "run")] == [1, 2, 3, 4]


def test_one_episode_has_no_interval_and_the_json_is_valid(folder, tmp_path, capsys):
    assert main(flags(folder, tmp_path / "run", iterations=1)) == 0
    path = tmp_path / "r.json"
    assert main(["evaluate", str(tmp_path / "run"), "--episodes", "1", "--queries", "2", "--json", str(path)]) == 0
    result = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert result["ci95_episodes"] is None
    assert "2 queries, test, BatchNorm running" in (printed := capsys.readouterr().out) and "nan" not in printed


def test_the_config_holds_the_heads_defaults(folder, tmp_path):
    assert main(flags(folder, tmp_path / "run", iterations=1)) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    stored = {name: config[name] for name in ("distance", "dims", "temperature", "reduction", "outer_ways")}
    assert stored == {"distance": "euclidean", "dims": "sum", "temperature": 1.0, "reduction": "mean", "outer_ways": 3}


def test_blown_up_weights_are_never_saved(folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(flags(folder, out, "--lr", "1e30", "--eval-every", "1")) == 2
    assert "NaN" in capsys.readouterr().err
    assert all(t.isfinite().all() for t in load_file(out / "last.safetensors").values() if t.is_floating_point())
    for flag in ("--lr", "--inner-lr"):
        assert main(flags(folder, tmp_path / "x", flag, "inf")) == 2


def test_validation_data_is_checked_before_training(tmp_path):
    data = ClassDataset(torch.randn(60, 1, 16, 16), torch.arange(60) // 6)
    few = ClassDataset(torch.randn(8, 1, 16, 16), torch.arange(8) // 2)
    one = ClassDataset(torch.randn(8, 1, 16, 16), torch.zeros(8, dtype=int))
    config = Config(ways=3, queries=2, device="cpu")
    for validation, message in ((few, "needs 3 examples of every class"), (one, "need validation on at least 2 ways")):
        with pytest.raises(L2GError, match=message):
            train(config, tmp_path / "run", data=data, validation=validation)
        assert not (tmp_path / "run").exists()


def test_one_validation_episode_still_gives_a_curve(folder, tmp_path):
    assert main(flags(folder, tmp_path / "run", "--eval-episodes", "1", iterations=1)) == 0
    assert (tmp_path / "run" / "curve.png").exists()


def test_runs_resume_from_another_folder_and_with_moved_data(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert main(flags(folder.name, tmp_path / "run", iterations=1)) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--resume", "run"]) == 0
    assert main(["train", "--resume", "run", "--root", str(folder), "--device", "cpu"]) == 0
    assert main(["train", "--resume", "run", "--root", "/nowhere"]) == 2


def test_configs_of_the_wrong_type_and_unwritable_json(folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(flags(folder, out, iterations=1)) == 0
    assert main(["evaluate", str(out), "--json", str(tmp_path)]) == 2
    assert "need a file to write for --json" in capsys.readouterr().err
    config = opened(json.loads((out / "config.json").read_text()))
    (out / "config.json").write_text(json.dumps({**config, "ways": "3"}))
    assert main(["train", "--resume", str(out)]) == 2
    assert "need --ways to be of type int or list, got '3'" in capsys.readouterr().err
    assert main(["evaluate", str(out)]) == 2


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (
            ["--method", "maml-softmax", "--head", "relation"],
            "need no --head, its own being softmax, for --method maml-softmax, got --head relat",
        ),
        (["--head", "softmax"], "need a metric head for --method l2g, got --head softmax"),
        (["--method", "meta-lstm", "--learn-inner-lr", "scalar"], "--method meta-lstm does not take --learn-inner-lr"),
        (
            ["--method", "maml-softmax", "--outer-ways", "4"],
            "needs one number of ways, got --ways 3 and --outer-ways 4",
        ),
        (
            ["--method", "maml-softmax", "--distance", "squared"],
            "--method maml-softmax does not take --distance; leave",
        ),
        (["--method", "meta-lstm", "--first-order"], "--method meta-lstm does not take --first-order; leave"),
        (["--clip-norm", "0"], "need --clip-norm above 0 and finite, got 0.0"),
        (["--shots", "1,0"], r"need --shots to be at least 1, got \(1, 0\)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_exclude_each_other(more, complaint, folder, tmp_path, capsys):
    assert main(flags(folder, tmp_path / "run", *more)) == 2
    assert re.search(complaint, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_sizes_that_are_no_numbers(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(flags(folder, tmp_path / "run", "--shots", "1,few"))
    assert "need a number, or several as 1,5,10, got '1,few'" in capsys.readouterr().err


def test_the_meta_gradient_is_clipped(folder, tmp_path):
    options = {"data": "folder", "root": str(folder), "image_size": 16, "ways": 3, "queries": 2, "pairs": 1}
    config = Config(**options, iterations=1, eval_every=1, eval_episodes=2, device="cpu", clip_norm=1e-3)
    wrapper = train(config, tmp_path / "run", progress=False)
    norm = torch.stack([p.grad.norm() for p in wrapper.parameters()]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_validation_is_on_tasks_like_t_j_and_names_its_ways(folder, tmp_path, capsys):
    assert main(flags(folder, tmp_path / "run", "--outer-ways", "4,20", "--outer-shots", "2")) == 2
    assert "a disjoint pair needs 23 classes, the train split has 12" in capsys.readouterr().err
    assert main(flags(folder, tmp_path / "run", "--outer-ways", "4,9", "--outer-shots", "2", iterations=2)) == 0
    assert "(4/9-way 2-shot, BatchNorm running)" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["l2g", "maml-softmax", "meta-lstm"])
def test_validation_on_fewer_ways_than_training(method, tmp_path):
    """As on a split of few classes: every method is validated on as many ways as there are, and says so."""
    data = ClassDataset(torch.randn(60, 1, 16, 16), torch.arange(60) // 6)
    few = ClassDataset(torch.randn(18, 1, 16, 16), torch.arange(18) // 6)
    config = Config(
        method=method, ways=5, queries=2, pairs=1, iterations=1, eval_every=1, eval_episodes=3, device="cpu"
    )
    train(config, tmp_path / "run", data=data, validation=few, progress=False)
    tensors, info = load_tensors(tmp_path / "run" / "best.safetensors")
    assert info["val_ways"] == 3 and 0 <= info["val_accuracy"] <= 100
