"""Whatever happens to a run: it goes on to the same bits, or ends in a clear error; nothing that was saved is lost."""

import csv
import errno
import itertools
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from l2g_meta.cli.main import main
from l2g_meta.data import ClassDataset
from l2g_meta.errors import CheckpointError, NotFiniteError
from l2g_meta.files import tensors as checkpoint
from l2g_meta.files import writing
from l2g_meta.files.tensors import load_tensors
from l2g_meta.models.heads import PrototypicalHead
from l2g_meta.training import checkpoints as state
from l2g_meta.training.config import Config
from l2g_meta.training.loop import train
from l2g_meta.training.run_folder import holds_run
from l2g_meta.training.signals import Stopped
from l2g_meta.training.update import Updater

DATA = ClassDataset(np.random.default_rng(0).integers(0, 256, (72, 12, 12, 1), dtype=np.uint8), np.arange(72) // 6)
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
CONFIG = Config(
    ways=2, queries=2, pairs=2, iterations=12, eval_every=4, save_every=2, eval_episodes=4, device="cpu",
    learn_inner_lr="tensor", mix=0.0,  # whose best weights are not its last
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _three_states():
    """One more than a run keeps, so that two can be damaged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "KEPT", 3)
        yield


class Net(nn.Module):
    """Small, with a norm and with randomness of its own: what resuming has to put back."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2))
        self.head = PrototypicalHead()

    def forward(self, task):
        s, q = self.encoder(torch.cat([task.support_x, task.query_x])).split([len(task.support_x), len(task.query_x)])
        return self.head(s, task.support_y, q, task.n_way)


def go(out, *, resume=False, force=True, config=CONFIG, **options):
    torch.manual_seed(0)
    return train(
        config, out, data=DATA, validation=DATA, model=options.pop("model", Net)(), resume=resume, force=force,
        progress=False, **options,
    )  # fmt: skip


def contents(out):
    """All that a run leaves and that says something about it: tensors, headers, log without the seconds."""
    found = {}
    for path in out.glob("*.safetensors"):
        tensors, info = load_tensors(path)
        if isinstance(info["pending"], dict):
            info["pending"].pop("seconds")
        found[path.name] = {name: t.tolist() for name, t in tensors.items()}, info
    with open(out / "log.csv", newline="") as file:
        rows = [{k: v for k, v in row.items() if k not in ("seconds", "crc32")} for row in csv.DictReader(file)]
    return found, rows


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    """Tests may themselves run in a job."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    go(out)
    return contents(out)


def finish(out):
    """Goes on with a run, or begins it if it was stopped before it could be resumed; also in a process of its own."""
    state.KEPT = 3
    go(out, resume=(out / "config.json").exists())


class TestKilled:
    @FORKS
    @pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
    def test_at_random_moments(self, kills, whole, tmp_path):
        out, rng, killed = tmp_path / "run", np.random.default_rng(kills), 0
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["l2g_meta.training.loop", "learn2learn", "matplotlib.pyplot"])
        for _ in range(3 * kills):
            process = context.Process(target=finish, args=(out,))
            process.start()
            while not (out / "log.csv").exists() and process.is_alive():
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))
            killed += process.is_alive()
            process.kill()
            process.join()
            if killed == kills:
                break
            if process.exitcode == 0:
                shutil.rmtree(out)
        assert killed == kills
        finish(out)
        assert contents(out) == whole

    @pytest.mark.parametrize("write", range(12))
    def test_during_each_write(self, write, whole, tmp_path, monkeypatch):
        """A process that ends within the n-th write of a file, before it is renamed."""
        out, real, done = tmp_path / "run", os.replace, []

        def stop(source, target):
            done.append(target)
            if len(done) == write + 1:
                raise SystemExit("killed")
            real(source, target)

        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(os, "replace", stop)
            patch.setattr(writing, "_remove", lambda path: None)  # nobody is left to do so
            go(out)
        finish(out)
        assert contents(out) == whole and not list(out.glob(".l2g-*"))


def test_what_a_model_draws_is_the_seeds(tmp_path):
    """Dropout: the same run again, whatever was drawn before; PyTorch's generator is left as it was."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(0)
        net = Net()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        train(CONFIG, tmp_path / str(seed), data=DATA, validation=DATA, model=net, progress=False)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(contents(tmp_path / str(seed)))
    weights = [{name: part for name, part in files.items() if "resume" not in name} for files, _ in found]
    assert weights[0] == weights[1] and found[0][1] == found[1][1]


class TestDamaged:
    @pytest.fixture
    def run(self, tmp_path):
        out = tmp_path / "run"
        go(out, config=Config(**{**vars(CONFIG), "iterations": 8}))
        return out

    @pytest.mark.parametrize("damage", ["empty", "half", "99 %", "a bit", "a bit of the header", "missing"])
    def test_the_state_before_is_used(self, damage, run, whole):
        path = run / "resume-8.safetensors"
        content = bytearray(path.read_bytes())
        if damage == "missing":
            path.unlink()
        else:
            where = {"a bit": len(content) - 9, "a bit of the header": 60}.get(damage, 0)
            content[where] ^= 4 * (where > 0)
            path.write_bytes(content[: int({"empty": 0, "half": 0.5, "99 %": 0.99}.get(damage, 1) * len(content))])
        if damage == "missing":
            go(run, resume=True)
        else:
            with pytest.warns(UserWarning, match=r"resume-8\.safetensors.* going on from resume-6\.safetensors"):
                go(run, resume=True)
        found, rows = contents(run)
        assert rows == whole[1]
        assert found["last.safetensors"] == whole[0]["last.safetensors"]
        assert found["best.safetensors"] == whole[0]["best.safetensors"]

    def test_without_a_sound_one_nothing_is_begun_anew(self, run, capsys):
        for n in state.numbers(run):
            (run / f"resume-{n}.safetensors").write_bytes(b"torn")
        before = {p.name: p.read_bytes() for p in run.iterdir()}
        assert main(["train", "--resume", str(run)]) == 2
        error = capsys.readouterr().err
        assert all(f"resume-{n}.safetensors" in error for n in state.numbers(run)) and len(state.numbers(run)) == 3
        assert {p.name: p.read_bytes() for p in run.iterdir()} == before

    def test_the_best_weights_are_made_again_or_said_to_be_lost(self, run, tmp_path):
        best = load_tensors(run / "best.safetensors")
        n = best[1]["iteration"]
        (run / "best.safetensors").write_bytes(b"")
        lost = tmp_path / "lost"
        shutil.copytree(run, lost)
        for validated in (4, 8):  # what is left is the state after 6, whose best are the weights after 4
            (lost / f"resume-{validated}.safetensors").unlink()
        if n in state.numbers(run):
            with pytest.warns(UserWarning, match=f"made again from the state after update {n}"):
                go(run, resume=True)
        with pytest.warns(UserWarning, match="the best weights of .* at update 4 are lost"):
            go(lost, resume=True)
        assert load_tensors(lost / "best.safetensors")[1]["iteration"] in (8, 12)

    @pytest.mark.parametrize("config", [None, "", "{"])
    def test_states_without_a_config_are_never_begun_anew(self, config, tmp_path, capsys):
        small = ["--image-size", "16", "--iterations", "3", "--eval-every", "1", "--eval-episodes", "2", "--pairs", "1"]
        command = ["train", "--out", str(tmp_path / "run"), *small, "--queries", "2", "--device", "cpu"]
        assert main(command) == 0
        before = (tmp_path / "run" / "log.csv").read_bytes()
        (tmp_path / "run" / "config.json").unlink()
        if config is not None:
            (tmp_path / "run" / "config.json").write_text(config)
        assert main(command) == 2
        assert "already holds a run" in capsys.readouterr().err
        for again in ([*command, "--resume"], ["train", "--resume", str(tmp_path / "run")]):
            assert main(again) == 0
            assert (tmp_path / "run" / "log.csv").read_bytes() == before
        assert main(["train", "--resume", str(tmp_path / "run"), "--iterations", "1", "--force"]) == 2
        assert "has 3 updates, need --iterations 3 or more, got 1" in capsys.readouterr().err

    def test_another_config_from_python_is_refused_too(self, run):
        other, before = Config(**{**vars(CONFIG), "lr": 0.5}), (run / "last.safetensors").read_bytes()
        with pytest.raises(CheckpointError, match=r"got --lr 0\.5, not 0\.001; .*train\(\.\.\., force=True\)"):
            go(run, resume=True, force=False, config=other)
        assert (run / "last.safetensors").read_bytes() == before
        go(run, resume=True, config=other)

    @pytest.mark.parametrize("left", ["best.safetensors", "last.safetensors", "log.csv"])
    def test_what_is_left_of_a_run_is_not_begun_anew(self, left, run):
        for path in run.iterdir():
            if path.name != left:
                path.unlink()
        before = (run / left).read_bytes()
        assert holds_run(run)
        with pytest.raises(CheckpointError, match="already holds a run"):
            go(run)
        with pytest.raises(CheckpointError, match=r"need a state to go on from in .*, got: none; put a copy of one"):
            go(run, resume=True)
        assert (run / left).read_bytes() == before

    def test_last_weights_are_made_again(self, run, whole):
        sound = load_tensors(run / "last.safetensors")
        (run / "last.safetensors").write_bytes(b"torn")
        config = Config(**{**vars(CONFIG), "iterations": 8})
        with pytest.warns(UserWarning, match="made again from the state after update 8"):
            go(run, resume=True, config=config)
        found = load_tensors(run / "last.safetensors")
        assert all(torch.equal(found[0][name], t) for name, t in sound[0].items())

    def test_best_weights_of_a_finished_run_become_the_last(self, run):
        for n in state.numbers(run)[:-1]:
            (run / f"resume-{n}.safetensors").unlink()
        if load_tensors(run / "best.safetensors")[1]["iteration"] == 8:
            pytest.skip("the last are the best")
        (run / "best.safetensors").write_bytes(b"torn")
        with pytest.warns(UserWarning, match="are lost, the last ones are kept instead"):
            go(run, resume=True, config=Config(**{**vars(CONFIG), "iterations": 8}))
        load_tensors(run / "best.safetensors")

    @pytest.mark.parametrize("damage", [b'"', b"\xff", b",", b"\xc2\xb2,"])
    def test_a_log_with_a_damaged_line_loses_that_line(self, damage, run, whole):
        lines = (run / "log.csv").read_bytes().splitlines(keepends=True)
        lines[3] = damage + lines[3]
        (run / "log.csv").write_bytes(b"".join(lines))
        with pytest.warns(UserWarning, match="lacks 1 of the 8 updates before"):
            go(run, resume=True)
        assert contents(run)[1] == [row for row in whole[1] if row["iteration"] != "3"]

    def test_a_finished_run_without_its_log(self, run):
        (run / "log.csv").unlink()
        with pytest.warns(UserWarning, match="lacks 8 of the 8 updates"):
            go(run, resume=True, config=Config(**{**vars(CONFIG), "iterations": 8}))

    def test_a_log_that_is_torn_or_lost(self, run, whole):
        log = (run / "log.csv").read_bytes()
        (run / "log.csv").write_bytes(log[:-7])  # of update 8, which resuming from 8 cannot write again
        with pytest.warns(UserWarning, match="lacks 1 of the 8 updates before"):
            go(run, resume=True)
        assert contents(run)[1] == [row for row in whole[1] if row["iteration"] != "8"]


class TestNoPlace:
    @pytest.mark.parametrize("write", range(1, 15))
    def test_disk_full_at_each_write(self, write, whole, tmp_path, monkeypatch):
        out, real, done = tmp_path / "run", os.fsync, []

        def full(descriptor):
            done.append(descriptor)
            if len(done) == write + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="No space left on device"):
            patch.setattr(os, "fsync", full)
            go(out)
        assert not list(out.glob(".l2g-*"))
        for path in out.glob("*.safetensors"):
            load_tensors(path)  # what is there is whole
        finish(out)
        assert contents(out) == whole

    @pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs a small file system of its own")
    def test_a_disk_that_is_really_full(self, tmp_path):
        disk = tmp_path / "disk"
        disk.mkdir()
        if subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=False).returncode:
            pytest.skip("may not mount")
        try:
            with pytest.raises(CheckpointError, match="No space left on device"):
                go(disk / "run", config=Config(**{**vars(CONFIG), "iterations": 2000, "eval_every": 2000}))
            before = {p.name: p.read_bytes() for p in (disk / "run").glob("*.safetensors")}
            with pytest.raises(CheckpointError, match="No space left on device"):
                go(disk / "run", resume=True, config=Config(**{**vars(CONFIG), "iterations": 2000, "eval_every": 2000}))
            assert {p.name: p.read_bytes() for p in (disk / "run").glob("*.safetensors")} == before
        finally:
            subprocess.run(["/bin/umount", str(disk)], check=True)

    @FORKS
    def test_a_folder_that_cannot_be_written_is_found_before_the_first_step(self, tmp_path):
        out = tmp_path / "run"
        go(out, config=Config(**{**vars(CONFIG), "iterations": 4}))
        before = {p.name: p.read_bytes() for p in out.iterdir()}
        for folder in (tmp_path, out):
            folder.chmod(0o555)
        context = multiprocessing.get_context("fork")
        queue = context.Queue()

        def as_nobody():
            torch.set_num_threads(1)  # the parent's threads are not there
            if os.geteuid() == 0:
                for parent in reversed(tmp_path.parents):
                    if len(parent.parts) > 2:
                        parent.chmod(parent.stat().st_mode | 0o055)
                os.setuid(65534)
            for folder, resume in ((tmp_path / "new", False), (out, True)):
                try:
                    go(folder, resume=resume)
                    queue.put("trained")
                except CheckpointError as error:
                    queue.put(str(error))

        process = context.Process(target=as_nobody)
        process.start()
        messages = [queue.get(timeout=60) for _ in range(2)]
        process.join()
        for folder in (tmp_path, out):
            folder.chmod(0o755)
        assert "cannot make" in messages[0] and "Permission denied" in messages[0]
        assert "Permission denied" in messages[1]
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def rows_of(out):
    """Updates in a run's log, which may not be there yet."""
    return len((out / "log.csv").read_text().splitlines()) - 1 if (out / "log.csv").exists() else 0


def hear_interrupts():
    """A process that a shell started in the background ignores SIGINT, and so do its children and the library."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


class TestSignals:
    @pytest.fixture(autouse=True)
    def interrupts(self):
        before = signal.getsignal(signal.SIGINT)
        hear_interrupts()
        yield
        signal.signal(signal.SIGINT, before)

    @pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
    @pytest.mark.parametrize("rung", [3, 4])  # 4: before a validation, which is the resumed run's
    def test_finish_the_update_save_and_end(self, name, rung, whole, tmp_path, monkeypatch):
        out, number = tmp_path / "run", getattr(signal, name)
        before = signal.getsignal(number)
        with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
            ring_after(patch, rung, number)
            go(out)
        assert stopped.value.code == 128 + number and f"after update {rung} of 12, saved" in str(stopped.value)
        assert max(state.numbers(out)) == rung
        assert signal.getsignal(number) == before
        go(out, resume=True)
        found, rows = contents(out)
        assert rows == whole[1] and found["last.safetensors"] == whole[0]["last.safetensors"]

    def test_during_validation_ends_at_once(self, whole, tmp_path, monkeypatch):
        import l2g_meta.training.loop as training

        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(training, "evaluate", lambda *a, **o: signal.raise_signal(signal.SIGTERM))
            go(tmp_path / "run")
        go(tmp_path / "run", resume=True)
        assert contents(tmp_path / "run") == whole

    def test_a_second_one_during_the_save_changes_nothing(self, whole, tmp_path, monkeypatch):
        real, out = os.fsync, tmp_path / "run"

        def again(descriptor):
            signal.raise_signal(signal.SIGTERM)
            real(descriptor)

        with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
            ring_after(patch, 3, signal.SIGTERM, then=lambda: patch.setattr(os, "fsync", again))
            go(out)
        assert stopped.value.code == 143 and max(state.numbers(out)) == 3
        go(out, resume=True)
        assert contents(out)[1] == whole[1]

    def test_the_command_ends_with_the_documented_code(self, tmp_path):
        out = tmp_path / "run"
        command = [sys.executable, "-m", "l2g_meta", "train", "--out", str(out), "--resume", "--image-size", "16"]
        command += ["--iterations", "100000", "--device", "cpu"]
        for number, updates in ((signal.SIGTERM, 1), (signal.SIGINT, 3)):  # the same command begins, and goes on
            there = load_tensors(out / "last.safetensors")[1]["iteration"] if out.exists() else 0
            with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts) as process:
                try:
                    while process.poll() is None and rows_of(out) < there + updates:
                        time.sleep(0.1)
                    process.send_signal(number)
                    _, error = process.communicate(timeout=60)
                finally:
                    process.kill()
            assert process.returncode == 128 + number
            assert f"saved; l2g train --resume {out} continues a run to the same bits" in error
            assert load_tensors(out / "last.safetensors")[1]["iteration"] >= there + updates

    def test_the_script_for_slurm_saves_then_puts_its_job_back_once(self, tmp_path):
        page = Path(__file__).parents[1].joinpath("docs", "long-runs.md").read_text()
        script = tmp_path / "train.sbatch"
        script.write_text(re.search(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", page, re.S)[1])
        calls = tmp_path / "calls"
        stand_ins = {
            "torchrun": f"trap 'echo saved >> {calls}; exit 1' USR1\n"
            f"echo began >> {calls}\nwhile sleep 0.1; do :; done",
            "scontrol": f'echo "$@" >> {calls}',
        }
        for name, body in stand_ins.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
            (tmp_path / name).chmod(0o755)
        script.chmod(0o755)
        environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
        process = subprocess.Popen([str(script), "--out", "run"], env=environment)
        try:
            while process.poll() is None and not calls.exists():
                time.sleep(0.05)
            process.send_signal(signal.SIGUSR1)
            process.wait(timeout=60)
        finally:
            process.kill()
        assert calls.read_text().split("\n") == ["began", "saved", "requeue 17", ""]


def ring_after(patch, update, number, *, times=1, then=lambda: None):
    """Sends this process a signal while that update runs."""
    real = Updater.__call__

    def ring(self, k, asked=0):
        found = real(self, k, asked)
        if k + 1 == update:
            for _ in range(times):
                signal.raise_signal(number)
            then()
        return found

    patch.setattr(Updater, "__call__", ring)


class TestFolders:
    def test_two_runs_into_one_are_refused(self, tmp_path, monkeypatch):
        import l2g_meta.training.loop as training

        real = training.evaluate

        def another(*arguments, **options):
            with pytest.raises(CheckpointError, match="another process trains in"):
                go(tmp_path / "run", resume=True)
            return real(*arguments, **options)

        monkeypatch.setattr(training, "evaluate", another)
        go(tmp_path / "run", config=Config(**{**vars(CONFIG), "iterations": 4}))

    def test_a_moved_run_goes_on(self, whole, tmp_path):
        go(tmp_path / "run", config=Config(**{**vars(CONFIG), "iterations": 8}))
        (tmp_path / "run").rename(tmp_path / "moved")
        go(tmp_path / "moved", resume=True)
        assert contents(tmp_path / "moved")[1] == whole[1]

    def test_a_clock_that_jumps_changes_nothing(self, whole, tmp_path, monkeypatch):
        now = (10**9 - 7 * k + 10**12 * (k % 9 == 4) for k in itertools.count())  # back, and far ahead
        for clock in ("time", "perf_counter", "monotonic"):  # the last two may jump back where a machine is moved
            monkeypatch.setattr(time, clock, lambda: float(next(now)))
        go(tmp_path / "run")
        with monkeypatch.context() as patch, pytest.raises(Stopped):  # before a validation: its row waits in the state
            ring_after(patch, 4, signal.SIGTERM)
            go(tmp_path / "parts")
        assert load_tensors(tmp_path / "parts" / "resume-4.safetensors")[1]["pending"]["seconds"] >= 0
        go(tmp_path / "parts", resume=True)
        monkeypatch.undo()
        assert contents(tmp_path / "run") == whole and contents(tmp_path / "parts")[1] == whole[1]

    def test_another_number_of_threads_goes_on(self, whole, tmp_path):
        """To the same numbers but for rounding, which its states do not hide: no option of a run is lost."""
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            go(tmp_path / "run", config=replace(CONFIG, iterations=6))
            torch.set_num_threads(3)
            go(tmp_path / "run", resume=True)
        finally:
            torch.set_num_threads(before)
        found, expected = contents(tmp_path / "run")[1], whole[1]
        assert [row["iteration"] for row in found] == [row["iteration"] for row in expected]
        losses = [[float(row["loss"]) for row in rows] for rows in (found, expected)]
        np.testing.assert_allclose(*losses, rtol=0.05)

    def test_another_config_is_refused_with_the_difference(self, tmp_path, capsys):
        small = "--image-size 16 --iterations 2 --eval-every 1 --eval-episodes 2 --device cpu".split()
        out = str(tmp_path / "run")
        assert main(["train", "--out", out, *small, "--pairs", "1", "--queries", "2"]) == 0
        assert main(["train", "--resume", out, "--lr", "0.5", "--iterations", "3"]) == 2
        error = capsys.readouterr().err
        assert "--lr 0.5, not 0.001; --iterations 3, not 2" in error and "--force" in error
        assert main(["train", "--out", out, "--resume", *small, "--pairs", "1", "--queries", "2"]) == 0  # the same
        assert main(["train", "--resume", out, "--lr", "0.5", "--iterations", "3", "--force"]) == 0
        assert main(["train", "--resume", out, "--inner-lr", "0.25", "--iterations", "4", "--force"]) == 0
        assert load_tensors(tmp_path / "run" / "last.safetensors")[0]["inner_lr.value"] == 0.25
        with pytest.warns(UserWarning, match="--inner-lr: where training began"):
            go(tmp_path / "learned", config=Config(**{**vars(CONFIG), "iterations": 2}))
            go(tmp_path / "learned", resume=True, config=Config(**{**vars(CONFIG), "iterations": 4, "inner_lr": 0.1}))
        assert main(["train", "--resume", out]) == 0
        for wrong in (["--force"], ["--resume", out, "--out", out]):
            assert main(["train", *wrong]) == 2


class Blows(nn.Module):
    """Stops being finite at some update: its own weight, the loss of T_i, or the gradient of T_j alone."""

    def __init__(self, kind, at, calls=2):
        super().__init__()
        self.net, self.kind, self.at, self.calls, self.passes = Net(), kind, at, calls, [0]  # of clones, too

    def forward(self, task):
        scores = self.net(task)
        self.passes[0] += self.training
        if not self.training or (self.passes[0] - 1) // (2 * self.calls) != self.at:
            return scores
        inner = self.passes[0] % 2 == 1
        if self.kind == "nan in T_i" and inner:
            return scores * float("nan")
        if self.kind == "inf in T_i" and inner:
            return scores + float("inf")
        if self.kind == "inf in the meta-gradient" and not inner:
            return _Explode.apply(scores, float("inf"))
        if self.kind == "large gradient" and not inner:
            return _Explode.apply(scores, 1e25)
        return scores


class _Explode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.factor, None


KINDS = {
    "nan in T_i": "inner loss nan, loss nan",
    "inf in T_i": "inner loss nan, loss nan",
    "inf in the meta-gradient": "gradient of net.encoder.0.weight, net.encoder.0.bias, net.encoder.1.weight and 1 more",
}  # and what the message names


class TestNotFinite:
    @pytest.mark.parametrize("kind", KINDS)
    def test_stops_before_the_update_and_says_what_is_not_finite(self, kind, tmp_path):
        config, models = replace(CONFIG, iterations=6, learn_inner_lr=None), []
        with pytest.raises(NotFiniteError, match=r"update 5 \(pairs 10 to 11 of the stream of seed 0\)") as error:
            go(tmp_path / "run", config=config, model=lambda: models.append(Blows(kind, 5)) or models[0])
        assert f"is not finite: {KINDS[kind]}; nothing was changed" in str(error.value)
        sound = go(tmp_path / "sound", config=replace(config, iterations=5), model=lambda: Blows("", 99))
        before = sound.module.state_dict()
        assert all(torch.equal(before[name], t) for name, t in models[0].state_dict().items())
        assert max(state.numbers(tmp_path / "run")) == 4

    @pytest.mark.parametrize("kind", KINDS)
    def test_or_is_left_out_and_counted(self, kind, tmp_path):
        config = Config(**{**vars(CONFIG), "skip_nonfinite": True, "learn_inner_lr": None})
        wrapper = go(tmp_path / "run", config=config, model=lambda: Blows(kind, 5))
        found, rows = contents(tmp_path / "run")
        assert [row["iteration"] for row in rows if row["skipped"] == "1"] == ["6"]
        assert found["last.safetensors"][1]["skipped"] == 1
        assert all(t.isfinite().all() for t in wrapper.state_dict().values() if t.is_floating_point())
        assert wrapper.module.net.encoder[1].num_batches_tracked == 2 * 11  # that one's statistics neither

    def test_a_gradient_whose_square_is_infinite_is_not_taken(self, tmp_path):
        """Adam would keep the square, and divide by it for ever."""
        with pytest.raises(NotFiniteError, match="update 1 .*: gradient of net.encoder.0.weight, .*nothing was"):
            go(tmp_path / "run", model=lambda: Blows("large gradient", 1))

    def test_weights_are_named_before_what_they_cause(self, tmp_path):
        def broken():
            model = Blows("", 99)
            torch.nn.init.constant_(model.net.encoder[0].weight, float("inf"))
            return model

        with pytest.raises(NotFiniteError, match=r"is not finite: weight net.encoder.0.weight; nothing"):
            go(tmp_path / "run", model=broken)

    def test_a_weight_that_is_not_finite_is_not_saved(self, tmp_path, monkeypatch):
        real = Updater.__call__

        def overflow(self, k, asked=0):
            found = real(self, k, asked)
            if k == 5:
                next(self.wrapper.parameters()).data.flatten()[0] = float("inf")
            return found

        monkeypatch.setattr(Updater, "__call__", overflow)
        with pytest.raises(NotFiniteError, match="a weight is not finite after update 5; lower --lr"):
            go(tmp_path / "run")
        assert max(state.numbers(tmp_path / "run")) == 4
        for path in (tmp_path / "run").glob("[rl]*.safetensors"):
            assert all(t.isfinite().all() for t in load_tensors(path)[0].values() if t.is_floating_point())


def test_files_of_a_later_version_are_refused_by_name(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 7)
        checkpoint.save_tensors(tmp_path / "x.safetensors", {"x": torch.ones(2)}, {})
    with pytest.raises(CheckpointError, match="a file of format 7 from a later version of l2g-meta, this one reads 1"):
        load_tensors(tmp_path / "x.safetensors")
