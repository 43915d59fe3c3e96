"""One run on several processes: the same meta-gradient, statistics and task stream as one process."""

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from l2g_meta import L2GWrapper
from l2g_meta.data import ClassDataset
from l2g_meta.evaluation.episodes import evaluate
from l2g_meta.evaluation.world import World, join, join_update
from l2g_meta.files.tensors import load_tensors
from l2g_meta.models.heads import PrototypicalHead
from l2g_meta.training.build import build_pairs
from l2g_meta.training.config import Config
from l2g_meta.training.log import read_log
from l2g_meta.training.loop import train
from l2g_meta.training.objectives import OBJECTIVES
from l2g_meta.training.signals import Stopped
from l2g_meta.training.update import Updater

pytestmark = pytest.mark.skipif(not dist.is_available() or sys.platform != "linux", reason="needs gloo and Linux")
IMAGES = np.random.default_rng(0).integers(0, 256, (72, 10, 10, 1), dtype=np.uint8)
DATA = ClassDataset(IMAGES, np.arange(72) // 6, split="test")
CONFIG = Config(
    ways=2, queries=2, pairs=5, iterations=6, eval_every=3, eval_episodes=7, device="cpu"
).resolved()  # fmt: skip
WORLDS = [1, 2, 3]


class Net(nn.Module):
    """Every kind of running statistics, a parameter that is not used, and a pass or two per task."""

    def __init__(self, passes=1, drop=0.0):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4)
        self.mean = nn.BatchNorm2d(4, momentum=None)
        self.each = nn.InstanceNorm2d(4, track_running_stats=passes == 1)  # it does not count
        self.idle, self.frozen = nn.Linear(2, 2), nn.BatchNorm2d(4)
        self.frozen.eval()
        self.head, self.passes, self.drop = PrototypicalHead(), passes, nn.Dropout(drop)

    def encoder(self, x):
        return self.drop(self.each(self.mean(self.norm(self.conv(x)).relu())))

    def forward(self, task):
        if self.passes == 2:
            return self.head(self.encoder(task.support_x), task.support_y, self.encoder(task.query_x), task.n_way)
        s, q = self.encoder(torch.cat([task.support_x, task.query_x])).split([len(task.support_x), len(task.query_x)])
        return self.head(s, task.support_y, q, task.n_way)


def ranks(size, function, *arguments, timeout=30, dies=None):
    """What ``function(world, *arguments)`` returns on each rank, as processes joined by gloo; one may die."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["l2g_meta.training.loop", "learn2learn"])
    queue = context.Queue()
    processes = [
        context.Process(target=_rank, args=(rank, size, port, queue, function, arguments, timeout))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    found = dict(queue.get(timeout=120) for rank in range(size) if rank != dies)
    for process in processes:
        process.join()
    assert dies is None or processes[dies].exitcode == 7
    return [found.get(rank) for rank in range(size)]


def _rank(rank, size, port, queue, function, arguments, timeout):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["L2G_RANK_TIMEOUT"] = str(timeout)
    if size == 1:
        del os.environ["RANK"]
    world, _ = join(torch.device("cpu"))
    try:
        queue.put((rank, function(world, *arguments)))
    except (Exception, Stopped) as error:
        queue.put((rank, f"{type(error).__name__}: {error}"))


def updates(world, config, passes):
    torch.manual_seed(0)
    wrapper = L2GWrapper(Net(passes).double(), 0.05)
    optimizer = torch.optim.Adam(wrapper.parameters())
    data = ClassDataset(torch.from_numpy(IMAGES).permute(0, 3, 1, 2).double() / 255, DATA.labels)
    pairs = build_pairs(config, data, torch.device("cpu"))
    update = Updater(config, OBJECTIVES[config.method], wrapper.train(), optimizer, pairs, world)
    found = []
    for k in range(3):
        stats, finite, _ = update(k)
        assert finite
        gradients = {name: None if p.grad is None else p.grad.numpy() for name, p in wrapper.named_parameters()}
        found.append((stats, gradients, {name: b.clone().numpy() for name, b in wrapper.named_buffers()}))
    return found


@pytest.mark.parametrize(
    "config, passes",
    [
        (CONFIG, 1),
        (CONFIG, 2),
        (Config(**{**vars(CONFIG), "method": "episodic"}), 1),
        (Config(**{**vars(CONFIG), "method": "episodic", "tasks_per_update": 3}), 1),
        (Config(**{**vars(CONFIG), "method": "maml", "pairs": 2}), 1),  # fewer than ranks
    ],
    ids=["l2g", "l2g, two passes", "episodic", "episodic, 3 tasks", "maml, 2 pairs"],
)
def test_the_same_meta_gradient_and_statistics(config, passes):
    (alone,) = ranks(1, updates, config, passes)
    for size in WORLDS[1:]:
        for found in ranks(size, updates, config, passes):
            assert not isinstance(found, str), found
            for (stats, gradients, buffers), (stats_, gradients_, buffers_) in zip(alone, found, strict=True):
                np.testing.assert_allclose(stats, stats_, rtol=1e-10)
                for name, gradient in gradients.items():
                    assert (gradient is None) == (gradients_[name] is None), name
                    if gradient is not None:
                        np.testing.assert_allclose(gradients_[name], gradient, rtol=1e-10, atol=1e-12, err_msg=name)
                for name, buffer in buffers.items():
                    np.testing.assert_allclose(buffers_[name], buffer, rtol=1e-10, atol=1e-12, err_msg=name)


def run(world, out, iterations, resume):
    torch.manual_seed(world.rank)  # a model that was made otherwise on each rank becomes that of the first
    config = Config(**{**vars(CONFIG), "iterations": iterations})
    wrapper = train(config, out, data=DATA, validation=DATA, model=Net(), resume=resume, force=True, progress=False)
    return {name: t.tolist() for name, t in wrapper.state_dict().items()}


def test_runs_of_every_size_are_one_run_and_go_on_with_another(tmp_path):
    """Rank 0 alone logs and saves; a run continues with another number of processes."""
    losses = {}
    for sizes in ([1, 1], [2, 3], [3, 1]):
        out = tmp_path / "-".join(map(str, sizes))
        ranks(sizes[0], run, out, 3, False)
        found = ranks(sizes[1], run, out, 6, True)
        assert all(f == found[0] for f in found) and isinstance(found[0], dict)  # the same bits on every rank
        rows = read_log(out)
        assert [row["iteration"] for row in rows] == list("123456")
        losses[out.name] = [float(row["loss"]) for row in rows], [row["val_accuracy"] for row in rows]
    for name, (loss, accuracy) in losses.items():
        np.testing.assert_allclose(loss, losses["1-1"][0], rtol=2e-3, err_msg=name)  # float32, six steps of Adam
        assert accuracy[2] == losses["1-1"][1][2] != ""


def random_run(world, out, iterations, resume):
    torch.manual_seed(7 + resume)  # what the generators are beforehand does not matter
    config = Config(**{**vars(CONFIG), "iterations": iterations})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net(drop=0.3)
    train(config, out, data=DATA, validation=DATA, model=model, resume=resume, force=True, progress=False)
    return [row["loss"] for row in read_log(out)]


def test_a_model_that_draws_goes_on_to_the_same_bits(tmp_path):
    whole = ranks(2, random_run, tmp_path / "whole", 6, False)
    ranks(2, random_run, tmp_path / "parts", 3, False)
    assert ranks(2, random_run, tmp_path / "parts", 6, True)[0] == whole[0]
    assert len(set(whole[0])) == 6


def accuracies(world, bn):
    torch.manual_seed(0)
    model = Net().double()
    data = ClassDataset(torch.from_numpy(IMAGES).permute(0, 3, 1, 2).double() / 255, DATA.labels, split="test")
    result = evaluate(model, data, ways=3, queries=2, episodes=5, runs=2, bn=bn, world=world)
    return result.accuracies, result.accuracy_mean, result.loss_mean


@pytest.mark.parametrize("bn", ["running", "batch"])
def test_evaluation_is_shared_with_the_same_result(bn):
    (alone,) = ranks(1, accuracies, bn)
    assert len(alone[0]) == 10
    for size in (2, 3, 11):
        for found in ranks(size, accuracies, bn):
            assert found[:2] == alone[:2] and found[2] == pytest.approx(alone[2], rel=1e-12)


class Odd(Net):
    """Something happens on one rank in update 2."""

    def __init__(self, what, rank):
        super().__init__()
        self.what, self.here, self.calls = what, rank == 1, [0]

    def forward(self, task):
        scores = super().forward(task)
        self.calls[0] += self.training
        if self.training and self.here and self.calls[0] == 10:  # two of five pairs, twice: the third update
            if self.what == "nan":
                return scores * float("nan")
            if self.what == "dies":
                os._exit(7)
            signal.raise_signal(signal.SIGTERM)
        return scores


def odd(world, what, out, skip):
    config = Config(**{**vars(CONFIG), "skip_nonfinite": skip})
    torch.manual_seed(0)
    wrapper = train(config, out, data=DATA, validation=DATA, model=Odd(what, world.rank), progress=False)
    return {name: t.tolist() for name, t in wrapper.state_dict().items()}


def test_all_ranks_take_the_same_branch(tmp_path):
    found = ranks(2, odd, "nan", tmp_path / "stops", False)
    assert all(f.startswith("NotFiniteError: update 2 (pairs 10 to 14") for f in found)
    found = ranks(2, odd, "nan", tmp_path / "skips", True)
    assert found[0] == found[1] and [r["skipped"] for r in read_log(tmp_path / "skips")] == list("001000")


def test_a_signal_to_one_rank_saves_once_and_stops_all(tmp_path):
    found = ranks(2, odd, "signal", tmp_path / "run", False)
    assert found == ["Stopped: stopped after update 4 of 6, saved"] * 2  # noticed by the update after
    assert load_tensors(tmp_path / "run" / "last.safetensors")[1]["iteration"] == 4
    assert len(read_log(tmp_path / "run")) == 4


def dies_while_saving(world, out, rank, write):
    """The n-th write of a file is cut off on rank 0, or waits there until the other rank is dead."""
    real, writes, flag = os.replace, [], out.with_suffix(".flag")

    def replace(source, target):
        writes.append(target)
        if len(writes) == write:
            if rank == 0:
                os._exit(7)
            flag.touch()
            time.sleep(0.5)
        real(source, target)

    def die():
        while not flag.exists():
            time.sleep(0.01)
        os._exit(7)

    if world.rank == 0:
        os.replace = replace
    elif rank == 1:
        threading.Thread(target=die, daemon=True).start()
    return run(world, out, 6, False)


@pytest.mark.parametrize(
    ("rank", "write"),
    [(0, 7), *(pytest.param(r, w, marks=pytest.mark.slow) for r in (0, 1) for w in range(1, 12))],
)
def test_a_rank_lost_while_saving(rank, write, tmp_path):
    """The survivor ends in an error; what is saved is whole, and the run goes on to what an undisturbed one finds."""
    (out := tmp_path / "run").parent.mkdir(exist_ok=True)
    found = ranks(2, dies_while_saving, out, rank, write, timeout=5, dies=rank)[1 - rank]
    assert "has lost another of 2 processes" in found, found
    for path in out.glob("*.safetensors"):
        load_tensors(path)
    (first,) = ranks(1, run, out, 6, (out / "config.json").exists())
    (whole,) = ranks(1, run, tmp_path / "whole", 6, False)
    assert not list(out.glob(".l2g-*")) and [row["iteration"] for row in read_log(out)] == list("123456")
    for name, values in whole.items():
        np.testing.assert_allclose(first[name], values, rtol=0.1, atol=0.01, err_msg=name)  # float32, six steps of Adam


def hangs(world):
    if world.rank == 1:
        time.sleep(15)
        return "too late"
    return world.sum(torch.ones(1)).item()


def test_a_rank_that_hangs_ends_the_others_after_the_timeout():
    first, second = ranks(2, hangs, timeout=3)
    assert first.startswith("L2GError: rank 0 has lost another of 2 processes, which died or said nothing for")
    assert second == "too late"


@pytest.mark.parametrize("torchrun", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_dead_rank_ends_the_others(tmp_path, torchrun):
    """As a user runs it; the survivor would wait forever without the timeout.

    torchrun may end the survivor before it has said a word, and names the dead rank itself.
    """
    script = tmp_path / "run.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from test_distributed import odd, World\n"
        f"odd(World(int(os.environ['RANK']), 2), 'dies', {str(tmp_path / 'run')!r}, False)\n"
    )
    here = {**os.environ, "OMP_NUM_THREADS": "1", "L2G_RANK_TIMEOUT": "20"}
    if torchrun:
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
        done = subprocess.run(launch, capture_output=True, text=True, timeout=150, check=False, env=here)
        assert done.returncode != 0 and re.search(r"rank +: 1 .*\n +exitcode +: 7 ", done.stderr), done.stderr[-2000:]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            here |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        both = [
            subprocess.Popen(
                [sys.executable, str(script)], env=here | {"RANK": rank}, stderr=subprocess.PIPE, text=True
            )
            for rank in "01"
        ]
        said = [process.communicate(timeout=150)[1] for process in both]
        assert both[0].returncode not in (0, 7) and both[1].returncode == 7
        assert "has lost another of 2 processes" in said[0] and "goes on from its last state with --resume" in said[0]
    assert load_tensors(tmp_path / "run" / "last.safetensors")[1]["iteration"] == 0  # whole


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_torchrun_saves(tmp_path, number):
    out = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    if number == signal.SIGUSR1:  # torchrun must be told
        if "--signals-to-handle" not in subprocess.run([*torchrun, "--help"], capture_output=True, text=True).stdout:
            pytest.skip("this torchrun hands no SIGUSR1 on")
        torchrun += ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"]
    command = [*torchrun, "--nproc-per-node", "2", "--standalone", "-m"]
    command += ["l2g_meta", "train", "--image-size", "16", "--iterations", "100000", "--eval-every", "100000"]
    command += ["--save-every", "100000", "--pairs", "2", "--queries", "2", "--device", "cpu", "--out", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    while not (out / "log.csv").exists() or len(read_log(out)) < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    rows, (_, info) = read_log(out), load_tensors(out / "last.safetensors")
    assert process.returncode != 0 and 3 <= info["iteration"] == len(rows), said[-3000:]
    assert f"stopped after update {info['iteration']} of 100000, saved" in said


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    command += ["l2g_meta", "train", "--image-size", "16", "--iterations", "4", "--eval-every", "2", "--pairs", "3"]
    command += ["--queries", "2", "--eval-episodes", "4", "--device", "cpu", "--out", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert done.stdout.count("best validation") == 1
    assert len(read_log(out)) == 4
    again = subprocess.run([*command[:9], "--resume", str(out)], capture_output=True, text=True, env=env)
    assert again.returncode == 0, again.stderr
    results = []
    for size in ("1", "2"):
        command[4], path = size, tmp_path / f"{size}.json"
        arguments = ["evaluate", str(out), "--episodes", "7", "--queries", "2", "--json", str(path)]
        done = subprocess.run([*command[:8], *arguments], capture_output=True, text=True, check=True, env=env)
        assert done.stdout.count("one model") == 1
        results.append(path.read_text())
    assert results[0] == results[1]


def test_shares():
    for n in range(8):
        for size in range(1, 5):
            shares = [World(rank, size).share(n) for rank in range(size)]
            assert [i for share in shares for i in share] == list(range(n))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_flat_buffer_per_update(monkeypatch):
    """Communication: one all-reduce, whatever the number of parameters and norms."""
    calls = []
    monkeypatch.setattr(World, "sum", lambda self, t: calls.append(t.shape) or t)
    module = Net()
    before = {name: b.clone() for name, b in module.named_buffers()}
    for p in module.conv.parameters():
        p.grad = torch.ones_like(p)
    values = join_update(World(0, 2), module, before, range(1), 2, torch.arange(3.0))
    assert len(calls) == 1 and len(calls[0]) == 1 and values == [0, 1, 2]


def test_ranks_join_where_the_model_is(monkeypatch):
    """Also the fixed step size, a number on the CPU wherever the model is."""
    devices = []
    monkeypatch.setattr(World, "sum", lambda self, t: devices.append(t.device.type) or torch.zeros(t.shape))
    wrapper = L2GWrapper(Net(), 0.1).to("meta")
    for p in wrapper.parameters():
        p.requires_grad_(False)
    before = {name: b.clone() for name, b in wrapper.named_buffers()}
    join_update(World(0, 2), wrapper, before, range(1), 2, torch.arange(3.0, device="meta"))
    assert devices == ["meta"] and wrapper.inner_lr.value.device.type == "cpu"
