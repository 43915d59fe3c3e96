"""``l2g doctor``: what is installed here, and whether it works."""

from __future__ import annotations

import argparse
import importlib
import io
import platform
import warnings
from contextlib import redirect_stderr, redirect_stdout
from importlib import metadata, util
from typing import Any

from l2g_meta.cli.output import add_output, bold, complain, emit, red
from l2g_meta.cli.parser import Commands, new_command
from l2g_meta.errors import INSTALL_LEARN2LEARN

EXAMPLES = """\
l2g doctor
l2g doctor --json                                    # for a bug report or a script
l2g doctor --quiet && l2g train                      # only if all that is required works"""

REQUIRED = ("l2g-meta", "torch", "torchvision", "numpy", "Pillow", "matplotlib", "safetensors", "tqdm", "filelock",
            "pooch", "Jinja2")  # fmt: skip
MODULES = {
    "l2g-meta": "l2g_meta",
    "Pillow": "PIL.Image",
    "Jinja2": "jinja2",
    "safetensors": "safetensors.torch",
    "scikit-learn": "sklearn",
}
OPTIONAL = {  # what it is for, and the extra that brings it or the command that adds it
    "learn2learn": ("its task sets, and its clone in place of ours", INSTALL_LEARN2LEARN),
    "scikit-learn": ("FewShotClassifier, l2g predict, l2g export, t-SNE", "classify"),
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), ("l2g export", "export")),
    "timm": ("encoders by --backbone timm:NAME", "timm"),
    "tensorboard": ("l2g train --tensorboard", "tensorboard"),
    **dict.fromkeys(("higher", "torchopt"), ("l2g bench", "bench")),
    "shtab": ("l2g completion", "completion"),
}


def add(commands: Commands) -> None:
    """Adds the command."""
    doctor = new_command(
        commands, "doctor",
        "Prints versions, devices and which optional parts are there, with the command that adds each missing one, and "
        "checks a meta-gradient. The exit code is 1 if a required part does not work.",
        EXAMPLES,
    )  # fmt: skip
    add_output(doctor, json="all of it")


def run(args: argparse.Namespace) -> int:
    """Looks, and says what it found."""
    found = examine()
    for title in ("required", "machine", "optional", "self test"):
        print(bold(title))
        for name, part in found[title].items():
            use, remedy = f" ({part['use']})" if "use" in part else "", part.get("remedy", "")
            broken = f"does not work{use}: {part['error']}{remedy and '; '}{remedy}"
            text = broken if part["error"] else part["version"] or f"missing{use}: {remedy}"
            print(" ", (red if part["error"] else str)(f"{name:16}"), text)
    print(bold("all that is required works") if found["works"] else red("something required does not work, see above"))
    emit(args, found)
    if not found["works"] and (args.quiet or args.json is not None):
        complain("something required does not work; l2g doctor says what")
    return 0 if found["works"] else 1


def examine() -> dict[str, Any]:
    """All that `l2g doctor` says, as a dictionary that ``json`` takes; whatever is broken is told, not raised."""
    required = {name: look(name, f"pip install --force-reinstall {name}", "it is not installed") for name in REQUIRED}
    works = not any(part["error"] for part in required.values())
    optional = {}
    for name, (use, how) in OPTIONAL.items():
        remedy = how if " " in how else f'pip install "l2g-meta[{how}]"'
        optional[name] = {"use": use, **look(name, remedy)}
    machine = {"Python": platform.python_version(), "system": platform.platform()} | (devices() if works else {})
    checks = self_test() if works else {}
    return {
        "required": required,
        "machine": {name: {"version": text, "error": None} for name, text in machine.items()},
        "optional": optional,
        "self test": checks,
        "works": works and not any(check["error"] for check in checks.values()),
    }


def look(name: str, remedy: str, missing: str | None = None) -> dict[str, Any]:
    """A package's ``version``, ``None`` where it is missing, and the ``error`` that importing it ends in, if any."""
    module, version, error = MODULES.get(name, name), None, missing
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some packages announce their successors there
            if util.find_spec(module.partition(".")[0]) is not None:
                imported = importlib.import_module(module)
                version, error = getattr(imported, "__version__", None) or metadata.version(name), None
    except (Exception, SystemExit) as problem:  # whatever a broken package raises
        error = _line(problem)
    return {"version": version, "error": error, "remedy": remedy}


def devices() -> dict[str, str]:
    """CPU and GPUs, in words."""
    import torch

    found = {"CPU": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"}
    found["MPS"] = "yes" if torch.backends.mps.is_available() else "no"
    if not torch.cuda.is_available():
        return {**found, "CUDA": "no device or driver" if torch.version.cuda else "this PyTorch lacks it"}
    for k in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(k)
        recent = ", bf16 and TF32" if gpu.major >= 8 else ""  # from Ampere on
        found[f"cuda:{k}"] = f"{gpu.name}, {gpu.total_memory / 1e9:.1f} GB{recent}"
    return found


def self_test() -> dict[str, dict[str, Any]]:
    """A tiny network's meta-gradient in float64: against finite differences, and against PyTorch's own operators."""
    import torch

    from l2g_meta import L2GWrapper, MetricModel, PrototypicalHead, Task
    from l2g_meta.models.blocks import ConvBlock

    def differences() -> None:
        fast, tasks = tiny(fused=True)
        names, values = zip(*fast.named_parameters(), strict=True)
        call = lambda *p: torch.func.functional_call(fast, dict(zip(names, p, strict=True)), tasks)  # noqa: E731
        torch.autograd.gradcheck(call, values, fast_mode=True)

    def operators() -> None:
        both = [tiny(fused=True), tiny(fused=False)]
        gradients = [torch.autograd.grad(wrapper(*tasks), list(wrapper.parameters())) for wrapper, tasks in both]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)

    def tiny(fused: bool) -> tuple[L2GWrapper, tuple[Task, ...]]:
        with torch.random.fork_rng(devices=[]):  # the same each time, and PyTorch's generator is left as it was
            torch.default_generator.manual_seed(0)
            encoder = torch.nn.Sequential(*(ConvBlock(n, 4, pool=True, fused=fused) for n in (1, 4)))
            labels, images = torch.arange(4) % 2, torch.randn(4, 4, 1, 8, 8).double()
            wrapper = L2GWrapper(MetricModel(encoder, PrototypicalHead()).double(), inner_lr=0.05)
        return wrapper, tuple(Task(images[k], labels, images[k + 1], labels, 2) for k in (0, 2))

    found: dict[str, dict[str, Any]] = {}
    for check in (differences, operators):
        try:
            check()
            found[check.__name__] = {"version": "ok", "error": None}
        except Exception as problem:  # whatever a broken installation raises
            found[check.__name__] = {"version": None, "error": _line(problem)}
    return found


def _line(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
