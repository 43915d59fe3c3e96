"""``l2g doctor``: what is installed here, and whether it works."""

from __future__ import annotations

import argparse
import importlib
import platform
import re
from contextlib import suppress
from importlib import metadata
from typing import Any

from l2g_meta import __version__
from l2g_meta.cli.output import add_output, complain, emit
from l2g_meta.errors import INSTALL_LEARN2LEARN

EXAMPLES = """\
l2g doctor
l2g doctor --json                                    # for a bug report or a script
l2g doctor --quiet && l2g train                      # only if all that is required works"""

EXTRAS = ("learn2learn", "timm")  # whose packages are looked at
MODULES = {"Pillow": "PIL.Image", "safetensors": "safetensors.torch", "scikit-learn": "sklearn"}  # of other names
MISSING, BROKEN = "missing", "does not work"
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
    works = found.pop("works")
    for title, parts in found.items():
        print("\n".join([title, *(f"  {name:16} {text}" for name, text in parts.items())]))
    print("all that is required works" if works else "something required does not work, see above")
    emit(args, found | {"works": works})
    if not works and (args.quiet or args.json is not None):
        complain("something required does not work; l2g doctor says what")
    return 0 if works else 1


def examine() -> dict[str, Any]:
    """All that `l2g doctor` says, as a dictionary that ``json`` takes; whatever is broken is told, not raised."""
    required, optional = {"l2g-meta": __version__}, {}
    for name, extra in needed():
        if not extra:
            module = MODULES.get(name, name.lower())
            required[name] = look(name, f"pip install --force-reinstall {name}", module=module)
        elif extra in EXTRAS:
            how = INSTALL_LEARN2LEARN if name == extra == "learn2learn" else f'pip install "l2g-meta[{extra}]"'
            optional[name] = look(name, how)
    machine, test = {"Python": platform.python_version(), "system": platform.platform()}, "ok"
    if works := not any(text.startswith((MISSING, BROKEN)) for text in required.values()):
        try:
            machine |= devices()
            self_test()
        except Exception as problem:  # whatever a broken installation raises
            test, works = f"{BROKEN}: {_line(problem)}", False
    tests = {"meta-gradient": test}
    return {"required": required, "machine": machine, "optional": optional, "self test": tests, "works": works}


def needed() -> list[tuple[str, str]]:
    """The project's packages, each with the extra that brings it, or nothing."""
    with suppress(metadata.PackageNotFoundError):  # a checkout that is not installed
        found = [re.findall(r'^[\w-]+|(?<=extra == ").+(?=")', line) for line in metadata.requires("l2g-meta") or ()]
        return [(name, "".join(extra)) for name, *extra in found]
    return []


def look(name: str, remedy: str, *, module: str | None = None) -> str:
    """A package's version, or that it is missing, or the error that importing its module ends in."""
    try:
        if module is not None:
            importlib.import_module(module)
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{MISSING}: {remedy}"
    except (Exception, SystemExit) as problem:  # whatever a broken package raises
        return f"{BROKEN}: {_line(problem)}; {remedy}"


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
