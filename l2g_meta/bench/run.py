"""Times the variants in turn, measures their memory, compares their gradients."""

from __future__ import annotations

import multiprocessing
import platform
import resource
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l2g_meta.allocator import keep_freed_memory
from l2g_meta.backbones import Conv4, ResNet12
from l2g_meta.bench.case import Case
from l2g_meta.bench.floor import floor, layers, measure_machine
from l2g_meta.bench.timing import interleaved, seconds
from l2g_meta.bench.variants import VARIANTS, Pairs, Step, available
from l2g_meta.data.classes import ClassDataset
from l2g_meta.data.pairs import TaskPairs
from l2g_meta.errors import L2GError
from l2g_meta.heads import PrototypicalHead, RelationHead
from l2g_meta.model import MetricModel, feature_shape

BACKBONES: dict[str, Callable[..., Any]] = {"conv4": Conv4, "resnet12": ResNet12}


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
        variants: their names, as ``VARIANTS`` lists them; all that are installed by default.
        repeats: timed steps of each, after one that is not.
        memory: also measure peak memory, on the CPU in one new process for each variant.
        say: is given each line of the table.

    Returns:
        ``case``, ``machine``, ``data`` (seconds of drawing and gathering one update), ``floor`` and ``rows``: for each
        variant ``seconds``, ``ratio`` (to the episodic step on the same layers; ``ratio_to_fastest`` to the fastest),
        ``tasks_per_second``, ``images_per_second``, ``peak_bytes`` beyond model and data, ``of_floor`` (the fraction of
        the floor's speed that is achieved), and ``gradient_error``, relative to float64.
    """
    kept = keep_freed_memory()
    device = torch.device(case.device)
    chosen = available(variants)
    stream = task_stream(case)
    pairs = [stream[k] for k in range(case.pairs)]
    say(f"{describe(case)}; {describe_machine(case)}")

    machine = measure_machine(device)
    one_i, one_j = (layers(build(case, fused=True), task) for task in pairs[0])
    floors = {
        exact: floor(one_i, one_j, machine, inner_steps=case.inner_steps if exact else 0) for exact in (False, True)
    }
    draws = iter(range(case.pairs, 10 * case.pairs))
    drawn = [seconds(lambda: stream.batch([next(draws) for _ in range(case.pairs)]), device) for _ in range(9)]

    steps = {name: v.make(build(case, fused=v.fused), case.inner_lr, case.inner_steps) for name, v in chosen.items()}
    times = interleaved({name: partial(step, pairs) for name, step in steps.items()}, device, repeats=repeats)
    del steps

    errors = gradient_errors(case, [name for name, v in chosen.items() if v.exact])
    median = {name: statistics.median(values) for name, values in times.items()}
    plain = [median[name] for name in ("episodic", "episodic, stock layers") if name in median]
    rows = []
    for name, variant in chosen.items():
        own = median.get("episodic" if variant.fused else "episodic, stock layers")
        row = {
            "name": name,
            "seconds": median[name],
            "ratio": median[name] / own if own else None,
            "ratio_to_fastest": median[name] / min(plain) if plain else None,
            "tasks_per_second": 2 * case.pairs / median[name],
            "images_per_second": case.images / median[name],
            "of_floor": case.pairs * floors[variant.exact]["floor_s"] / median[name],
            "peak_bytes": peak_memory(case, name, kept) if memory else None,
            "gradient_error": errors.get(name),
            "all_seconds": times[name],
        }
        rows.append(row)
    result = {
        "case": asdict(case),
        "machine": {
            "description": describe_machine(case),
            "bandwidth": machine.bandwidth,
            "flops": machine.flops,
            "keeps_freed_memory": kept,
        },
        "repeats": repeats,
        "data": {"seconds": statistics.median(drawn)},
        "floor": {"episodic": floors[False], "l2g": floors[True]},
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
    variants: Sequence[str] = ("episodic", "l2g", "learn2learn"),
    repeats: int = 3,
    say: Callable[[str], None] = print,
    axes: dict[str, Sequence[int]] = AXES,
) -> list[dict[str, Any]]:
    """The bench along each axis by itself, the other values as in ``case``."""
    found = []
    for axis, values in axes.items():
        for value in values:
            changed = replace(case, **{axis: value})  # type: ignore[arg-type]
            result = bench(changed, variants=variants, repeats=repeats, memory=False, say=say)
            found.append({"axis": axis, "value": value, **result})
    return found


def task_stream(case: Case) -> TaskPairs:
    """Pairs of tasks from random uint8 images that lie on the device."""
    generator = np.random.default_rng(0)
    per_class, classes = case.shots + case.queries, 2 * case.ways
    images = generator.integers(0, 256, (classes * per_class, case.image_size, case.image_size, 3), dtype=np.uint8)
    data = ClassDataset(images, np.repeat(np.arange(classes), per_class))
    return TaskPairs(data, ways=case.ways, shots=case.shots, queries=case.queries, seed=0, device=case.device)


def build(case: Case, *, fused: bool) -> MetricModel:
    """The model of a case, always with the same weights."""
    if case.backbone not in BACKBONES or case.head not in ("prototypical", "relation"):
        raise L2GError(f"need backbone conv4 or resnet12, head prototypical or relation; got {case}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        if case.head == "prototypical":
            model = MetricModel(BACKBONES[case.backbone](3, fused=fused), PrototypicalHead())
        elif case.backbone == "conv4":
            encoder = Conv4(3, pools=2, fused=fused)
            channels, *size = feature_shape(encoder, (3, case.image_size, case.image_size))
            model = MetricModel(encoder, RelationHead(channels, tuple(size), fused=fused))  # type: ignore[arg-type]
        else:
            raise L2GError("the relation head compares maps, of which resnet12 leaves none; need --backbone conv4")
    return model.to(case.device)


def gradient_errors(case: Case, names: Sequence[str]) -> dict[str, float]:
    """Relative error of each variant's meta-gradient against float64, on smaller images."""
    small = replace(case, image_size=min(case.image_size, 28), pairs=1, queries=min(case.queries, 5))
    stream = task_stream(small)
    exact = _gradient(small, "l2g, stock layers", [stream[0]], torch.float64)
    errors = {}
    for name in names:
        g = _gradient(small, name, [stream[0]], torch.float32)
        errors[name] = ((g - exact).norm() / exact.norm()).item()
    return errors


def _gradient(case: Case, name: str, pairs: Pairs, dtype: torch.dtype) -> Tensor:
    variant = VARIANTS[name]
    model = build(case, fused=variant.fused).to(dtype)
    cast = [tuple(t._replace(support_x=t.support_x.to(dtype), query_x=t.query_x.to(dtype)) for t in p) for p in pairs]
    variant.make(model, case.inner_lr, case.inner_steps)(cast)  # type: ignore[arg-type]
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def peak_memory(case: Case, name: str, keep: bool) -> int | None:
    """Bytes beyond model and data at the peak of a step; ``None`` where they cannot be measured."""
    if case.device.startswith("cuda"):
        step, pairs = _prepared(case, name)
        step(pairs)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(pairs)
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("spawn")  # a process that has held nothing yet
    with context.Pool(1) as pool:
        return pool.apply(_resident_peak, (case, name, keep, torch.get_num_threads()))


def _resident_peak(case: Case, name: str, keep: bool, threads: int) -> int:
    torch.set_num_threads(threads)
    if keep:
        keep_freed_memory()
    # Kernels are loaded and threads started by a small step first.
    step, pairs = _prepared(replace(case, image_size=28 if case.image_size > 28 else 20, pairs=1), name)
    step(pairs)
    step, pairs = _prepared(case, name)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    for _ in range(2):
        step(pairs)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 - before


def _prepared(case: Case, name: str) -> tuple[Step, Pairs]:
    variant, stream = VARIANTS[name], task_stream(case)
    step = variant.make(build(case, fused=variant.fused), case.inner_lr, case.inner_steps)
    return step, [stream[k] for k in range(case.pairs)]


def describe(case: Case) -> str:
    """The case in words."""
    return (
        f"{case.backbone}, {case.head}, {case.image_size} px, {case.ways}-way {case.shots}-shot, "
        f"{case.queries} queries, pairs: {case.pairs}, inner steps: {case.inner_steps}"
    )


def describe_machine(case: Case) -> str:
    """Processor, threads, version of PyTorch."""
    if case.device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(case.device)}, PyTorch {torch.__version__}"
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    name = names[0].partition(":")[2].strip() if names else platform.processor()
    level = torch.backends.cpu.get_cpu_capability()
    return f"{name} ({level}), {torch.get_num_threads()} threads, PyTorch {torch.__version__}"


def table(result: dict[str, Any]) -> str:
    """The rows as text."""
    columns = {"s/step": 9, "ratio": 8, "tasks/s": 9, "images/s": 10, "peak MB": 9, "of floor": 10, "error": 10}
    lines = [" " * 24 + "".join(f"{name:>{width}}" for name, width in columns.items())]
    for row in result["rows"]:
        ratio, peak, error = row["ratio"], row["peak_bytes"], row["gradient_error"]
        lines.append(
            f"{row['name']:24}{row['seconds']:9.3f}"
            + (f"{ratio:8.2f}" if ratio else f"{'':8}")
            + f"{row['tasks_per_second']:9.1f}{row['images_per_second']:10.0f}"
            + (f"{peak / 1e6:9.0f}" if peak is not None else f"{'':9}")
            + f"{100 * row['of_floor']:9.0f}%"
            + (f"{error:10.1e}" if error is not None else "")
        )
    machine, data = result["machine"], result["data"]["seconds"]
    share = 100 * data / min(row["seconds"] for row in result["rows"])
    lines.append(
        f"ratio: to two plain episodes on the same layers; floor of one pair {result['floor']['l2g']['floor_s']:.3f} s "
        f"(two episodes {result['floor']['episodic']['floor_s']:.3f} s) at {machine['bandwidth'] / 1e9:.1f} GB/s and "
        f"{machine['flops'] / 1e9:.0f} GFLOP/s; data {1e3 * data:.1f} ms, {share:.1f}% of the fastest step"
    )
    return "\n".join(lines)
