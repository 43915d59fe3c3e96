"""Times the variants in turn, measures their memory, compares their gradients."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2g_meta.bench.case import Case, build, task_stream
from l2g_meta.bench.timing import describe_machine, interleaved, seconds
from l2g_meta.bench.variants import VARIANTS, Pairs, available, prepare
from l2g_meta.errors import L2GError
from l2g_meta.training.allocator import keep_freed_memory
from l2g_meta.training.build import set_precision


def bench(
    case: Case,
    *,
    variants: Sequence[str] | None = None,
    repeats: int = 5,
    memory: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Medians of interleaved repeats of each variant, as a dictionary that ``json`` takes.

    Args:
        case: what is timed.
        variants: their names, as ``VARIANTS`` lists them; all that run here by default.
        repeats: timed steps of each, after one that is not.
        memory: also measure peak memory, on the CPU in one new process for each variant.
        say: is given each line of the table.

    Returns:
        ``case``, ``machine``, ``data`` (seconds of drawing and gathering one update) and ``rows``: for each variant
        ``seconds``, ``ratio`` (of a step to the episodic step on the same layers; ``ratio_to_fastest`` to the
        fastest of those), ``peak_bytes`` beyond model and data, and
        ``gradient_error``, relative to float64.
    """
    keep_freed_memory()
    set_precision(case.precision)
    chosen, stream = available(case, variants, say=say), task_stream(case)
    pairs = [stream[k] for k in range(case.pairs)]
    say(
        f"{case.backbone}, {case.head}, {case.image_size} px, {case.ways}-way {case.shots}-shot, "
        f"{case.queries} queries, pairs: {case.pairs}, inner steps: {case.inner_steps}, {case.precision}; "
        f"{describe_machine(case.device)}"
    )
    drawn = [seconds(partial(stream.batch, range(k, k + case.pairs))) for k in range(1, 10)]

    steps: dict[str, Callable[[], Any]] = {}
    for name in chosen:
        try:
            step = partial(prepare(name, case), pairs)
            step()  # some networks have operators without a second derivative
            steps[name] = step
        except (L2GError, NotImplementedError, RuntimeError) as error:
            if variants:
                raise
            say(f"left out: {name}: {str(error).partition(chr(10))[0]}")
    times = interleaved(steps, repeats=repeats)
    del steps

    errors = gradient_errors(case, [name for name in times if chosen[name].exact])
    median = {name: statistics.median(values) for name, values in times.items()}
    fastest = min((median[name] for name in times if name.startswith("episodic")), default=None)
    rows = []
    for name in times:
        base = chosen[name].base
        rows.append({
            "name": name,
            "seconds": median[name],
            "ratio": median[name] / median[base] if base in median else None,
            "ratio_to_fastest": median[name] / fastest if fastest else None,
            "peak_bytes": peak_memory(case, name) if memory else None,
            "gradient_error": errors.get(name),
            "all_seconds": times[name],
        })  # fmt: skip
    result = {
        "case": asdict(case),
        "machine": describe_machine(case.device),
        "repeats": repeats,
        "data": {"seconds": statistics.median(drawn)},
        "rows": rows,
    }
    say(table(result))
    return result


AXES: dict[str, Sequence[int]] = {
    "ways": (5, 10, 20),
    "shots": (1, 5, 10),
    "pairs": (1, 2, 5),
    "image_size": (28, 42, 84),
    "inner_steps": (1, 2, 5),
}


def scaling(
    case: Case,
    *,
    variants: Sequence[str] | None = None,
    repeats: int = 3,
    say: Callable[[str], None] = print,
    axes: dict[str, Sequence[int]] = AXES,
) -> list[dict[str, Any]]:
    """The bench along each axis by itself, the other values as in ``case``.

    Without ``variants``: episodic and L2G.
    """
    found = []
    for axis, values in axes.items():
        for value in values:
            changed = replace(case, **{axis: value})  # type: ignore[arg-type]
            result = bench(changed, variants=variants or ("episodic", "l2g"), repeats=repeats, memory=False, say=say)
            found.append({"axis": axis, "value": value, **result})
    return found


def gradient_errors(case: Case, names: Sequence[str]) -> dict[str, float]:
    """Relative error of each variant's meta-gradient against float64, of one pair with at most 5 queries."""
    small = replace(case, pairs=1, queries=min(case.queries, 5))
    pairs = [task_stream(small)[0]]
    exact = _gradient(replace(small, precision="fp32"), "l2g, own network, stock operators", pairs, torch.float64)
    found = {name: _gradient(small, name, pairs, torch.float32) for name in names}
    return {name: ((g - exact).norm() / exact.norm()).item() for name, g in found.items()}


def _gradient(case: Case, name: str, pairs: Pairs, dtype: torch.dtype) -> Tensor:
    model = build(case, layers=VARIANTS[name].layers).to(dtype)
    cast = [tuple(t._replace(support_x=t.support_x.to(dtype), query_x=t.query_x.to(dtype)) for t in p) for p in pairs]
    prepare(name, case, model)(cast)  # type: ignore[arg-type]
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def peak_memory(case: Case, name: str) -> int | None:
    """Bytes beyond model and data at the peak of a step; ``None`` where they cannot be measured."""
    if case.device.startswith("cuda"):
        step, before = _ready(case, name), torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("spawn")  # a process that has held nothing yet
    with context.Pool(1) as pool:
        return pool.apply(_resident_peak, (case, name, torch.get_num_threads()))


def _resident_peak(case: Case, name: str, threads: int) -> int:
    torch.set_num_threads(threads)
    keep_freed_memory()
    _ready(replace(case, ways=2, shots=1, queries=1, pairs=1), name)()  # loads kernels, starts threads
    step = _ready(case, name)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    for _ in range(2):
        step()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 - before


def _ready(case: Case, name: str) -> Callable[[], Any]:
    """A row's step, its model and data in place."""
    stream = task_stream(case)
    return partial(prepare(name, case), [stream[k] for k in range(case.pairs)])


COLUMNS = {  # of the table: what of a row, in which unit, and how it is written
    "s/step": ("seconds", 1, ".4f"),
    "ratio": ("ratio", 1, ".2f"),
    "fastest": ("ratio_to_fastest", 1, ".2f"),
    "peak MB": ("peak_bytes", 1e6, ".0f"),
    "error": ("gradient_error", 1, ".1e"),
}


def table(result: dict[str, Any]) -> str:
    """The rows as text."""
    width = 2 + max(22, *(len(row["name"]) for row in result["rows"]))
    lines = [" " * width + "".join(f"{title:>10}" for title in COLUMNS)]
    for row in result["rows"]:
        cells = (
            "" if row[name] is None else format(row[name] / unit, written) for name, unit, written in COLUMNS.values()
        )
        lines.append(f"{row['name']:{width}}" + "".join(f"{cell:>10}" for cell in cells))
    data = result["data"]["seconds"]
    share = 100 * data / min(row["seconds"] for row in result["rows"])
    lines.append(
        "ratio: time ÷ two plain episodes on the same layers; fastest: time ÷ the fastest two plain episodes; "
        f"data {1e3 * data:.1f} ms, {share:.1f}% of the fastest step"
    )
    return "\n".join(lines)
