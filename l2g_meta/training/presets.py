"""Settings by name: ``l2g train --preset NAME``. A flag that is given beside it wins.

They are what our figures are of (docs/notebook.md), minutes on a CPU.
"""

from __future__ import annotations

from typing import Any

from l2g_meta.errors import L2GError, did_you_mean

SMALL: dict[str, Any] = {"queries": 10, "pairs": 2, "iterations": 1000, "eval_every": 100, "eval_episodes": 200}
MINI_28 = SMALL | {"data": "mini-imagenet", "image_size": 28}
GLYPHS = SMALL | {"data": "glyphs"}
L2G: dict[str, Any] = {"method": "l2g", "inner_lr": 0.01, "mix": 0.0}  # Algorithm 1
MIX = L2G | {"mix": 0.5}
DEFAULT = MIX | {"inner_lr": 0.003}

PRESETS: dict[str, dict[str, Any]] = {
    "mini-28px-episodic": MINI_28 | {"method": "episodic"},
    "mini-28px-l2g": MINI_28 | L2G,
    "mini-28px-l2g-mix": MINI_28 | MIX,
    "mini-28px-l2g-mix-0.003": MINI_28 | DEFAULT,
    "mini-28px-5shot-episodic": MINI_28 | {"method": "episodic", "shots": 5},
    "mini-28px-5shot-l2g-mix": MINI_28 | MIX | {"shots": 5},
    "glyphs-episodic": GLYPHS | {"method": "episodic"},
    "glyphs-l2g-mix-0.003": GLYPHS | DEFAULT,
}


def preset(name: str | None) -> dict[str, Any]:
    """Fields of ``Config`` of that name; none without one.

    Raises:
        L2GError: for an unknown name.

    Example:
        >>> preset("mini-28px-5shot-episodic")["shots"], preset(None)
        (5, {})
    """
    if name is None:
        return {}
    if name not in PRESETS:
        raise L2GError(f"need --preset of {', '.join(PRESETS)}; got {name!r}{did_you_mean(name, PRESETS)}")
    return dict(PRESETS[name])
