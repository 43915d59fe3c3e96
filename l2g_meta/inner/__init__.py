"""The inner step: differentiable copies of a module, how far it moves, and passes that are differentiated twice."""

from l2g_meta.inner.second_order import twice_differentiable

__all__ = ["twice_differentiable"]
