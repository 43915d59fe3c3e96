"""Differentiable copies of a module: learn2learn's ``clone_module`` and ``update_module``, or the same built in.

The one place that imports learn2learn, and only when something asks for it (the import takes seconds). Where it is not
installed the two functions below do the same, to the last bit.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from types import MethodType, ModuleType
from typing import Any, NoReturn

from torch import Tensor, nn

from l2g_meta.errors import INSTALL_LEARN2LEARN, FitError

PLAIN, COLLECTIONS = {bool, int, float, str}, {list, tuple, dict, OrderedDict}


@functools.cache
def has_learn2learn() -> bool:
    """Whether learn2learn is installed; does not import it."""
    return importlib.util.find_spec("learn2learn") is not None


@functools.cache
def require_learn2learn() -> ModuleType:
    """The learn2learn module, imported without Gym's start-up banner.

    Raises:
        ImportError: with the line that installs it.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # Gym announces its successor there
            import learn2learn
            import learn2learn.vision.datasets  # noqa: F401
    except ImportError as error:
        raise ImportError(f"this needs learn2learn ({error}); install it with: {INSTALL_LEARN2LEARN}") from error
    return learn2learn


@functools.cache
def backend() -> tuple[Callable[[nn.Module], nn.Module], Callable[[nn.Module, Sequence[Tensor | None]], nn.Module]]:
    """``(clone_module, update_module)`` of learn2learn where it is installed and imports, else those below."""
    if has_learn2learn():
        try:
            utils = require_learn2learn().utils
            return _quiet()(utils.clone_module), _quiet()(utils.update_module)
        except ImportError as error:  # a partial installation: the built-in gives the same bits
            warnings.warn(f"using the built-in clone and update: {error}", stacklevel=2)
    return _quiet()(clone_module), _quiet()(update_module)


def own_buffers(source: nn.Module, clone: nn.Module) -> None:
    """Gives a clone private copies of its buffers; what its passes wrote so far goes to the module it was cloned from.

    Called at the first step θ → θ', it keeps running statistics those under θ, written once per task.

    Raises:
        FitError: if a forward has made a new part, whose parameters the module itself lacks.
    """
    originals = dict(source.named_modules(remove_duplicate=False))
    private: dict[int, Tensor] = {}  # one copy of a buffer that several modules share
    for path, child in clone.named_modules(remove_duplicate=False):
        if (original := originals.get(path)) is None:
            raise FitError(f"need all parts before the step, got {path}, made in a forward; call model(task) first")
        for name, buffer in child._buffers.items():
            if buffer is None:
                continue
            if original._buffers.get(name) is not buffer:  # a module that assigns or registers new ones
                original._buffers[name] = buffer.detach()
            child._buffers[name] = private.setdefault(id(buffer), buffer.clone())


class _NoCopy:
    """The ``__deepcopy__`` of a differentiable copy of a module; what a file holds of one can be copied."""

    def __call__(self, *_: Any) -> NoReturn:
        raise FitError(
            "need parameters of its own to copy or pickle a learner or its module, but they are functions of the "
            "model's; call clone() for another learner, or copy learner.module.state_dict() into a copy of the model"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


no_copy = _NoCopy()


def rebind(original: nn.Module, copy: nn.Module) -> nn.Module:
    """A copied tree of modules, after ``own_methods`` for each."""
    originals, copies = dict(original.named_modules(remove_duplicate=False)), {}
    for path, module in copy.named_modules(remove_duplicate=False):
        copies[id(originals[path])] = module
        module.__class__ = type(originals[path])  # a traced graph's __new__ makes a class without its forward
    for module in copies.values():
        own_methods(module, copies)
    return copy


def own_methods(copy: nn.Module, copies: Mapping[int, nn.Module]) -> None:
    """Has modules and methods that a copy holds otherwise (``self.embed = self.encoder.forward``) be of copies.

    Those of plain lists, tuples, dictionaries and ``functools.partial`` as well, and of hooks. Closures cannot be
    looked into: ``inner.step.check_parts`` finds them.

    Args:
        copy: one of the copies.
        copies: by the ``id`` of the module that each is a copy of.

    Example:
        >>> original, copy = nn.Identity(), nn.Identity()
        >>> original.forward = copy.forward = original.extra_repr
        >>> own_methods(copy, {id(original): copy})
        >>> copy.forward.__self__ is copy
        True
    """
    for name, value in vars(copy).items():
        if name not in ("_parameters", "_buffers", "_modules") and (own := _of_copies(value, copies)) is not value:
            vars(copy)[name] = own


def _of_copies(value: Any, copies: Mapping[int, nn.Module]) -> Any:
    """The value itself, or where it is a module, a method of one or a plain collection of them, that of the copies."""
    if value is None or type(value) in PLAIN or (type(value) in COLLECTIONS and not value):
        return value  # nearly all: this runs for each attribute of each copy
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if type(value) in (list, tuple):
        own = [_of_copies(v, copies) for v in value]
        return type(value)(own) if any(a is not b for a, b in zip(own, value, strict=True)) else value
    if type(value) in (dict, OrderedDict):  # hooks lie in the latter
        found = {k: _of_copies(v, copies) for k, v in value.items()}
        return type(value)(found) if any(found[k] is not v for k, v in value.items()) else value
    if isinstance(value, functools.partial):
        parts = [value.func, value.args, value.keywords]
        own = _of_copies(parts, copies)
        return value if own is parts else functools.partial(own[0], *own[1], **own[2])
    method = getattr(value, "_torchdynamo_orig_callable", value)
    if getattr(method, "__globals__", {}).get("__name__") == "torch._dynamo.external_utils":
        method = getattr(method, "__wrapped__", method)
    if isinstance(method, MethodType) and id(method.__self__) in copies:
        return MethodType(method.__func__, copies[id(method.__self__)])
    return value


def same_tensors(module: nn.Module, memo: dict[int, nn.Module] | None = None) -> nn.Module:
    """The same tree of modules with the same tensors, so that others can be put into one of the two."""
    memo = {} if memo is None else memo
    if id(module) not in memo:
        memo[id(module)] = copy = object.__new__(type(module))
        own = {"_parameters": module._parameters.copy(), "_buffers": module._buffers.copy()}
        copy.__dict__ = module.__dict__ | own
        copy._modules = {name: m if m is None else same_tensors(m, memo) for name, m in module._modules.items()}
    return memo[id(module)]


def clone_module(module: nn.Module, memo: dict[int, Tensor] | None = None) -> nn.Module:
    """A copy whose parameters are differentiable clones; buffers are shared, parameters shared within stay shared.

    Args:
        module: any module.
        memo: clone of each parameter met so far, by ``id``.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> clone_module(layer).weight.grad_fn is not None
        True
    """
    memo = {} if memo is None else memo
    clone = object.__new__(type(module))
    clone.__dict__ = module.__dict__.copy()
    for p in module._parameters.values():
        if p is not None and id(p) not in memo:
            memo[id(p)] = p.clone()
    clone._parameters = {name: p if p is None else memo[id(p)] for name, p in module._parameters.items()}  # type: ignore
    clone._buffers = module._buffers.copy()
    clone._modules = {name: m if m is None else clone_module(m, memo) for name, m in module._modules.items()}
    return _reflatten(clone)


def update_module(module: nn.Module, updates: Sequence[Tensor | None]) -> nn.Module:
    """Replaces each parameter p of a clone by p + u, differentiably and in place; ``None`` leaves it.

    Args:
        module: a module made by ``clone_module``.
        updates: one tensor u, or ``None``, for each of ``module.parameters()``, in that order.

    Returns:
        The module.
    """
    new = {id(p): p if u is None else p + u for p, u in zip(module.parameters(), updates, strict=True)}
    for child in module.modules():
        for name, p in child._parameters.items():
            if p is not None:
                child._parameters[name] = new[id(p)]  # type: ignore[assignment]
        _reflatten(child)
    return module


def trainable_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that require a gradient, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def adapted_names(module: nn.Module, patterns: Sequence[str] | None) -> list[str]:
    """Names of the trainable parameters that an inner step changes, in the module's order; of a tied one the first.

    Args:
        module: the model.
        patterns: names, prefixes of names up to a dot, or patterns with ``*``, ``?`` and ``[...]``; ``None``: all.

    Raises:
        FitError: if a pattern fits no trainable parameter, with the names there are.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        >>> adapted_names(model, ["1"]), adapted_names(model, ["*.bias"])
        (['1.weight', '1.bias'], ['0.bias', '1.bias'])
    """
    names = list(trainable_parameters(module))
    if patterns is None:
        return names
    if isinstance(patterns, str):
        raise FitError(f"need adapt to be several names or patterns, got the text {patterns!r}; write [{patterns!r}]")
    if not isinstance(patterns, Collection) or not all(isinstance(p, str) for p in patterns) or not patterns:
        raise FitError(f"need adapt to be names or patterns, at least one, got {patterns!r}; leave it out for all")
    every = {n: id(p) for n, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    found: set[int] = set()
    for pattern in patterns:
        fitting = [n for n in every if n == pattern or n.startswith(f"{pattern}.") or fnmatchcase(n, pattern)]
        if not fitting:
            known = ", ".join(_shortened(list(every)))
            raise FitError(f"need a trainable parameter for adapt {pattern!r}, got none; there are {known}")
        found |= {every[n] for n in fitting}
    return [name for name in names if every[name] in found]


def warn_of_unregistered(module: nn.Module) -> None:
    """Warns of parameters in plain lists and dictionaries, alone or in modules: PyTorch does not see them."""
    known = {id(p) for p in module.parameters()}
    for path, child in module.named_modules():
        for name, value in vars(child).items():
            held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
            parameters = chain.from_iterable(m.parameters() if isinstance(m, nn.Module) else [m] for m in held)
            if any(isinstance(p, nn.Parameter) and p.requires_grad and id(p) not in known for p in parameters):
                warnings.warn(
                    f"the parameters in the plain {type(value).__name__} {f'{path}.{name}'.lstrip('.')!r} are neither "
                    "adapted nor trained; hold them in an nn.ModuleList, an nn.ParameterList or the like",
                    stacklevel=3,
                )


def _shortened(names: Sequence[str]) -> list[str]:
    """All names of a small model; of a large one those of its parts."""
    if len(names) <= 40:
        return list(names)
    return list(dict.fromkeys(".".join([*name.split(".")[:-1][:3], "*"]) for name in names))


def _reflatten(module: nn.Module) -> nn.Module:
    # Recurrent layers keep their weights once more in a list, which `_apply` rebuilds.
    return module._apply(lambda t: t) if hasattr(module, "flatten_parameters") else module


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # `_apply` looks at `.grad` of clones, which are no leaves: harmless, and warned about every time.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        yield
