"""Runs as jobs of a cluster, with submitit's executor for processes of this machine and a stand-in for Slurm's."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from l2g_meta import cluster
from l2g_meta.checkpoint import read_info
from l2g_meta.cli import main
from l2g_meta.cluster import Job, job_of, parsed, submit
from l2g_meta.errors import L2GError
from l2g_meta.logs import read_log
from l2g_meta.reproduce.jobs import submit_cells
from l2g_meta.reproduce.plan import plan
from l2g_meta.sweep import read_sweep, run_of

submitit = pytest.importorskip("submitit", reason="submitit is not installed; pip install l2g-meta[slurm]")

REPRODUCE = ["reproduce", "table1", "--scale", "smoke", "--device", "cpu", "--rows"]
TRAIN = "l2g train --device cpu --pairs 1 --queries 2 --eval-episodes 2 --method episodic"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def wait(jobs):
    deadline = time.monotonic() + 240
    while not all(job.ended for job in jobs):
        assert time.monotonic() < deadline, [job.log.with_suffix(".err").read_text() for job in jobs]
        time.sleep(0.1)


def sweep(folder, *lines):
    path = folder / "sweep.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Programs of Slurm's names: sbatch keeps the script and takes it as job 4711, sacct says that it waits."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in (
        ("srun", ""),
        ("sbatch", f'cp "$1" {tmp_path}/script; echo Submitted batch job 4711'),
        ("sacct", r'printf "JobID|State|NodeList\n4711_[0-1]|PENDING|\n4711|PENDING|\n"'),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return tmp_path / "script"


def test_cells_are_submitted_and_the_command_without_it_shows_what_there_is(tmp_path, capsys):
    command = [*REPRODUCE, "proto", "proto-time", "--out", str(tmp_path)]
    assert main([*command, "--submit", "local"]) == 0
    printed = capsys.readouterr().out
    cells = plan("table1", "smoke", tmp_path, rows=["proto", "proto-time"]).cells
    (job,) = {job_of(cell.folder) for cell in cells}
    assert f"job {job.id}: glyphs 5w1s proto seed 0, glyphs 5w1s proto-time seed 0\n" in printed
    assert f"look: tail -f {job.log}; stop: kill {job.id}\n" in printed
    assert main([*command, "--submit", "local"]) == 0  # at once: nobody has a cell twice
    assert "nothing to submit" in capsys.readouterr().out
    assert main(command) in (0, 1)  # trains nothing here, and does not wait
    told = capsys.readouterr().err
    assert "job" in told or all(cell.done for cell in cells)
    wait([job])
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "Not done yet" not in printed and "| Prototypical Network, time as L2G | **" in printed
    assert "5w1s proto-time seed 0: " in job.log.read_text()


def test_a_job_that_ends_without_a_result_is_named_and_can_be_submitted_again(tmp_path, slurm, capsys):
    command = [*REPRODUCE, "proto", "--out", str(tmp_path)]
    (cell,) = plan("table1", "smoke", tmp_path, rows=["proto"], device="cpu").cells
    cell.folder.mkdir(parents=True)
    (cell.folder / "config.json").write_text("{")
    wait(submit_cells(cell.plan, "local", say=lambda _: None))
    assert main(command) == 1
    told = capsys.readouterr().err
    job = job_of(cell.folder)
    assert f"job {job.id} ended (ENDED) without a result, see {tmp_path}/jobs/{job.id}_0_log.err; add --submit" in told
    assert "need a run's config" in job.log.with_suffix(".err").read_text()
    assert [job.id for job in submit_cells(cell.plan, "slurm", options={"time": 5})] == ["4711"]
    assert job_of(cell.folder).executor == "slurm"


def test_a_preempted_job_is_requeued_and_goes_on(tmp_path):
    """To the bit as a run that nobody interrupted: what a job has done lies in its folder."""
    lines = [f"{TRAIN} --iterations 30 --eval-every 3 --out {tmp_path / name}" for name in ("whole", "broken")]
    whole, broken = read_sweep(sweep(tmp_path, *lines))
    assert whole() == []
    (job,) = submit([broken], "local", tmp_path / "jobs", say=lambda _: None)
    while broken.done == 0:
        assert not job.ended, job.log.with_suffix(".err").read_text()
        time.sleep(0.02)
    for child in Path(f"/proc/{job.id}/task/{job.id}/children").read_text().split():
        os.kill(int(child), signal.SIGUSR2)  # as Slurm does before it takes the machine
    wait([job])
    assert broken.done == 30
    log = job.log.read_text()
    assert "this job is preempted" in log + job.log.with_suffix(".err").read_text()
    assert log.count("Starting with JobEnvironment") == 2
    first, second = ([row["loss"] for row in read_log(run.out)] for run in (whole, broken))
    assert first == second


def test_a_sweep_is_trained_and_looked_at_with_the_same_command(tmp_path, capsys):
    lines = [f"{TRAIN} --iterations 2 --seed {seed} --out {tmp_path / str(seed)}  # seed {seed}" for seed in range(2)]
    path = sweep(tmp_path, *lines, "", "# nothing")
    assert main(["submit", str(path), "--to", "local"]) == 0
    assert f"{tmp_path / '0'}, {tmp_path / '1'}" in capsys.readouterr().out
    assert main(["submit", str(path), "--to", "local"]) == 0
    told = capsys.readouterr().out
    assert "nothing to submit" in told
    (job,) = {job_of(tmp_path / str(seed)) for seed in range(2)}
    wait([job])
    assert main(["submit", str(path), "--to", "local"]) == 0
    assert capsys.readouterr().out.count(": done, best validation") == 2
    assert read_info(tmp_path / "1" / "last.safetensors")["iteration"] == 2


@pytest.mark.parametrize(
    "line, message",
    [
        ("rm -rf /", r"line 2: need `l2g train ...` without --resume"),
        ("l2g train --resume runs/a", r"line 2: need `l2g train ...` without --resume"),
        ("l2g train --lr nan", r"line 2: need --lr above 0"),
        ("l2g train --no-such-flag", r"line 2: need a command that `l2g train` takes"),
        ("l2g train --out 'a", r"line 2: No closing quotation"),
        ("python -m l2g_meta train --seed 3", r"line 2: .*runs/glyphs-l2g-prototypical-seed3 is another line's"),
    ],
)
def test_a_line_that_is_no_run(tmp_path, line, message):
    with pytest.raises(L2GError, match=message):
        read_sweep(sweep(tmp_path, "train --seed 3", line))


def test_a_file_without_runs_and_a_folder_with_another_one(tmp_path):
    with pytest.raises(L2GError, match="need an `l2g train` command in .*, got none"):
        read_sweep(sweep(tmp_path, "# nothing"))
    with pytest.raises(L2GError, match="need a file with an `l2g train` command per line"):
        read_sweep(tmp_path / "none.txt")
    (run,) = read_sweep(sweep(tmp_path, f"{TRAIN} --out {tmp_path / 'a'}"))
    run.out.mkdir()
    run.config.save(run.out / "config.json")
    with pytest.raises(L2GError, match="line 1: need --seed 1, not 0, as .* has it; choose another --out"):
        read_sweep(sweep(tmp_path, f"{TRAIN} --out {tmp_path / 'a'} --seed 1"))


def test_options_that_cannot_be(tmp_path, capsys):
    with pytest.raises(L2GError, match="need --slurm NAME=VALUE"):
        parsed(["gpu"])
    (run,) = read_sweep(sweep(tmp_path, TRAIN))
    for options, message in (
        ({}, "need --slurm time=MINUTES, a whole number, got None"),
        ({"time": "4:00:00"}, "need --slurm time=MINUTES, a whole number, got 4:00:00"),
        ({"time": 5, "nodes": 2}, "need one process for each job, got --slurm nodes; leave it out"),
    ):
        with pytest.raises(L2GError, match=message):
            submit([run], "slurm", tmp_path, options=options)
    with pytest.raises(L2GError, match="the option --slurm time is Slurm's"):
        submit([run], "local", tmp_path, options={"time": 5})
    assert main([*REPRODUCE, "proto", "--out", str(tmp_path), "--slurm", "time=5"]) == 2
    assert "choose slurm instead, or leave it out" in capsys.readouterr().err


def test_submitit_or_slurm_is_missing(tmp_path, monkeypatch, capsys):
    (run,) = read_sweep(sweep(tmp_path, TRAIN))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(L2GError, match='need Slurm to take the jobs, got: Could not detect "srun"'):
        submit([run], "slurm", tmp_path, options={"time": 5})
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main([*REPRODUCE, "proto", "--out", str(tmp_path), "--submit", "local"]) == 2
    assert capsys.readouterr().err == "l2g: submitting jobs needs submitit; pip install l2g-meta[slurm]\n"


def test_what_slurm_is_asked_for(tmp_path, slurm, capsys):
    command = [*REPRODUCE, "proto", "l2g-proto", "--out", str(tmp_path / "out")]
    options = ["--slurm", "partition=gpu,time=240,gpus-per-node=1", "--slurm", "mem=16G,requeue=true"]
    assert main([*command, "--submit", "slurm", *options, "--parallel", "1"]) == 0
    printed = capsys.readouterr().out
    assert "job 4711_1: glyphs 5w1s l2g-proto seed 0\n" in printed and "stop: scancel 4711;" in printed
    script = slurm.read_text().splitlines()
    for flag in (
        "--partition=gpu", "--time=240", "--gpus-per-node=1", "--mem=16G", "--requeue", "--array=0-1%1",
        "--job-name=l2g", "--signal=USR2@90", "--open-mode=append",
    ):  # fmt: skip
        assert f"#SBATCH {flag}" in script
    assert main([*command, "--submit", "slurm", *options]) == 0
    assert "glyphs 5w1s proto seed 0: job 4711_0, PENDING" in capsys.readouterr().out
    (tmp_path / "bin" / "sacct").write_text('#!/bin/sh\nprintf "JobID|State|NodeList\\n"\n')  # it has forgotten the job
    forgotten = Job("4712", "slurm", str(tmp_path / "other"))
    assert forgotten.describe(tmp_path / "run") == (
        f"job 4712, UNKNOWN; if Slurm has forgotten it, remove {tmp_path / 'run' / 'job.json'}"
    )
    assert main(command) == 1
    assert capsys.readouterr().err.count(", PENDING\n") == 2
    cells = plan("table1", "smoke", tmp_path / "out", rows=["proto", "l2g-proto"]).cells
    assert [job_of(cell.folder).id for cell in cells] == ["4711_0", "4711_1"]


def test_what_sbatch_refuses(tmp_path, slurm):
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text("#!/bin/sh\necho \"sbatch: unrecognized option '--partitoin'\" >&2; exit 1\n")
    (run,) = read_sweep(sweep(tmp_path, f"{TRAIN} --out {tmp_path / 'a'}"))
    with pytest.raises(L2GError, match="need Slurm to take the jobs, got: .*unrecognized option '--partitoin'"):
        submit([run], "slurm", tmp_path / "jobs", options={"time": 5, "partitoin": "gpu"})
    assert job_of(run.out) is None


def test_a_job_on_disk_is_the_job(tmp_path):
    job = Job("1", "local", str(tmp_path))
    (tmp_path / cluster.RECORD).write_text(json.dumps(job._asdict()))
    assert job_of(tmp_path) == job and job_of(tmp_path / "none") is None
    assert Job(str(2**22 + 1), "local", str(tmp_path)).state == "ENDED"  # beyond the largest process number
    assert Job(str(os.getpid()), "local", str(tmp_path)).state == "ENDED"  # another process has the number now


def test_the_folder_of_a_run_is_that_of_the_command():
    from l2g_meta.commands.parser import build_parser

    run = run_of(build_parser().parse_args(["train", "--seed", "7", "--method", "episodic"]))
    assert str(run.out) == "runs/glyphs-episodic-prototypical-seed7" and run.config.seed == 7


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"id": "x", "executor": "local", "logs": "l"}', "{", '{"id": 1}'])
def test_damaged_records_of_jobs(text, tmp_path):
    (tmp_path / "job.json").write_text(text)
    with pytest.raises(L2GError, match="need the record of a job in .*; remove it"):
        job_of(tmp_path)
