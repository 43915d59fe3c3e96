"""`make gpu`: what a GPU computes, and how fast, in at most 9 minutes.

    make gpu OUT=folder          # needs PyTorch and an NVIDIA GPU, and no installation
    make gpu OUT=folder CPU=1    # each step in a tiny form on a CPU, which judges nothing

Each step is a process with a time limit of its own: one that breaks, hangs or lacks a package costs the others nothing.
The folder gets a log per step and JSON of benches and training; results.json and summary.md are written after each.
A step has passed or failed, is out of time, "left out" (nothing of it could run), "partly" run (the rest was skipped,
for want of a package, say), or skipped, as it has to be here. ONLY='tests-* train' takes some steps. Our operators run
on CUDA, unless L2G_FAST_CUDA=0 asks for PyTorch's own, which users have by default.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from gpu_results import CASES, STOCK, exit_code, musts, skipped, summary

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 540  # for everything

PACKAGES = {  # by module: the package, with what it needs, and who needs it
    "torchvision": ("torchvision", "a stock ResNet-18"),
    "numpy": ("numpy", "all steps"),
    "PIL": ("Pillow", "tests and training"),
    "pytest": ("pytest exceptiongroup iniconfig packaging pluggy pygments tomli", "tests"),
    "filelock": ("filelock", "training"),
    "safetensors": ("safetensors", "training"),
    "tqdm": ("tqdm", "training"),
    "matplotlib": (
        "matplotlib contourpy cycler fonttools kiwisolver packaging pyparsing python-dateutil six",
        "training, whose letters are of its fonts",
    ),
}

PLAIN = "episodic", "episodic, own network", "episodic, own network, channels-last"
OWN = "l2g, own network", "l2g, own network, channels-last", STOCK
SKIPPED = re.compile(r"^SKIPPED \[(\d+)\] .+?: (.*)$", re.MULTILINE)  # in pytest's summary

PROBE = """
import json, torch
assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8), f"PyTorch {torch.__version__} is too old"
cuda = torch.cuda.is_available()
names = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())] if cuda else []
if cuda:
    assert torch.ones(2, device="cuda").sum().item() == 2
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": names}))
"""


class Step(NamedTuple):
    """One process: ``python *arguments``."""

    name: str
    seconds: float  # its limit
    arguments: Sequence[str]
    needs: Sequence[str] = ()  # modules
    environment: dict[str, str] = {}
    expected: str = ""  # why tests have to be skipped here


def steps(out: Path, *, tiny: bool) -> list[Step]:
    """All steps, the most telling first; ``tiny``: on a CPU."""
    device = "cpu" if tiny else "cuda"
    here = {"L2G_TEST_DEVICE": device, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # what the same bits are claimed for
    more = [*PLAIN, "l2g, first order", *OWN, *(["learn2learn"] if find_spec("learn2learn") else [])]
    found = [
        _tests("operators", 60, "test_cuda.py::TestOperators", here),
        _tests("meta-gradients", 90, "test_cuda.py::TestMetaGradient", here),
        _tests("default", 45, "test_cuda.py::TestByDefault", here),
        _tests("precision", 45, "test_cuda.py::TestPrecision", here),
        _tests("runs", 60, "test_cuda.py::TestRuns", here),
        *(_bench("eager", backbone, pairs, (*PLAIN, "l2g", STOCK), out, tiny=tiny) for backbone, pairs in CASES),
        *_training(out, device, tiny=tiny),
        _tests("processes", 60, "test_cuda.py::TestProcesses", here, "needs two GPUs"),
        *(_bench("more", backbone, pairs, more, out, tiny=tiny) for backbone, pairs in CASES),
        *(
            _bench(precision, backbone, pairs, ("episodic", "l2g"), out, tiny=tiny, precision=precision)
            for precision in (() if tiny else ("tf32", "bf16"))
            for backbone, pairs in CASES
        ),
    ]
    for path in sorted((ROOT / "tests").glob("test_*.py")):  # each by itself: one may need what is not here
        if "mark.cuda" in path.read_text(encoding="utf-8") and path.name not in ("test_cuda.py", "test_gpu.py"):
            none = "needs a CUDA device" if tiny else ""
            found.append(_tests(path.stem.removeprefix("test_"), 60, path.name, here, none))
    return found


def _tests(name: str, seconds: float, what: str, environment: dict[str, str], expected: str = "") -> Step:
    command = ["-m", "pytest", "-v", "-m", "cuda", "-p", "no:cacheprovider", f"tests/{what}"]
    return Step(f"tests-{name}", seconds, command, ["pytest", "numpy", "PIL"], environment, expected)


def _bench(
    kind: str, backbone: str, pairs: int, rows: Sequence[str], out: Path, *, tiny: bool, precision: str = "fp32"
) -> Step:
    name = f"bench-{kind}-{backbone}-{pairs}"
    large = backbone == "resnet12" and pairs > 1  # a second for each step
    how = ["--device", "cuda", "--precision", precision, "--image-size", "84", "--repeats", "3" if large else "10"]
    if tiny:
        how = "--device cpu --image-size 20 --ways 2 --queries 1 --repeats 1".split()
    command = ["-m", "l2g_meta", "bench", "--backbone", backbone, "--pairs", str(pairs), *how, "--variants", *rows]
    command += ["--json", str(out / f"{name}.json")]
    return Step(name, 90 if large else 60, command, ["numpy"])


def _training(out: Path, device: str, *, tiny: bool) -> list[Step]:
    run, needs = out / "run", ["numpy", "PIL", "filelock", "safetensors", "tqdm", "matplotlib"]
    size = "--iterations 200 --eval-every 100 --eval-episodes 100".split()
    if tiny:
        size = "--iterations 2 --pairs 1 --queries 1 --eval-every 2 --eval-episodes 2".split()
    train = ["train", "--data", "glyphs", "--device", device, *size, "--out", str(run)]
    test = ["evaluate", str(run), "--episodes", "4" if tiny else "600", "--device", device, "--head", "trained"]
    return [
        Step("train", 75, ["-m", "l2g_meta", *train, "--quiet", "--json", str(out / "train.json")], needs),
        Step("evaluate", 45, ["-m", "l2g_meta", *test, "--json", str(out / "evaluate.json")], needs),
    ]


def run(step: Step, out: Path, seconds: float) -> dict[str, Any]:
    """Runs a step for at most so many seconds; its status, the last line of its log, and what was skipped in it."""
    missing = [PACKAGES[module][0].split()[0] for module in step.needs if find_spec(module) is None]
    if missing or seconds < 1:
        note = f"needs {', '.join(missing)}" if missing else "no time is left"
        status = "left out" if missing else "out of time"
        return {"name": step.name, "status": status, "seconds": 0.0, "note": note, "skips": []}
    path, began = out / f"{step.name}.log", time.monotonic()
    places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONUNBUFFERED": "1", "L2G_FAST_CUDA": fast_cuda(), "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, *step.arguments]
    with path.open("wb") as log:
        process = subprocess.Popen(  # noqa: S603  # commands of this file
            command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=os.environ | environment | step.environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it started
            process.wait()
    text = path.read_text(encoding="utf-8", errors="replace")
    note = next((line.strip(" =")[:200] for line in reversed(text.split("\n")) if line.strip()), "")
    skips = [
        {"tests": int(tests), "reason": reason, "expected": reason == step.expected}
        for tests, reason in (SKIPPED.findall(text) if "pytest" in step.needs else [])
    ]
    status = "passed" if code == 0 else "failed"
    if code is None:
        status, note = "out of time", f"after {seconds:.0f} s: {note}"
    elif code == 0 and skips:
        expected = all(skip["expected"] for skip in skips)
        status = ("passed" if expected else "partly") if " passed" in note else ("skipped" if expected else "left out")
    taken = round(time.monotonic() - began, 1)
    return {"name": step.name, "status": status, "seconds": taken, "note": note, "skips": skips}


def fast_cuda() -> str:
    """``L2G_FAST_CUDA`` of all steps."""
    return os.environ.get("L2G_FAST_CUDA", "1")


def probe() -> dict[str, Any]:
    """PyTorch, and the GPUs that it can use; ``error`` says why there is none."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        return {"torch": "", "gpus": [], "error": done.stderr.strip().rpartition("\n")[2]}
    found = json.loads(done.stdout)
    if not found["gpus"]:
        found["error"] = f"PyTorch {found['torch']} " + ("sees no device" if found["cuda"] else "is built without CUDA")
    return found


def missing(version: str = "") -> list[str]:
    """What is missing beside this version of PyTorch, a line each, and how to bring it."""
    lacking = {module: PACKAGES[module] for module in PACKAGES if find_spec(module) is None}
    lines = [f"missing: {packages.split()[0]}, for {use}" for packages, use in lacking.values()]
    if lacking:
        names = " ".join(dict.fromkeys(" ".join(packages for packages, _ in lacking.values()).split()))
        if minor := re.match(r"2\.(\d+)", version):  # another torchvision than PyTorch's does not load
            fits = f"==0.{int(minor[1]) + 15}.*" if int(minor[1]) < 14 else ">=0.29"
            names = names.replace("torchvision", f"'torchvision{fits}'")
        python = ".".join(map(str, sys.version_info[:2]))
        lines.append(
            "to bring them: python -m pip install --target packages --no-compile --no-deps --only-binary=:all: "
            f"--python-version {python} {names} (on a machine with a network), then PYTHONPATH=packages make gpu"
        )
    return lines


def main() -> int:
    """Runs the steps; 0: what of them could run has passed, and their musts hold, 1: not so, 2: nothing was run.

    A step that ran partly counts as passed here, one of which nothing ran only on a CPU.
    """
    parser = argparse.ArgumentParser(description="What a GPU computes, and how fast.")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="an empty folder for the results")
    parser.add_argument("--cpu", action="store_true", help="each step in a tiny form on a CPU")
    parser.add_argument("--only", nargs="+", metavar="STEP", default=["*"], help="steps by name or pattern: 'tests-*'")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without ending the step
    out, began = args.out.resolve(), time.monotonic()
    every = steps(out, tiny=args.cpu)
    names = [step.name for step in every]
    if unknown := [pattern for pattern in args.only if not fnmatch.filter(names, pattern)]:
        print(f"make gpu needs steps of {', '.join(names)}; got {', '.join(unknown)}")
        return 2
    machine = probe()
    lacking = missing(machine["torch"])
    print("".join(f"{line}\n" for line in lacking), end="", flush=True)
    if machine.get("error") and not (args.cpu and machine["torch"]):
        print(f"make gpu needs an NVIDIA GPU and PyTorch 2.8 or newer: {machine['error']}; CPU=1 tries it on a CPU")
        return 2
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise FileExistsError(0, "a folder with files")
    except OSError as error:
        print(f"make gpu needs an empty folder, got {out} ({error.strerror}); choose another OUT")
        return 2
    if args.cpu:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # steps are tiny: threads would wait for each other
    found: dict[str, Any] = {"tiny": args.cpu, "machine": machine, "L2G_FAST_CUDA": fast_cuda(), "missing": lacking}
    found |= {"steps": [], "musts": []}
    for step in every:
        if not any(fnmatch.fnmatch(step.name, pattern) for pattern in args.only):
            continue
        left = SECONDS - (time.monotonic() - began)
        limit = 20 * step.seconds if args.cpu else min(step.seconds, left)  # there may be one slow core
        found["steps"].append(done := run(step, out, limit))
        found["musts"] = musts(out)
        (out / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (out / "summary.md").write_text(summary(found, out), encoding="utf-8")
        print(f"{done['name']:24}{done['status']:12}{done['seconds']:6.0f} s  {done['note']}", flush=True)
        print("".join(f"{'':24}{line}\n" for line in skipped(done)), end="", flush=True)
    print(f"\n{summary(found, out)}\n{out}")
    return exit_code(found)


if __name__ == "__main__":
    sys.exit(main())
