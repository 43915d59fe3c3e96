"""What is installed on this machine, and whether it works."""

from __future__ import annotations

import platform
from typing import Any

from l2g_meta.doctor.parts import OPTIONAL, REQUIRED, look

BASIS = ("l2g-meta", "torch", "numpy", "safetensors")  # what looking at the rest takes


def examine() -> dict[str, Any]:
    """All that `l2g doctor` says, as a dictionary that ``json`` takes; ``works`` is whether all that is required does.

    Whatever is broken is told and not raised.
    """
    required = [look(part, required=True) for part in REQUIRED]
    found: dict[str, Any] = {"required": required, "python": platform.python_version(), "system": platform.platform()}
    if any(part["error"] for part in required if part["name"] in BASIS):
        return found | {"devices": None, "folders": [], "optional": [], "self_test": [], "works": False}

    from l2g_meta.doctor.machine import devices, folders
    from l2g_meta.doctor.selftest import self_test

    found |= {
        "devices": devices(),
        "folders": folders(),
        "optional": [look(part) for part in OPTIONAL],
        "self_test": self_test(),
    }
    found["works"] = (
        not any(part["error"] for part in required)
        and not any(folder["needed"] and folder["problem"] for folder in found["folders"])
        and all(check["ok"] for check in found["self_test"])
    )
    return found
