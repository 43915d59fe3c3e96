"""Devices, and the folders that the library writes to."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from l2g_meta.data.cache import cache_root
from l2g_meta.errors import L2GError
from l2g_meta.files.locks import claim

GB = 1e9


def devices() -> dict[str, Any]:
    """The CPU, each CUDA device and MPS; memory in GB (10⁹ bytes)."""
    return {
        "cpu": {
            "model": cpu_model(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gb": _memory(),
        },
        **_cuda(),
        "mps": bool(torch.backends.mps.is_available()),
    }


def _cuda() -> dict[str, Any]:
    try:
        if not torch.cuda.is_available():
            built = torch.version.cuda is not None
            reason = "no device or driver" if built else "this PyTorch was built without CUDA"
            return {"cuda": [], "cuda_reason": reason}
        return {"cuda": [_gpu(k) for k in range(torch.cuda.device_count())], "cuda_reason": None}
    except (RuntimeError, AssertionError) as error:  # a driver that does not fit
        return {"cuda": [], "cuda_reason": str(error).splitlines()[0]}


def _gpu(k: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(k)
    recent = properties.major >= 8  # Ampere, the first with either
    return {"name": properties.name, "memory_gb": properties.total_memory / GB, "bf16": recent, "tf32": recent}


def cpu_model() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # no Linux, or another processor's way to say it
        return platform.processor() or platform.machine()


def _memory() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    except (AttributeError, OSError, ValueError):  # Windows
        return None


def folders() -> list[dict[str, Any]]:
    """The folder of converted data, which is needed, and the one that runs go to from here."""
    cache = cache_root()
    return [
        {"name": "converted data", "needed": True, "used_gb": _size(cache) / GB}
        | _look(cache, "set L2G_CACHE to a folder that can be written, on a file system with locks"),
        {"name": "here", "needed": False, "used_gb": None} | _look(Path.cwd(), "give runs another folder by --out"),
    ]


def _look(folder: Path, remedy: str) -> dict[str, Any]:
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    problem = None
    try:
        with tempfile.TemporaryDirectory(prefix=".l2g-doctor-", dir=there) as trial:
            with claim(Path(trial) / "lock"):
                pass
    except L2GError as error:
        problem = str(error).partition(";")[0] + f"; {remedy}"
    except OSError as error:
        problem = f"cannot write: {error.strerror}; {remedy}"
    return {"path": str(folder), "free_gb": shutil.disk_usage(there).free / GB, "problem": problem}


def _size(folder: Path) -> float:
    """Bytes of the files in it; what cannot be read counts nothing."""
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(base, name)).st_size
            except OSError:  # removed meanwhile
                continue
    return float(total)
