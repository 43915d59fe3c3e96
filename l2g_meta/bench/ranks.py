"""What an update would take on several processes, from what its parts take on one: on paper, not measured.

A rank computes at most ⌈B/n⌉ of the B pairs, then one ring all-reduce moves 2 (n − 1)/n of the flat buffer through each
rank's link, then every rank runs Adam:

    T(n) = a + ⌈B/n⌉ t + 2 (n − 1)/n · V / bandwidth + 2 (n − 1) · latency,    efficiency(n) = T(1) / (n T(n))
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch

from l2g_meta.bench.case import Case
from l2g_meta.bench.rows import build, task_stream
from l2g_meta.bench.run import describe_machine
from l2g_meta.bench.timing import interleaved
from l2g_meta.bench.updates import eager

RANKS = (1, 2, 3, 4, 5, 8, 16, 32, 64)


class Link(NamedTuple):
    """How ranks are connected: bytes per second, and seconds per message."""

    bandwidth: float
    latency: float


LINKS = {"10 Gbit/s Ethernet": Link(1.25e9, 50e-6), "100 Gbit/s InfiniBand": Link(12.5e9, 5e-6)}  # nominal


def ranks(case: Case, *, repeats: int = 5, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Expected times and efficiencies of 1 to 64 ranks, as a dictionary that ``json`` takes.

    Args:
        case: the update; the time per pair is measured from it and from one of a single pair, in turn.
        repeats: timed updates of each, after one that is not.
        say: is given each line of the table.
    """
    case = replace(case, pairs=max(2, case.pairs))
    device, single, model = torch.device(case.device), replace(case, pairs=1), build(case, layers="fused")
    updates = {str(c.pairs): eager(model, c, task_stream(c)) for c in (single, case)}
    one, all_ = (statistics.median(times) for times in interleaved(updates, device, repeats=repeats).values())
    each = (all_ - one) / (case.pairs - 1)
    fixed = max(0.0, one - each)
    floats = sum(t.numel() for t in model.parameters()) + sum(
        b.numel() for b in model.buffers() if b.is_floating_point()
    )
    shape = f"{case.image_size} px, {case.ways}-way {case.shots}-shot"
    say(f"{case.backbone}, {case.head}, {shape}; {describe_machine(case)}")
    say(f"measured: {each:.4f} s a pair, {fixed:.4f} s besides; all-reduce of {4 * floats / 1e6:.2f} MB an update")
    rows = []
    for pairs in (case.pairs, 64):
        for link, (bandwidth, latency) in LINKS.items():
            say(f"{pairs} pairs an update, {link}, on paper")
            for n in RANKS:
                moved = 2 * (n - 1) / n * 4 * floats
                time = fixed + math.ceil(pairs / n) * each + moved / bandwidth + 2 * (n - 1) * latency
                efficiency = (fixed + pairs * each) / (n * time)
                rows.append({"pairs": pairs, "link": link, "ranks": n, "bytes": moved, "seconds": time})
                rows[-1] |= {"efficiency": efficiency}
                say(f"{n:6} ranks{time:12.4f} s{efficiency:8.0%}")
    machine = {"description": describe_machine(case)}
    measured = {"pair_seconds": each, "fixed_seconds": fixed, "buffer_bytes": 4 * floats}
    return {"case": asdict(case), "machine": machine, "repeats": repeats, **measured, "rows": rows}
