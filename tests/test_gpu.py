"""`make gpu` on a machine without a GPU: what it says, and that no step costs the others anything."""

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_cuda import OPERATORS, derivatives, inputs

from l2g_meta import operators
from l2g_meta.bench.timing import describe_machine
from l2g_meta.bench.variants import VARIANTS
from l2g_meta.inner.second_order import FAST

SCRIPT = Path(__file__).parents[1] / ".ci" / "gpu.py"
sys.path.append(str(SCRIPT.parent))
gpu, judged = (importlib.import_module(name) for name in ("gpu", "gpu_results"))


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
        "name": "lame", "status": "left out", "seconds": 0, "note": "needs not-there", "skips": [],
    }  # fmt: skip
    first, *_, last = gpu.missing()
    assert first == "missing: not-there, for nothing" and "not-there its-need" in last
    monkeypatch.setitem(gpu.PACKAGES, "not_there", ("torchvision", "nothing"))
    pinned = [gpu.missing(version)[-1] for version in ("2.11.0+cu130", "2.15.0", "")]
    assert "'torchvision==0.26.*'" in pinned[0] and "'torchvision>=0.29'" in pinned[1] and " torchvision " in pinned[2]
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


def test_every_operator_of_the_mode_is_tried(monkeypatch):
    """Each function that the mode replaces by ours has its entry, and each autograd function of ours runs in one."""
    replaced, tried, functions, ran = {f.__name__ for f in FAST}, {n.partition(",")[0] for n in OPERATORS}, set(), set()
    assert "relu" in replaced and not replaced - tried
    for found in pkgutil.iter_modules(operators.__path__, f"{operators.__name__}."):
        for value in vars(importlib.import_module(found.name)).values():
            if isinstance(value, type) and issubclass(value, torch.autograd.Function):
                functions.add(value)
    for function in functions:
        monkeypatch.setattr(function, "forward", staticmethod(noted(function, function.forward, ran)))
    for ours, _, shape in OPERATORS.values():
        derivatives(ours, [t.requires_grad_() for t in inputs(shape)])
    functions -= {torch.autograd.Function, operators.Operator}
    assert functions and not functions - ran


def noted(function, forward, ran):
    def noting(*given):
        ran.add(function)
        return forward(*given)

    return noting


@pytest.mark.parametrize("devices, whose", [(("cpu",), "PyTorch's own (no"), (("cpu", "cuda"), "ours (")])
def test_the_machine_of_a_bench_says_whose_operators_ran(devices, whose, monkeypatch):
    monkeypatch.setattr(operators, "DEVICES", devices)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    line = f"H200, PyTorch {torch.__version__}, operators: {whose} L2G_FAST_CUDA=1)".replace("( ", "(")
    assert describe_machine("cuda:0") == line


def test_tests_that_pytest_skips_are_counted_with_their_reasons(tmp_path):
    (tmp_path / "test_skips.py").write_text("""
import pytest

def test_passes(): pass

@pytest.mark.parametrize("k", range(3))
def test_lacks(k): pytest.importorskip("not_there")

def test_as_expected(): pytest.skip("needs two GPUs")
""")
    settings = str(SCRIPT.parents[1] / "pyproject.toml")
    arguments = ["-m", "pytest", "-p", "no:cacheprovider", "-c", settings, str(tmp_path / "test_skips.py")]
    step = gpu.run(gpu.Step("some", 60, arguments, ["pytest"], expected="needs two GPUs"), tmp_path, 60)
    assert step["status"] == "partly" and step["note"].startswith("1 passed, 4 skipped"), step
    lacks, expected = sorted(judged.skipped(step), reverse=True)
    assert lacks.startswith("3 skipped: could not import 'not_there'")
    assert expected == "1 skipped, as expected: needs two GPUs"


@pytest.mark.parametrize(
    "passed, reasons, code, status",
    [
        (1, ["no torchvision"], 0, "partly"),
        (1, ["no torchvision", "needs two GPUs"], 0, "partly"),
        (1, ["needs two GPUs"], 0, "passed"),
        (0, ["no torchvision", "needs two GPUs"], 0, "left out"),
        (0, ["needs two GPUs"], 0, "skipped"),
        (1, ["no torchvision"], 1, "failed"),
    ],
)
def test_status_of_a_step_with_skipped_tests(passed, reasons, code, status, tmp_path):
    lines = [f"SKIPPED [1] tests/test_some.py:8: {reason}" for reason in reasons]
    lines.append(f"== {'1 passed, ' * passed}{len(reasons)} skipped in 0.1s ==")
    text = "\n".join(lines)
    command = ["-c", f"print({text!r}); raise SystemExit({code})"]
    step = gpu.run(gpu.Step("some", 60, command, ["pytest"], expected="needs two GPUs"), tmp_path, 60)
    assert step["status"] == status and [skip["reason"] for skip in step["skips"]] == reasons


def test_a_step_that_does_not_exist_is_an_error_with_all_names(tmp_path):
    done = command("--cpu", "--out", tmp_path / "out", "--only", "tests-operators", "tests-operator")
    assert done.returncode == 2 and done.stdout.count("\n") == 1 and not (tmp_path / "out").exists()
    assert "make gpu needs steps of tests-operators, tests-meta-gradients, " in done.stdout
    assert done.stdout.endswith("; got tests-operator\n")


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_file_as_folder_is_one_line(out, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(gpu, "probe", lambda: {"torch": "2.11", "gpus": []})
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--cpu", "--out", str(tmp_path / out)])
    assert gpu.main() == 2
    assert (
        capsys.readouterr().out.splitlines()[-1].startswith(f"make gpu needs an empty folder, got {tmp_path / out} (")
    )


def write(folder, kind, backbone, pairs, data=0.001, **seconds):
    rows = [{"name": name, "seconds": s, "ratio_to_fastest": s} for name, s in seconds.items()]
    path = folder / f"bench-{kind}-{backbone}-{pairs}.json"
    path.write_text(json.dumps({"data": {"seconds": data}, "rows": rows}), encoding="utf-8")


def test_musts_and_the_table(tmp_path):
    write(tmp_path, "eager", "conv4", 5, **{"l2g": 2.0, gpu.STOCK: 5.0})
    write(tmp_path, "eager", "resnet12", 5, data=0.2, **{"l2g": 3.0, gpu.STOCK: 5.0})
    musts = judged.musts(tmp_path)
    assert [must["holds"] for must in musts[:3]] == [True, True, True]
    assert [must["value"] for must in musts[:3]] == [2.0, 0.4, 0.0005]
    assert [must["holds"] for must in musts if must["what"].startswith("resnet12, pairs: 5")] == [False] * 3
    assert all(must["value"] is must["holds"] is None for must in musts if "pairs: 1" in must["what"])
    found = {"tiny": False, "machine": {"gpus": ["H200"], "torch": "2.11"}, "missing": ["missing: x"], "musts": musts}
    skips = [{"tests": 9, "reason": "no torchvision", "expected": False}]
    step = {"name": "train", "status": "partly", "seconds": 3.0, "note": "a | b", "skips": skips}
    table = judged.summary({**found, "L2G_FAST_CUDA": "1", "steps": [step]}, tmp_path)
    assert table.startswith("# H200, PyTorch 2.11\n\nSteps: 1 partly. Musts: 3 hold, 3 do not, 4 not measured.\n")
    assert "Operators on CUDA: ours (L2G_FAST_CUDA=1).\n\n- missing: x\n" in table
    assert "| train | partly | 3 | a / b |" in table and "\n- train: 9 skipped: no torchvision\n" in table
    assert "conv4, pairs: 5: exact step / two fastest plain episodes | 2.2 | 2.000 | pass |" in table
    assert "conv4, pairs: 1: data / exact step | 0.05 |  | not measured |" in table
    unmeasured = [must for must in musts if must["holds"] is None]
    other = judged.summary({**found, "L2G_FAST_CUDA": "0", "musts": unmeasured, "steps": [step]}, tmp_path)
    assert "Musts: none measured." in other and "PyTorch's own (L2G_FAST_CUDA=0)" in other


@pytest.mark.parametrize(
    "status, holds, tiny, code",
    [
        ("passed", True, False, 0),
        ("partly", True, False, 0),
        ("skipped", True, False, 0),
        ("left out", True, False, 1),
        ("failed", True, False, 1),
        ("passed", False, False, 1),
        ("passed", None, False, 1),  # its bench ran, and the number is not there
        ("passed", None, True, 0),
        ("left out", None, True, 0),
        ("failed", None, True, 1),
    ],
)
def test_exit_code(status, holds, tiny, code):
    other = {"step": "not chosen", "holds": None}
    found = {"tiny": tiny, "steps": [{"name": "bench", "status": status}]}
    assert judged.exit_code({**found, "musts": [{"step": "bench", "holds": holds}, other]}) == code


def test_one_step_on_a_cpu(tmp_path):
    out = tmp_path / "out"
    done = command("--cpu", "--out", out, "--only", "tests-operators")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((out / "results.json").read_text())
    (step,) = results["steps"]
    assert step["status"] == "passed" and " passed in" in step["note"] and (out / "tests-operators.log").exists()
    assert results["L2G_FAST_CUDA"] == "1" and not step["skips"] and not done.stdout.startswith("\n")
    assert "not judged" in (out / "summary.md").read_text() and "FAIL" not in done.stdout
    assert "needs an empty folder" in command("--cpu", "--out", out).stdout


@pytest.mark.slow
def test_every_step_on_a_cpu(tmp_path):
    done = command("--cpu", "--out", tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert done.returncode == 0, done.stdout
    assert {step["status"] for step in results["steps"]} <= {"passed", "skipped"}
