"""`make gpu` on a machine without a GPU: what it says, and that no step costs the others anything."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from l2g_meta.bench.variants import VARIANTS

SCRIPT = Path(__file__).parents[1] / ".ci" / "gpu.py"
spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)


def command(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_what_is_missing(tmp_path):
    done = command("--out", tmp_path / "out")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert "make gpu needs an NVIDIA GPU and PyTorch 2.8 or newer: PyTorch" in done.stdout


def test_what_breaks_or_hangs_costs_the_rest_nothing(tmp_path):
    code = {
        "good": "print('all is well')",
        "broken": "raise ValueError('no kernel')",
        "hanging": "import time; print('began', flush=True); time.sleep(600)",
    }
    found = [
        gpu.run(gpu.Step(name, 60, ["-c", text]), tmp_path, 2 if name == "hanging" else 60)
        for name, text in code.items()
    ]
    assert [step["status"] for step in found] == ["passed", "failed", "out of time"]
    assert [step["note"] for step in found] == ["all is well", "ValueError: no kernel", "after 2 s: began"]
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.log" for name in code}


def test_what_a_step_lacks_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu.PACKAGES, "not_there", ("not-there its-need", "nothing"))
    step = gpu.Step("lame", 60, ["-c", ""], ["not_there"])
    assert gpu.run(step, tmp_path, 60) | {"seconds": 0} == {
        "name": "lame", "status": "left out", "seconds": 0, "note": "needs not-there"
    }  # fmt: skip
    first, *_, last = gpu.missing()
    assert first == "missing: not-there, for nothing" and "not-there its-need" in last
    assert gpu.run(gpu.Step("late", 60, ["-c", ""]), tmp_path, 0.5)["note"] == "no time is left"


@pytest.mark.parametrize("tiny", [False, True])
def test_steps_name_rows_and_tests_that_exist(tiny, tmp_path):
    for step in gpu.steps(tmp_path, tiny=tiny):
        words = list(step.arguments)
        if "--variants" in words:
            named = words[words.index("--variants") + 1 : words.index("--json")]
            assert set(named) <= set(VARIANTS)
        if "pytest" in words:
            path, _, name = words[-1].partition("::")
            assert f"class {name}" in (SCRIPT.parents[1] / path).read_text(encoding="utf-8") if name else True


def write(folder, kind, backbone, pairs, data=0.001, **seconds):
    rows = [{"name": name, "seconds": s, "ratio_to_fastest": s} for name, s in seconds.items()]
    path = folder / f"bench-{kind}-{backbone}-{pairs}.json"
    path.write_text(json.dumps({"data": {"seconds": data}, "rows": rows}), encoding="utf-8")


def test_musts_and_the_table(tmp_path):
    write(tmp_path, "eager", "conv4", 5, **{"l2g": 2.0, gpu.STOCK: 5.0})
    write(tmp_path, "eager", "resnet12", 5, data=0.2, **{"l2g": 3.0, gpu.STOCK: 5.0})
    musts = gpu.musts(tmp_path)
    assert [must["holds"] for must in musts[:3]] == [True, True, True]
    assert [must["value"] for must in musts[:3]] == [2.0, 0.4, 0.0005]
    assert [must["holds"] for must in musts if must["what"].startswith("resnet12, pairs: 5")] == [False] * 3
    assert all(must["value"] is None and not must["holds"] for must in musts if "pairs: 1" in must["what"])
    found = {"tiny": False, "machine": {"gpus": ["H200"], "torch": "2.11"}, "missing": ["missing: x"], "musts": musts}
    step = {"name": "train", "status": "failed", "seconds": 3.0, "note": "a | b"}
    table = gpu.summary({**found, "steps": [step]}, tmp_path)
    assert table.startswith("# H200, PyTorch 2.11\n\n- missing: x\n") and "| train | failed | 3 | a / b |" in table
    assert "conv4, pairs: 5: exact step / two fastest plain episodes | 2.2 | 2.000 | pass |" in table
    assert "conv4, pairs: 1: data / exact step | 0.05 | not measured | FAIL |" in table


def test_one_step_on_a_cpu(tmp_path):
    out = tmp_path / "out"
    done = command("--cpu", "--out", out, "--only", "tests-operators")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((out / "results.json").read_text())
    (step,) = results["steps"]
    assert step["status"] == "passed" and " passed in" in step["note"] and (out / "tests-operators.log").exists()
    assert "not judged" in (out / "summary.md").read_text() and "FAIL" not in done.stdout
    assert "needs an empty folder" in command("--cpu", "--out", out).stdout


@pytest.mark.slow
def test_every_step_on_a_cpu(tmp_path):
    done = command("--cpu", "--out", tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert done.returncode == 0, done.stdout
    assert {step["status"] for step in results["steps"]} <= {"passed", "skipped"}
