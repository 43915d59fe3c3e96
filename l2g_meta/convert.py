"""Gives layers of a model another class, in place: the same parameters, other operators."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from l2g_meta.errors import FitError


def convert(model: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]]) -> nn.Module:
    """Every module whose class is a key becomes one of the value; subclasses stay as they are. Returns the model.

    Raises:
        FitError: for a lazy layer that has not seen its input yet, and would become one of the keys when it does.

    Example:
        >>> class Named(nn.ReLU):
        ...     pass
        >>> convert(nn.Sequential(nn.ReLU()), {nn.ReLU: Named})
        Sequential(
          (0): Named()
        )
    """
    for name, module in model.named_modules():
        if getattr(module, "cls_to_become", None) in classes:
            raise FitError(
                f"need layers with parameters, got {module} as {name!r}; call the model once, then convert it"
            )
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
    return model
