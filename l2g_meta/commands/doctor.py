"""``l2g doctor``: what is installed here, and whether it works."""

from __future__ import annotations

import argparse
from typing import Any

from l2g_meta.commands.output import add_output, bold, complain, emit, red
from l2g_meta.commands.parser import Commands, new_command

INTERRUPTED = "run it again"
EXAMPLES = """\
l2g doctor
l2g doctor --json                                    # for a bug report or a script
l2g doctor --quiet && l2g train                      # only if all that is required works"""


def add(commands: Commands) -> None:
    """Adds the command."""
    doctor = new_command(
        commands,
        "doctor",
        "Prints versions, devices, the folder of converted data and which optional parts are there, with the command "
        "that adds each missing one, and checks a meta-gradient. The exit code is 1 if a required part does not work.",
        EXAMPLES,
    )
    add_output(doctor, json="all of it")


def run(args: argparse.Namespace) -> int:
    """Looks, and says what it found."""
    from l2g_meta.doctor import examine

    found = examine()
    _say(found)
    emit(args, found)
    if not found["works"] and (args.quiet or args.json is not None):
        complain("something required does not work; l2g doctor says what")
    return 0 if found["works"] else 1


def _say(found: dict[str, Any]) -> None:
    print(bold("Versions"))
    for part in found["required"]:
        _line(part["name"], part["version"] or f"does not work: {part['error']}; {part['remedy']}", part["error"])
    _line("Python", found["python"])
    _line("system", found["system"])
    devices = found["devices"]
    if devices is None:
        print(red("something required does not work; with it in place l2g doctor looks at the rest"))
        return
    print(bold("Devices"))
    cpu = devices["cpu"]
    memory = "" if cpu["memory_gb"] is None else f", {cpu['memory_gb']:.1f} GB of memory"
    _line("CPU", f"{cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads{memory}")
    for k, gpu in enumerate(devices["cuda"]):
        can = ", ".join(name for name in ("bf16", "tf32") if gpu[name]) or "neither bf16 nor tf32"
        _line(f"cuda:{k}", f"{gpu['name']}, {gpu['memory_gb']:.1f} GB, {can}")
    _line("MPS", "yes" if devices["mps"] else "no")
    if not devices["cuda"]:
        _line("CUDA", f"no: {devices['cuda_reason']}")
    print(bold("Folders"))
    for folder in found["folders"]:
        sizes = f"{folder['used_gb']:.2f} GB used, " if folder["used_gb"] is not None else ""
        locks = "" if folder["problem"] else ", with locks"
        text = f"{folder['path']}: {sizes}{folder['free_gb']:.1f} GB free{locks}"
        _line(folder["name"], text + (f"; {folder['problem']}" if folder["problem"] else ""), folder["problem"])
    print(bold("Optional parts"))
    for part in found["optional"]:
        missing = f"missing ({part['use']}): {part['remedy']}"
        broken = f"does not work ({part['use']}): {part['error']}; {part['remedy']}"
        _line(part["name"], broken if part["error"] else part["version"] or missing, part["error"])
    print(bold("Self test"))
    for check in found["self_test"]:
        detail = check["error"] or f"relative difference {check['difference']:.1e}, allowed {check['allowed']:.0e}"
        _line("ok" if check["ok"] else "FAILED", f"{check['name']}: {detail}", None if check["ok"] else "failed")
    print(bold("all that is required works") if found["works"] else red("something required does not work, see above"))


def _line(name: str, text: Any, problem: Any = None) -> None:
    label = f"{name:16}"
    print(f"  {red(label) if problem else label} {text}")
