"""Networks that ``torch.compile`` has wrapped: differentiable copies run without it, under the names that users know.

Compiled code is bound to the module that was compiled. A copy that called it would use the original's parameters and
drop out of the inner step in silence. PyTorch does not differentiate compiled code twice either (pytorch#91469).
"""

from __future__ import annotations

import sys
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from l2g_meta.errors import FitError
from l2g_meta.inner.clone import own_methods

WRAPPED = "_orig_mod."  # what torch.compile puts into names
# A decorator: compiled code around the function calls it as it is. Optimizers use this one, since
# torch.compiler.disable imports the compiler, which takes seconds.
eagerly = torch._disable_dynamo


def uncompiled(module: nn.Module) -> nn.Module:
    """The module itself if nothing in it is compiled, else the same tree without compilation; tensors are shared.

    Raises:
        FitError: if a module is scripted.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> uncompiled(layer) is layer
        True
    """
    modules = list(module.modules())
    for m in modules:
        if isinstance(m, torch.jit.ScriptModule):
            raise FitError(f"need modules that can be copied, got the scripted {m.original_name}; wrap it unscripted")
    if any(unwrapped(m) is not m or vars(m).get("_compiled_call_impl") is not None for m in modules):
        memo: dict[int, nn.Module] = {}
        bare = _without(module, memo)
        for m in memo.values():
            own_methods(m, memo)
        return bare
    return module


def unwrapped(module: Any) -> Any:
    """The module that ``torch.compile(module)`` has wrapped, else what is given; its parts stay as they are."""
    frames = sys.modules.get("torch._dynamo.eval_frame")  # imported by whoever compiles
    is_wrapper = frames is not None and isinstance(module, frames.OptimizedModule)
    return module._modules["_orig_mod"] if is_wrapper else module


def _without(module: nn.Module, memo: dict[int, nn.Module]) -> nn.Module:
    module = unwrapped(module)
    if id(module) not in memo:
        memo[id(module)] = bare = object.__new__(type(module))
        bare.__dict__ = module.__dict__ | {"_compiled_call_impl": None}
        bare._modules = {name: m if m is None else _without(m, memo) for name, m in module._modules.items()}
    return memo[id(module)]


def plain_names(module: nn.Module) -> None:
    """Has a module's state dict name parameters as if nothing were compiled, and load such names."""
    module._register_state_dict_hook(_plain)
    module.register_load_state_dict_pre_hook(_as_they_are)


def _plain(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in list(state):  # what lies outside of the module is not ours to name
        if name.startswith(prefix) and WRAPPED in name[len(prefix) :]:
            state[prefix + name[len(prefix) :].replace(WRAPPED, "")] = state.pop(name)


def _as_they_are(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    _plain(module, state, prefix)  # of a wrapper that was compiled itself
    tensors: chain[tuple[str, Tensor]] = chain(
        module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    )
    for name, _tensor in tensors:
        plain = prefix + name.replace(WRAPPED, "")
        if WRAPPED in name and plain in state:
            state[prefix + name] = state.pop(plain)
