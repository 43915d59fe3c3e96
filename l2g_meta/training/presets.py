"""Settings by name: ``l2g train --preset NAME``. A flag that is given beside it wins.

``mini-28px-*`` and ``glyphs-*`` are what our figures are of (docs/notebook.md), minutes on a CPU. The others are for a
GPU and of the benchmark's own size; they have not been run.
"""

from __future__ import annotations

from typing import Any

from l2g_meta.errors import L2GError, did_you_mean

MINI: dict[str, Any] = {"data": "mini-imagenet"}
SMALL = {
    "queries": 10,
    "pairs": 2,
    "iterations": 1000,
    "eval_every": 100,
    "eval_episodes": 200,
}
MINI_28 = SMALL | MINI | {"image_size": 28}
GLYPHS = SMALL | {"data": "glyphs"}
L2G: dict[str, Any] = {"method": "l2g", "inner_lr": 0.01, "mix": 0.0}  # Algorithm 1
MIX = L2G | {"mix": 0.5}
DEFAULT = MIX | {"inner_lr": 0.003}
RESNET = MINI | {"backbone": "resnet12", "backbone_options": ("drop_rate=0.1",), "augment": True, "iterations": 10_000}

PRESETS: dict[str, dict[str, Any]] = {
    "mini-28px-episodic": MINI_28 | {"method": "episodic"},
    "mini-28px-l2g": MINI_28 | L2G,
    "mini-28px-l2g-mix": MINI_28 | MIX,
    "mini-28px-l2g-mix-0.003": MINI_28 | DEFAULT,
    "mini-28px-5shot-episodic": MINI_28 | {"method": "episodic", "shots": 5},
    "mini-28px-5shot-l2g-mix": MINI_28 | MIX | {"shots": 5},
    "glyphs-episodic": GLYPHS | {"method": "episodic"},
    "glyphs-l2g-mix-0.003": GLYPHS | DEFAULT,
    "mini-conv4-1shot": MINI | MIX | {"shots": 1},
    "mini-conv4-5shot": MINI | MIX | {"shots": 5},
    "mini-conv4-1shot-episodic": MINI | {"method": "episodic", "shots": 1},
    "mini-conv4-5shot-episodic": MINI | {"method": "episodic", "shots": 5},
    "mini-resnet12-1shot": RESNET | MIX | {"shots": 1},
    "mini-resnet12-5shot": RESNET | MIX | {"shots": 5},
    "mini-resnet12-1shot-episodic": RESNET | {"method": "episodic", "shots": 1},
    "mini-resnet12-5shot-episodic": RESNET | {"method": "episodic", "shots": 5},
}


def preset(name: str | None) -> dict[str, Any]:
    """Fields of ``Config`` of that name; none without one.

    Raises:
        L2GError: for an unknown name.

    Example:
        >>> preset("mini-conv4-5shot")["shots"], preset(None)
        (5, {})
    """
    if name is None:
        return {}
    if name not in PRESETS:
        raise L2GError(f"need --preset of {', '.join(PRESETS)}; got {name!r}{did_you_mean(name, PRESETS)}")
    return dict(PRESETS[name])
