"""Passes that are differentiated twice: operators with a fast second derivative, for any network as it is.

An exact inner step differentiates the backward pass of T_i. PyTorch's double backward of batch norm takes some fifty
element-wise passes, that of convolution copies channels-last maps, fused attention has none. While a pass runs under
``twice_differentiable()``, these operators are replaced by those of ``l2g_meta.operators``: the same values, the same
derivatives of any order. ReLU and max-pooling are among them: PyTorch's second derivative of both adds maps of zeros.
Every map keeps the layout that it has with PyTorch's operators: views, and writes through them, are the network's own.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from operator import index
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from l2g_meta import operators
from l2g_meta.operators.batch_norm import batch_norm
from l2g_meta.operators.convolution import Geometry, conv2d
from l2g_meta.operators.group_norm import group_norm
from l2g_meta.operators.selection import max_pool2d, relu

Pair = int | tuple[int, ...]


@contextmanager
def twice_differentiable(*, fast: bool = True) -> Iterator[None]:
    """While entered, what a network computes has an exact second derivative, and a fast one.

    ``L2GWrapper`` enters it for each pass of a learner. A pass that you run yourself (``learner.module(x)``, a loop
    around learn2learn's ``MAML``) needs it around the forward pass only. Convolution, batch norm in training mode and
    group norm run as ``l2g_meta.operators``; ``scaled_dot_product_attention`` runs as matrix products and a softmax;
    ``hardsigmoid`` as ``relu6``, recurrent layers without cuDNN. What ``torch.compile`` decorates runs uncompiled.
    Max-pooling after ReLU after batch norm has one derivative with them. ``autograd.grad`` by the map that is pooled
    does not see that pooling, unless a hook or ``retain_grad`` was set on the map before.
    Inside functorch transforms, forward-mode differentiation, compiled, exported or traced regions and
    ``torch.utils.checkpoint``, PyTorch's own operators run. So they do on CUDA, where ours have not run yet:
    ``L2G_FAST_CUDA=1`` takes ours there as well, if it is set before this package is imported.

    Args:
        fast: whether to replace operators whose second derivative PyTorch has, but slowly.

    Example:
        >>> import torch
        >>> q = torch.randn(1, 1, 3, 4, requires_grad=True)
        >>> with twice_differentiable():
        ...     y = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        >>> (g,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
        >>> torch.autograd.grad(g.sum(), q)[0].shape
        torch.Size([1, 1, 3, 4])
    """
    with _eager(), MATH, _Operators(MISSING | FAST if fast else MISSING):  # a mode for each pass
        yield


class _Setting:
    """A setting of the whole process: the first thread that needs it makes it, the last one undoes it."""

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]):
        self.make, self.users, self.lock = make, 0, threading.Lock()

    def __enter__(self) -> None:
        with self.lock:
            if not self.users:
                self.made = self.make()
                self.made.__enter__()
            self.users += 1

    def __exit__(self, *error: Any) -> None:
        with self.lock:
            self.users -= 1
            if not self.users:
                self.made.__exit__(None, None, None)


@contextmanager
def _attention_as_products() -> Iterator[None]:
    """``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``, but the thread that leaves it may be another."""
    kinds = ("flash", "mem_efficient", "cudnn", "math")
    before = {kind: getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in kinds}
    for kind in kinds:
        getattr(torch.backends.cuda, f"enable_{kind}_sdp")(kind == "math")
    try:
        yield
    finally:
        for kind, enabled in before.items():
            getattr(torch.backends.cuda, f"enable_{kind}_sdp")(enabled)


@contextmanager
def _cudnn_disabled() -> Iterator[None]:
    before, torch.backends.cudnn.enabled = torch.backends.cudnn.enabled, False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


MATH, NO_CUDNN = _Setting(_attention_as_products), _Setting(_cudnn_disabled)
EAGER = _Setting(lambda: torch.compiler.set_stance("force_eager"))


def _eager() -> AbstractContextManager[Any]:
    """Has functions and methods that are compiled run as written: PyTorch differentiates compiled code once only."""
    return nullcontext() if "torch._dynamo" not in sys.modules or torch.compiler.is_compiling() else EAGER


class _Operators(TorchFunctionMode):
    """Calls one function in place of another, where that function takes the arguments."""

    def __init__(self, table: dict[Callable[..., Any], Callable[..., Any]]):
        super().__init__()
        self.table = table

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        ours = self.table.get(function)
        if ours is not None and all(kind in PLAIN for kind in types) and not _transformed():
            result = ours(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return function(*args, **kwargs)


PLAIN = (Tensor, nn.Parameter)


def _transformed() -> bool:
    """Whether something else than eager reverse-mode autograd sees the operators."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        # Checkpointing runs the pass again, outside of this mode, and wants the same tensors to be saved.
        or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    )


def _taken(x: Tensor, *vectors: Tensor | None) -> bool:
    """Whether our operators are for such maps and vectors; what is refused, PyTorch refuses."""
    if not x.is_floating_point() or x.ndim < 2 or x.numel() == 0 or x.device.type not in operators.DEVICES:
        return False
    dtypes = x.dtype, torch.promote_types(x.dtype, torch.float32)
    return all(t is None or (t.ndim == 1 and t.dtype in dtypes) for t in vectors)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    fits = _taken(input, running_mean, running_var, weight, bias) and (running_mean is None) == (running_var is None)
    if not training or not fits:
        return NotImplemented
    return batch_norm(
        input, weight, bias, running_mean=running_mean, running_var=running_var, momentum=momentum, eps=eps
    )


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    fits = _taken(input, weight, bias) and input.shape[1] % num_groups == 0 and input.shape[1:].numel() > num_groups
    fits = fits and (input.ndim < 5 or input.is_contiguous())
    return group_norm(input, num_groups, weight, bias, eps=eps) if fits else NotImplemented


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    if isinstance(padding, str) or input.ndim != 4 or not _taken(input):
        return NotImplemented
    return conv2d(input, weight, bias, Geometry(*map(_pair, (stride, padding, dilation)), groups))  # type: ignore


def _leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    written = inplace and (input._is_view() or input.is_leaf or not torch.is_grad_enabled())  # PyTorch's, or its error
    fits = _taken(input) and negative_slope >= 0 and not written
    return relu(input, negative_slope, inplace=inplace) if fits else NotImplemented


def _max_pool2d(
    input: Tensor,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    if return_indices or input.ndim != 4 or not _taken(input):
        return NotImplemented
    stride = kernel_size if stride is None or stride in ((), []) else stride
    size, step, pad, spread = (list(_pair(n)) for n in (kernel_size, stride, padding, dilation))
    return max_pool2d(input, size, step, pad, spread, ceil_mode)


def _pair(n: Pair) -> tuple[int, ...]:
    n = tuple(n) if isinstance(n, tuple | list) else (index(n),)
    return n * 2 if len(n) == 1 else n


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    if not input.is_floating_point():
        return NotImplemented
    wide = input.to(torch.promote_types(input.dtype, torch.float32))  # rounded once, as PyTorch's
    y = (F.relu6(wide + 3) / 6).to(input.dtype)
    return input.copy_(y) if inplace else y


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _without_cudnn(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with NO_CUDNN:
            return function(*args, **kwargs)

    return call


Table = dict[Callable[..., Any], Callable[..., Any]]
FAST: Table = {
    torch.conv2d: _conv2d,
    F.batch_norm: _batch_norm,
    F.group_norm: _group_norm,
    F.max_pool2d: _max_pool2d,
    F.leaky_relu: _leaky_relu,
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), partial(_leaky_relu, negative_slope=0.0)),
    **dict.fromkeys((torch.relu_, Tensor.relu_), partial(_leaky_relu, negative_slope=0.0, inplace=True)),
}
MISSING: Table = {  # whose second derivative PyTorch lacks, or, of weight norm, has wrong
    F.hardsigmoid: _hardsigmoid,
    torch._weight_norm: _weight_norm,
    **{rnn: _without_cudnn(rnn) for rnn in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)},
}
