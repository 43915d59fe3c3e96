"""Attention in a pass that is differentiated twice: fused kernels have no second derivative, matrix products have."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch.nn.attention import SDPBackend, sdpa_kernel


def twice_differentiable() -> AbstractContextManager[None]:
    """While entered, ``scaled_dot_product_attention`` runs as matrix products and a softmax, to any order exact.

    ``L2GWrapper.loss`` enters it for learners, unless they are first order. A pass that you run yourself
    (``learner.module(x)``) needs it around the forward pass.

    Example:
        >>> import torch
        >>> q = torch.randn(1, 1, 3, 4, requires_grad=True)
        >>> with twice_differentiable():
        ...     y = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        >>> (g,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
        >>> torch.autograd.grad(g.sum(), q)[0].shape
        torch.Size([1, 1, 3, 4])
    """
    return sdpa_kernel(SDPBackend.MATH)
