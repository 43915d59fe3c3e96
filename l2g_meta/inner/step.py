r"""The inner step (eq. 3): which parameters it changes, how far, and whether it is differentiated.

Step sizes α are one number, or learned (Meta-SGD, Li et al. 2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from l2g_meta.errors import FitError, check_argument, one_of
from l2g_meta.inner.clone import adapted_names, trainable_parameters
from l2g_meta.inner.scores import checked_loss

LearnInnerLR = Literal[False, "scalar", "tensor", "element"]


class StepSizes(nn.Module):
    r"""Inner step sizes α: one number, or learned per model, per tensor or per element (Meta-SGD).

    Keys of the state dict are ``value`` for one number, else those of the model's parameters.

    Args:
        model: the module whose trainable parameters get a step size.
        value: (initial) step size, a finite number.
        learn: see ``L2GWrapper``.
        adapt: see ``L2GWrapper``.

    Example:
        >>> alpha = StepSizes(nn.Linear(2, 1), 0.1, "tensor")
        >>> sorted(alpha.state_dict()), alpha("bias").item() == torch.tensor(0.1).item()
        (['bias', 'weight'], True)
    """

    def __init__(self, model: nn.Module, value: float, learn: LearnInnerLR = False, adapt: Sequence[str] | None = None):
        super().__init__()
        is_step = isinstance(value, Real) and 0 <= value < math.inf
        check_argument("inner_lr", value, "a number of at least 0, finite", is_step)
        trainable = trainable_parameters(model)
        if not trainable:
            raise FitError(f"need a model with trainable parameters, {type(model).__name__} has none")
        trainable = {name: trainable[name] for name in adapted_names(model, adapt)}
        self.learn = one_of("learn_inner_lr", learn, (False, "scalar", "tensor", "element"))
        if learn in ("tensor", "element"):
            for name, p in trainable.items():
                alpha = torch.full(p.shape if learn == "element" else (), value, dtype=p.dtype, device=p.device)
                self._node(name, create=True)._parameters[name.rpartition(".")[2]] = nn.Parameter(alpha)
        elif learn == "scalar":
            like = next(iter(trainable.values()))
            self.value = nn.Parameter(torch.tensor(value, dtype=like.dtype, device=like.device))
        else:
            # float64, to be the given number in float64 models; without dimensions it promotes nothing.
            self.register_buffer("value", torch.tensor(value, dtype=torch.float64))

    def start(self, value: float) -> None:
        """Sets a step size that is not learned; what is learned stays as it is."""
        if self.learn is False:
            self.value.fill_(value)

    def forward(self, name: str) -> Tensor:
        """Step size of the parameter ``name``: () or of the parameter's shape."""
        if self.learn in (False, "scalar"):
            return self.value
        node = self._node(name)
        key = name.rpartition(".")[2]
        if node is None or key not in node._parameters:
            raise FitError(
                f"need a step size for {name!r}, which was frozen or missing when the wrapper was made; make the "
                "wrapper after choosing which parameters train"
            )
        return node._parameters[key]

    def _node(self, name: str, *, create: bool = False) -> Any:
        # A tree of plain modules, so that keys equal the model's; names may hold dots, which attributes may not.
        node: nn.Module | None = self
        for part in name.split(".")[:-1]:
            if create:
                node._modules.setdefault(part, nn.Module())  # type: ignore[union-attr]
            node = None if node is None else node._modules.get(part)
        return node

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StepSizes:
        # A fixed step size stays in float64 on the CPU, where it acts as a number, whatever the model is cast to.
        return self if self.learn is False else super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Arguments, for printing."""
        return f"learn={self.learn!r}"


class InnerStep:
    r"""One step of gradient descent, :math:`\theta' - \theta = -\alpha \nabla_\theta L` (eq. 3), by parameter.

    Args:
        alpha: how far.
        adapt: which parameters, see ``L2GWrapper``.
        first_order: treat the gradient as a constant.
        whole: under ``first_order``, find the gradient of all trainable parameters, for ``linearised``.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> step = InnerStep(StepSizes(layer, 0.5))
        >>> step.updates(step.gradients((3 * layer.weight).sum(), layer), layer)["weight"].item()
        -1.5
    """

    def __init__(
        self, alpha: StepSizes, *, adapt: Sequence[str] | None = None, first_order: bool = False, whole: bool = False
    ):
        self.alpha, self.adapt, self.first_order, self.whole = alpha, adapt, first_order, whole

    def gradients(self, loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
        """The gradient of a loss by name; parameters that the loss does not depend on are left out.

        Raises:
            FitError: if the loss is no number, has no graph, or depends on none of the parameters.
        """
        if not checked_loss(loss).requires_grad:
            raise FitError(
                "need a loss that depends on the learner's parameters, got one without a graph; compute it by "
                "learner.loss(task), with gradients, a parameter to train and no checkpoint(use_reentrant=True)"
            )
        parameters = trainable_parameters(module)
        names = list(parameters) if self.first_order and self.whole else adapted_names(module, self.adapt)
        found = torch.autograd.grad(
            loss, [parameters[name] for name in names], create_graph=not self.first_order, allow_unused=True
        )
        return {name: g for name, g in zip(names, found, strict=True) if g is not None}

    def updates(self, g: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
        """θ' − θ of each parameter that is adapted, from their gradients.

        Raises:
            FitError: if there are none.
        """
        updates = {name: -self.alpha(name) * g[name] for name in adapted_names(module, self.adapt) if name in g}
        if not updates:
            why = "a loss of another learner, or of a checkpoint with use_reentrant=True"
            raise FitError(f"need a loss that depends on this learner's parameters, got {why}")
        return updates

    def linearised(self, loss: Tensor, g: Mapping[str, Tensor], module: nn.Module) -> Tensor:  # ()
        """The loss with a graph: its own, or under ``first_order``, which has freed that, g in place of it."""
        if not self.first_order or not self.whole:
            return loss
        parameters = trainable_parameters(module)
        slope = torch.stack([(g[name] * parameters[name]).sum() for name in g]).sum()
        return loss.detach() + (slope - slope.detach())


def check_parts(out: Tensor, starts: Mapping[Any, str], names: Collection[str]) -> None:
    """That what was computed with a copy does not use parameters of the module itself beside the copy's.

    Args:
        out: what was computed, with its graph.
        starts: names of the copy's parameters by their ``grad_fn`` as ``clone_module`` made it.
        names: of the parameters to look for.

    Raises:
        FitError: naming those that it uses: steps do not reach them.

    Example:
        >>> weight = torch.ones((), requires_grad=True)
        >>> copy = weight.clone()
        >>> check_parts(copy * weight, {copy.grad_fn: "weight"}, ["weight"])
        Traceback (most recent call last):
        l2g_meta.errors.FitError: need a pass or loss to use the learner's own parameters, got weight of the model ...
    """
    own = {start.next_functions[0]: name for start, name in starts.items() if name in names}
    seen, ahead, found = set(starts), [out.grad_fn], set()
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found |= own.keys() & node.next_functions
            ahead += [next_node for next_node, _ in node.next_functions]
    if found:
        first, *more = (name for edge, name in own.items() if edge in found)
        raise FitError(
            f"need a pass or loss to use the learner's own parameters, got {first}{f', {len(more)} more' * bool(more)} "
            "of the model itself, which inner steps do not change; let forward and loss_fn call parts as attributes "
            "(self.encoder), not by closures, weak references or other objects"
        )
