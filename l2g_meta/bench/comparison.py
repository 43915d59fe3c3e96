"""Times the variants in turn, measures their memory, compares their gradients."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from l2g_meta.bench.case import Case, task_stream
from l2g_meta.bench.timing import describe_machine, interleaved, seconds
from l2g_meta.bench.variants import available, prepare
from l2g_meta.errors import L2GError
from l2g_meta.training.allocator import keep_freed_memory
from l2g_meta.training.build import set_precision


def bench(
    case: Case, *, variants: Sequence[str] | None = None, repeats: int = 5, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Medians of interleaved repeats of each variant, as a dictionary that ``json`` takes.

    Args:
        case: what is timed.
        variants: their names, as ``VARIANTS`` lists them; all that run here by default.
        repeats: timed steps of each, after one that is not.
        say: is given each line of the table.

    Returns:
        ``case``, ``machine``, ``data`` (seconds of drawing and gathering one update) and ``rows``: for each variant
        ``seconds``, ``ratio`` (of a step to the episodic step on the same layers; ``ratio_to_fastest`` to the
        fastest of those) and, on a GPU, ``peak_bytes`` beyond model and data.
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
            if variants or name == next(reversed(chosen)) and not steps:  # nor can any other row
                raise
            say(f"left out: {name}: {str(error).partition(chr(10))[0]}")
    times = interleaved(steps, repeats=repeats)
    del steps

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
            "peak_bytes": peak_memory(case, name),
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


def peak_memory(case: Case, name: str) -> int | None:
    """Bytes beyond model and data at the peak of a step on a GPU; elsewhere ``None``."""
    if not case.device.startswith("cuda"):
        return None
    stream = task_stream(case)
    step, before = partial(prepare(name, case), [stream[k] for k in range(case.pairs)]), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


COLUMNS = {  # of the table: what of a row, in which unit, and how it is written
    "s/step": ("seconds", 1, ".4f"),
    "ratio": ("ratio", 1, ".2f"),
    "fastest": ("ratio_to_fastest", 1, ".2f"),
    "peak MB": ("peak_bytes", 1e6, ".0f"),
}


def table(result: dict[str, Any]) -> str:
    """The rows as text."""
    width = 2 + max(22, *(len(row["name"]) for row in result["rows"]))
    lines = [" " * width + "".join(f"{title:>10}" for title in COLUMNS)]
    for row in result["rows"]:
        cells = ("" if row[name] is None else format(row[name] / unit, form) for name, unit, form in COLUMNS.values())
        lines.append(f"{row['name']:{width}}" + "".join(f"{cell:>10}" for cell in cells))
    data = result["data"]["seconds"]
    share = 100 * data / min(row["seconds"] for row in result["rows"])
    lines.append(
        "ratio: time ÷ two plain episodes on the same layers; fastest: time ÷ the fastest two plain episodes; "
        f"data {1e3 * data:.1f} ms, {share:.1f}% of the fastest step"
    )
    return "\n".join(lines)
