r"""Batch normalisation as an operator with a closed-form double backward.

Per channel, over the N = batch · height · width values, x̂ = r (x − m) with m the mean and r = (variance + ε)^−½, and
y = w x̂ + b. Sums are over the N values: Sg = Σg, Sh = Σg x̂, Sv = Σv, Svh = Σv x̂, Svg = Σv g. The backward pass is

.. math:: g_x = w r (g - S_g / N - \hat x S_h / N), \qquad g_w = S_h, \qquad g_b = S_g

and its own, for cotangents (v, v_w, v_b) of these three, with a = w r,

.. math::
    \bar g &= a (v - S_v / N - \hat x S_{vh} / N) + v_w \hat x + v_b \\
    h &= -(a / N) (v S_h + g S_{vh}) + v_w g                                   && (\partial / \partial \hat x) \\
    \bar w &= r (S_{vg} - S_v S_g / N - S_{vh} S_h / N) \\
    \bar x &= r (h - \Sigma h / N - \hat x \, \Sigma(h \hat x) / N) - (r w \bar w / N) \hat x

where Σh and Σ(h x̂) follow from the sums above. PyTorch evaluates the same by some fifty element-wise passes, which is
most of what an exact meta-step costs; here it takes a few. ReLU and 2×2 max-pooling after the norm only
select values, y = S(w x̂ + b), so that g above becomes Sᵀg, and ḡ becomes S ḡ.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from l2g_meta.operators import Operator, is_plain, watched
from l2g_meta.operators.norm_passes import add_at, affine, channel_sums, in_format_of, per_channel, positions, take

aten = torch.ops.aten


def batch_norm(
    x: Tensor,  # (n, c, ...)
    w: Tensor | None = None,  # (c,)
    b: Tensor | None = None,  # (c,)
    *,
    running_mean: Tensor | None = None,  # (c,)
    running_var: Tensor | None = None,  # (c,)
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = False,
    pool: bool = False,
) -> Tensor:  # (n, c, ...)
    """Batch normalisation by the batch's own statistics, then ReLU and 2×2 max-pooling if asked for.

    Running statistics that are given are updated in place. Empty batches are PyTorch's own.

    Raises:
        ValueError: for one value per channel, inputs of integers, or pooling of what is no map.
        RuntimeError: for scales or statistics of another number of channels; both as PyTorch does.

    Example:
        >>> batch_norm(torch.tensor([[0.0], [2.0]]), eps=0.0).tolist()
        [[-1.0], [1.0]]
    """
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"need floating-point inputs (n, c, ...), got {x.dtype} of shape {tuple(x.shape)}")
    if pool and x.ndim != 4:
        raise ValueError(f"need maps (n, c, height, width) to pool, got shape {tuple(x.shape)}")
    if x.numel() == x.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
    given = [t for t in (w, b, running_mean, running_var) if t is not None]
    if x.numel() == 0 or any(len(t) != x.shape[1] for t in given):  # a special case of PyTorch's, or its error
        y = F.batch_norm(x, running_mean, running_var, w, b, True, momentum, eps)
        return relu_and_pool(y, relu=relu, pool=pool)
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x = in_format_of(x, x.to(wide)) if pool else x.to(wide)
    w = x.new_ones(x.shape[1]) if w is None else w.to(wide)
    b = x.new_zeros(x.shape[1]) if b is None else b.to(wide)
    with torch.no_grad():
        mean, variance = _statistics(x, running_mean, running_var, momentum)
        rstd = (variance + eps).rsqrt()
    return _Norm.apply(x, w, b, mean, rstd, (eps, relu, pool, None))[0].to(dtype)


def relu_and_pool(y: Tensor, *, relu: bool, pool: bool) -> Tensor:
    """ReLU and 2×2 max-pooling, those that are asked for, by PyTorch's own operators."""
    y = y.relu() if relu else y
    return F.max_pool2d(y, 2) if pool else y


def _statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance in the precision of x, whatever that of the running statistics, updated in place."""
    running = None if running_mean is None or running_var is None else (running_mean, running_var)
    wide = [t.to(x.dtype) for t in running or ()]  # themselves, if of that precision
    found = _quick_statistics(x) if x.ndim > 2 and x.device.type == "cpu" and x.is_contiguous() else None
    if found is None:
        found = aten.batch_norm_update_stats(x, *(wide or (None, None)), momentum)
    elif wide:
        n = x.numel() // x.shape[1]
        wide[0].lerp_(found[0], momentum), wide[1].lerp_(found[1] * n / (n - 1), momentum)
    for t, value in zip(running or (), wide, strict=True):
        if t is not value:
            t.copy_(value)
    return found


def _quick_statistics(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """The same of a contiguous map on a CPU, in a third of that kernel's time; ``None`` where they would be less exact.

    By Σ x (x − m) = Σ (x − m)². Below 10 standard deviations of a mean it is as exact as PyTorch on channels-last maps.
    """
    mean = x.mean([d for d in range(x.ndim) if d != 1])
    variance = channel_sums(x, x, mean, torch.ones_like(mean))[1] / (x.numel() // x.shape[1])
    return (mean, variance) if (mean.square() <= 100 * variance).all() else None


def pooled_norm(relu: Any, y: Tensor, where: Tensor) -> Tensor | None:
    """Maxima y of a ReLU's output, as one function of what the norm before it took: its derivatives pass over y alone.

    ``None`` if there is no such norm, its map is in use, or what it took was changed or freed.
    """
    node, _ = relu.grad_fn.next_functions[0]
    if not is_plain(node, _Norm) or not (node.output() is None or node.output() is relu):
        return None
    try:
        (x, w, mean, rstd, *_), b, _ = node.saved_tensors, node.b(), relu.grad_fn.saved_tensors
    except RuntimeError:  # PyTorch says so in the backward pass, if there is one
        return None
    same = b is not None and tuple(t.requires_grad for t in (x, w, b)) == node.needs_input_grad[:3]
    if not same or (b.requires_grad and b._version != node.version):
        return None
    known = y, positions(where, x), y.clone()  # users may write to what they get
    return _Norm.apply(x, w, b, mean, rstd, (node.eps, True, True, known))[0]


@watched
class _Norm(Operator):
    @staticmethod
    def forward(
        x: Tensor, w: Tensor, b: Tensor, mean: Tensor, rstd: Tensor, options: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor | None]:
        _, relu, pool, known = options
        if known is not None:  # y, its positions, and y to keep
            return known[:2]
        at = None
        if pool:  # before the scale, on which a negative one turns the largest into the smallest
            turned = x.is_cuda or (w < 0).any()  # not asked where the answer would have to travel
            sign = per_channel(torch.where(w < 0, -1.0, 1.0).to(x.dtype), x) if turned else None
            chosen, where = F.max_pool2d_with_indices(x if sign is None else x * sign, [2, 2])
            at, x = positions(where, x), chosen if sign is None else chosen * sign
        y = affine(x, w * rstd, b - mean * w * rstd)
        return (y.relu_() if relu else y), at

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor | None]) -> None:
        x, w, b, mean, rstd, (ctx.eps, relu, pool, known) = inputs
        y, at = outputs
        if at is not None:
            ctx.mark_non_differentiable(at)
        ctx.set_materialize_grads(False)
        ctx.output = weakref.ref(y)
        ctx.b = weakref.ref(b) if b.requires_grad else lambda: b  # no backward pass needs it
        ctx.version = b._version if b.requires_grad else 0
        ctx.plain = not (relu or pool) and (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last))
        ctx.save_for_backward(x, w, mean, rstd, known[2] if known else y if relu else None, at)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 6
        return *_NormBackward.apply(g, *ctx.saved_tensors, ctx.eps), None, None, None


class _NormBackward(Operator):
    @staticmethod
    def forward(
        g: Tensor, x: Tensor, w: Tensor, mean: Tensor, rstd: Tensor, out: Tensor | None, at: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        g = _active(in_format_of(x, g), out)
        if at is None:
            return aten.native_batch_norm_backward(g, x, w, None, None, mean, rstd, True, 0.0, [True, True, True])
        sum_g, sum_h = channel_sums(g, take(x, at), mean, rstd)
        n, a = x.numel() // x.shape[1], w * rstd  # a pass over maps is one linear combination: of g, x and 1
        slope = -a * rstd * sum_h / n
        return add_at(affine(x, slope, -a * sum_g / n - mean * slope), at, g * per_channel(a, g)), sum_h, sum_g

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors, *(t.clone() for t in outputs[1:]))  # users may write to what they get

    @staticmethod
    def backward(ctx: Any, v: Tensor, vw: Tensor, vb: Tensor) -> tuple[Tensor | None, ...]:
        g, x, w, mean, rstd, out, at, sum_h, sum_g = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again

            def norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:  # the definition
                dims = [d for d in range(x.ndim) if d != 1]
                centred = x - x.mean(dims, keepdim=True)
                xh = centred * (centred.square().mean(dims, keepdim=True) + ctx.eps).rsqrt()
                y = per_channel(w, x) * xh + per_channel(b, x)
                y = y if at is None else take(y, at)
                return y if out is None else y * (out > 0).to(y.dtype)

            return *differentiated_twice(norm, v, vw, vb, g, x, w), None, None, None, None, None

        # The closed form above, in two passes of sums and two of output.
        v, g = in_format_of(x, v), _active(in_format_of(x, g), out)
        chosen, v_at = (x, v) if at is None else (take(x, at), take(v, at))
        sum_v, sum_vh = channel_sums(v, x, mean, rstd)
        _, sum_vg = channel_sums(v_at, g, torch.zeros_like(mean), torch.ones_like(mean))
        n, a = x.numel() // x.shape[1], w * rstd
        bar_w = rstd * (sum_vg - sum_v * sum_g / n - sum_vh * sum_h / n)

        slope = (vw - a * sum_vh / n) * rstd  # ḡ = S(a v + (vw − a Svh/N) x̂ + vb − a Sv/N)
        bar_g = affine(chosen, slope, vb - a * sum_v / n - mean * slope).addcmul_(v_at, per_channel(a, v))

        of_v, of_g = -a / n * sum_h, vw - a / n * sum_vh  # h = of_v v + of_g g
        slope = rstd * rstd * (-(of_v * sum_vh + of_g * sum_h) / n - w * bar_w / n)  # −Σ(h x̂)/N and −q r/N
        shift = -rstd * (of_v * sum_v + of_g * sum_g) / n - mean * slope
        bar_x = affine(x, slope, shift).addcmul_(v, per_channel(rstd * of_v, v))
        times_g = per_channel(rstd * of_g, g)
        bar_x = bar_x.addcmul_(g, times_g) if at is None else add_at(bar_x, at, g * times_g)
        return _active(bar_g, out), bar_x, bar_w, None, None, None, None, None


def _active(g: Tensor, out: Tensor | None) -> Tensor:
    """The cotangent of what ReLU took, from that of its output ``out``; itself, where there is no ReLU."""
    return g if out is None else aten.threshold_backward(g, out, 0)


def differentiated_twice(
    norm: Callable[[Tensor, Tensor, Tensor], Tensor], v: Tensor, vw: Tensor, vb: Tensor, g: Tensor, x: Tensor, w: Tensor
) -> tuple[Tensor, ...]:
    """Cotangents (ḡ, x̄, w̄) of a norm of x, w and b by PyTorch's automatic differentiation: slow, and to any order."""
    with torch.enable_grad():
        # Under other names, so that only this use of them counts: g itself may depend on x.
        g, x, w = (t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in (g, x, w))
        b = torch.zeros_like(w, requires_grad=True)  # which moves none of the derivatives
        first = torch.autograd.grad(norm(x, w, b), (x, w, b), g, create_graph=True)
        return torch.autograd.grad(first, (g, x, w), (v, vw, vb), create_graph=True)
