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

from l2g_meta.cli.output import add_output, complain, emit
from l2g_meta.errors import INSTALL_LEARN2LEARN

EXAMPLES = """\
l2g doctor
l2g doctor --json                                    # for a bug report or a script
l2g doctor --quiet && l2g train                      # only if all that is required works"""

REQUIRED = {  # packages by the module that is imported
    "l2g-meta": "l2g_meta", "torch": "torch", "torchvision": "torchvision", "numpy": "numpy", "Pillow": "PIL.Image",
    "matplotlib": "matplotlib", "safetensors": "safetensors.torch", "tqdm": "tqdm", "filelock": "filelock",
    "pooch": "pooch", "Jinja2": "jinja2", "scikit-learn": "sklearn",
}  # fmt: skip
OPTIONAL = {  # module, what it is for, and the extra that brings it or the command that adds it
    "learn2learn": ("learn2learn", "its task sets, and its clone in place of ours", INSTALL_LEARN2LEARN),
    **{name: (name, "l2g export", "export") for name in ("onnx", "onnxruntime", "onnxscript")},
    "timm": ("timm", "encoders by --backbone timm:NAME", "timm"),
    "tensorboard": ("tensorboard", "l2g train --tensorboard", "tensorboard"),
    **{name: (name, "l2g bench", "bench") for name in ("higher", "torchopt")},
}
DESCRIPTION = (
    "Prints versions, devices and which optional parts are there, with the command that adds each missing one, and "
    "checks a meta-gradient. The exit code is 1 if a required part does not work."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    add_output(parser, json="all of it")


def run(args: argparse.Namespace) -> int:
    """Looks, and says what it found."""
    found = examine()
    for title in ("required", "machine", "optional", "self test"):
        print(title)
        for name, part in found[title].items():
            use, remedy = f" ({part['use']})" if "use" in part else "", part.get("remedy", "")
            broken = f"does not work{use}: {part['error']}{remedy and '; '}{remedy}"
            text = broken if part["error"] else part["version"] or f"missing{use}: {remedy}"
            print(" ", f"{name:16}", text)
    print("all that is required works" if found["works"] else "something required does not work, see above")
    emit(args, found)
    if not found["works"] and (args.quiet or args.json is not None):
        complain("something required does not work; l2g doctor says what")
    return 0 if found["works"] else 1


def examine() -> dict[str, Any]:
    """All that `l2g doctor` says, as a dictionary that ``json`` takes; whatever is broken is told, not raised."""
    required = {name: look(name, module, f"pip install --force-reinstall {name}") for name, module in REQUIRED.items()}
    for part in required.values():
        part["error"] = part["error"] or (None if part["version"] else "it is not installed")
    optional = {
        name: {"use": use, **look(name, module, how if " " in how else f'pip install "l2g-meta[{how}]"')}
        for name, (module, use, how) in OPTIONAL.items()
    }
    machine = {"Python": platform.python_version(), "system": platform.platform()}
    test: dict[str, Any] = {"version": "ok", "error": None}
    if works := not any(part["error"] for part in required.values()):
        machine |= devices()
        try:
            self_test()
        except Exception as problem:  # whatever a broken installation raises
            test, works = {"version": None, "error": _line(problem)}, False
    return {
        "required": required,
        "machine": {name: {"version": text, "error": None} for name, text in machine.items()},
        "optional": optional,
        "self test": {"meta-gradient": test},
        "works": works,
    }


def look(name: str, module: str, remedy: str) -> dict[str, Any]:
    """A package's ``version``, ``None`` where it is missing, and the ``error`` that importing it ends in, if any."""
    version = error = None
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some packages announce their successors there
            if util.find_spec(module.partition(".")[0]) is not None:
                imported = importlib.import_module(module)
                version = getattr(imported, "__version__", None) or metadata.version(name)
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
    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return found | {f"cuda:{k}": f"{gpu.name}, {gpu.total_memory / 1e9:.1f} GB" for k, gpu in enumerate(gpus)}


def self_test() -> None:
    """Compares a tiny network's meta-gradient in float64 with finite differences.

    Raises:
        GradcheckError: if they differ; of a broken installation, whatever that raises.
    """
    import torch

    from l2g_meta import L2GWrapper, MetricModel, PrototypicalHead, Task
    from l2g_meta.models.blocks import ConvBlock

    with torch.random.fork_rng(devices=[]):  # the same each time, and PyTorch's generator is left as it was
        torch.default_generator.manual_seed(0)
        encoder = torch.nn.Sequential(*(ConvBlock(n, 4, pool=True) for n in (1, 4)))
        labels, images = torch.arange(4) % 2, torch.randn(4, 4, 1, 8, 8).double()
        wrapper = L2GWrapper(MetricModel(encoder, PrototypicalHead()).double(), inner_lr=0.05)
    tasks = tuple(Task(images[k], labels, images[k + 1], labels, 2) for k in (0, 2))
    names, values = zip(*wrapper.named_parameters(), strict=True)
    call = lambda *p: torch.func.functional_call(wrapper, dict(zip(names, p, strict=True)), tasks)  # noqa: E731
    torch.autograd.gradcheck(call, values, fast_mode=True)


def _line(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
