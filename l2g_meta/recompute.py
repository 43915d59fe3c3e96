r"""An inner gradient that keeps no graph: computed again when the meta-gradient needs its derivative.

Back-propagating v = ∂L_j/∂θ' through θ' = θ − α g(θ) needs v − H(α v), where H is the Hessian of the inner loss at θ:
only then is the graph of g wanted, and by then that of T_j is gone. The two graphs never exist together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from l2g_meta.inner.clone import hold, trainable_parameters


def recomputed_gradient(
    module: nn.Module, loss: Callable[[], Tensor], *, of: Collection[str] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss of a module, and its differentiable gradient by name, whose graph is built in the backward pass.

    The second evaluation sees the same parameters, buffers, random numbers and autocast setting, and writes no buffer.
    Only the module's trainable parameters get a gradient through it, no other tensor that the loss depends on.

    Args:
        module: a differentiable copy made by ``clone_module``.
        loss: computes the scalar loss with the module's current parameters.
        of: names of the parameters whose gradient is wanted; by default of all trainable ones.

    Example:
        >>> from l2g_meta.inner.clone import clone_module
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> learner = clone_module(layer)
        >>> _, g = recomputed_gradient(learner, lambda: (learner.weight**3).sum())
        >>> g["weight"].backward()
        >>> torch.allclose(layer.weight.grad, 6 * layer.weight)
        True
    """
    parameters = trainable_parameters(module)
    wanted = [k for k, name in enumerate(parameters) if of is None or name in of]
    found = _Gradient.apply(_Replay(module, loss, list(parameters.values()), wanted), *parameters.values())
    return found[0], {name: g for name, g in zip(parameters, found[1:], strict=True) if g is not None}


class _Replay:
    """Evaluates a loss and its gradient, any number of times alike."""

    def __init__(self, module: nn.Module, loss: Callable[[], Tensor], parameters: list[Tensor], wanted: list[int]):
        self.module, self.loss, self.wanted = module, loss, wanted
        positions = {id(p): k for k, p in enumerate(parameters)}
        self.slots = [  # where each parameter is held: after the step other tensors are there
            (child, name, positions[id(p)])
            for child in module.modules()
            for name, p in child._parameters.items()
            if id(p) in positions
        ]
        self.buffers = _copied_buffers(module)  # spectral norms compute with theirs
        device = parameters[0].device
        kind = device.type
        self.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self.generators = [device] if kind == "cuda" else []
        self.state = torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in self.generators]

    def __call__(self, parameters: list[Tensor], *, create_graph: bool) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        with torch.enable_grad(), _parameters_replaced(self.slots, parameters):
            loss = self.loss()
            if not loss.requires_grad:
                return loss, (None,) * len(parameters)
            chosen = [parameters[k] for k in self.wanted]
            gradients = torch.autograd.grad(loss, chosen, create_graph=create_graph, allow_unused=True)
            found = dict(zip(self.wanted, gradients, strict=True))
            return loss, tuple(found.get(k) for k in range(len(parameters)))

    def again(self, parameters: list[Tensor]) -> tuple[Tensor | None, ...]:
        with torch.random.fork_rng(devices=self.generators), _buffers_replaced(self.buffers):
            torch.set_rng_state(self.state[0])
            for device, state in zip(self.generators, self.state[1], strict=True):
                torch.cuda.set_rng_state(state, device)
            kind, dtype, enabled = self.autocast
            with torch.autocast(kind, dtype, enabled):
                return self(parameters, create_graph=True)[1]


class _Gradient(Function):
    @staticmethod
    def forward(ctx: Any, replay: _Replay, *parameters: Tensor) -> tuple[Tensor | None, ...]:
        ctx.replay = replay
        ctx.save_for_backward(*parameters)
        ctx.set_materialize_grads(False)
        loss, gradients = replay([p.detach().requires_grad_() for p in parameters], create_graph=False)
        ctx.mark_non_differentiable(loss := loss.detach())
        return loss, *gradients

    @staticmethod
    def backward(ctx: Any, _: Tensor | None, *v: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "need the graph of the inner step to differentiate the meta-gradient, got recompute=True, which keeps "
                "none; use recompute=False, or leave create_graph out"
            )
        parameters = [p.detach().requires_grad_() for p in ctx.saved_tensors]
        gradients = ctx.replay.again(parameters)
        asked = [k for k, g in enumerate(gradients) if v[k] is not None and g is not None and g.requires_grad]
        if not asked:
            return None, *[None] * len(parameters)
        products = torch.autograd.grad(
            [gradients[k] for k in asked],
            parameters,
            [v[k] for k in asked],
            allow_unused=True,
        )
        return None, *products


@contextlib.contextmanager
def _parameters_replaced(slots: list[tuple[nn.Module, str, int]], new: list[Tensor]) -> Iterator[None]:
    old = [child._parameters[name] for child, name, _ in slots]
    hold([(child, name, new[k]) for child, name, k in slots])
    try:
        yield
    finally:
        hold([(child, name, p) for (child, name, _), p in zip(slots, old, strict=True)])


def _copied_buffers(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    copies: dict[int, Tensor] = {}  # one of a buffer that several modules share
    return [
        (child, name, copies.setdefault(id(b), b.clone()))
        for child in module.modules()
        for name, b in child._buffers.items()
        if b is not None
    ]


@contextlib.contextmanager
def _buffers_replaced(places: list[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    old = [child._buffers[name] for child, name, _ in places]
    copies = {id(b): b.clone() for _, _, b in places}  # written by the evaluation, which may come again
    for child, name, b in places:
        child._buffers[name] = copies[id(b)]
    try:
        yield
    finally:
        for (child, name, _), previous in zip(places, old, strict=True):
            child._buffers[name] = previous
