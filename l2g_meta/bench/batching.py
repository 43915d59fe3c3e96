"""What computing the inner tasks of all pairs together could save: they share θ, the tasks of T_j do not.

Ways to the gradients and Hessian-vector products of the T_i of all pairs: one task after the other; all images in one
pass, with the statistics and gradients of each task; the same with one set of statistics and summed gradients, which is
*less* than L2G needs and so bounds from above what sharing can gain; and ``torch.func.vmap`` over the tasks, on
PyTorch's own layers, beside one task after the other on those.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from l2g_meta.allocator import keep_freed_memory
from l2g_meta.bench.case import Case
from l2g_meta.bench.concatenated import summed_loss, task_gradients
from l2g_meta.bench.rows import build, check_names, task_stream
from l2g_meta.bench.run import describe, describe_machine
from l2g_meta.bench.timing import interleaved
from l2g_meta.bench.variants import Layers
from l2g_meta.norm import batchnorm_policy
from l2g_meta.task import Task


def batching(
    case: Case, *, variants: Sequence[str] | None = None, repeats: int = 5, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Medians of interleaved repeats, in seconds, of these ways or all; ``case.pairs`` tasks.

    Raises:
        L2GError: for an unknown name.
    """
    keep_freed_memory()
    check_names(variants or (), WAYS)
    stream, device = task_stream(case), torch.device(case.device)
    tasks = [stream[k][0] for k in range(case.pairs)]
    given: dict[Layers, list[Task]] = {"fused": tasks, "stock": tasks}
    steps = {}
    for name in variants or WAYS:
        layers: Layers = "stock" if STOCK in name else "fused"
        steps[name] = partial(WAYS[name], build(case, layers=layers), given[layers])
    times = interleaved(steps, device, repeats=repeats)
    medians = {name: statistics.median(values) for name, values in times.items()}
    say(f"T_i of {describe(case)}; {describe_machine(case)}")
    first = next(iter(medians.values()))
    for name, median in medians.items():
        say(f"{name:36}{median:9.3f} s{median / first:8.2f}")
    machine = {"description": describe_machine(case)}
    return {"case": asdict(case), "machine": machine, "seconds": medians, "all_seconds": times}


def sequential(model: Any, tasks: Sequence[Task]) -> None:
    """Gradient and Hessian-vector product of one task after the other."""
    for task in tasks:
        _hessian_vector_product(model, model.loss_fn(model(task), task.query_y))


def one_pass(model: Any, tasks: Sequence[Task]) -> None:
    """The same, all images in one pass through the encoder."""
    parameters, gradients = dict(model.named_parameters()), task_gradients(model, tasks)
    cotangents = [parameters[name].detach().expand_as(g) for name, g in gradients.items()]
    torch.autograd.grad(list(gradients.values()), list(parameters.values()), cotangents)


def together(model: Any, tasks: Sequence[Task]) -> None:
    """The same of the summed losses, all images in one pass through the encoder."""
    _hessian_vector_product(model, summed_loss(model, tasks, encoder=model.encoder, heads=[model.head] * len(tasks)))


def vmapped(model: Any, tasks: Sequence[Task]) -> None:
    """The same of each task, by ``torch.func.vmap``."""
    parameters = dict(model.named_parameters())
    columns = zip(*(task[:4] for task in tasks), strict=True)
    support_x, support_y, query_x, query_y = (torch.stack(column) for column in columns)

    def loss(values: dict[str, Tensor], *fields: Tensor) -> Tensor:
        scores = torch.func.functional_call(model, values, (Task._make((*fields, tasks[0].n_way)),))
        return model.loss_fn(scores, fields[3])

    def product(*fields: Tensor) -> dict[str, Tensor]:
        def projected(values: dict[str, Tensor]) -> Tensor:
            gradients = torch.func.grad(loss)(values, *fields)
            return torch.stack([(gradients[name] * p.detach()).sum() for name, p in values.items()]).sum()

        return torch.func.grad(projected)(parameters)

    with batchnorm_policy(model, "batch"):  # buffers cannot be written under torch.func
        torch.func.vmap(product)(support_x, support_y, query_x, query_y)


STOCK = "stock layers"
WAYS: dict[str, Callable[[Any, Sequence[Task]], None]] = {
    "one after the other": sequential,
    "one pass": one_pass,
    "one pass (bound)": together,
    f"one after the other, {STOCK}": sequential,
    f"vmap, {STOCK}": vmapped,
}


def _hessian_vector_product(model: Any, loss: Tensor) -> None:
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    torch.autograd.grad(gradients, parameters, [p.detach() for p in parameters])
