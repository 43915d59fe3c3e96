"""State dicts of encoders, from files of others: found, checked and put into an encoder of the same kind."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2g_meta.errors import CheckpointError, L2GError
from l2g_meta.files.reading import open_regular
from l2g_meta.files.tensors import read_safetensors
from l2g_meta.models.libraries import resampled

PREFIXES = ("", "module.", "encoder.", "module.encoder.", "module.classifier.encoder.", "backbone.", "model.", "net.")
NESTED = ("state_dict", "model", "params", "encoder")  # under which files of torch.save have a state dict


def encoder_of(model: nn.Module) -> nn.Module:
    """A model's encoder.

    Raises:
        L2GError: if it has none.
    """
    holder: Any = getattr(model, "classifier", model)
    encoder = getattr(holder, "encoder", None)
    if not isinstance(encoder, nn.Module):
        raise L2GError(f"need a model with an encoder for --weights, {type(model).__name__} has none")
    return encoder


def put_encoder(tensors: Mapping[str, Tensor], encoder: nn.Module, source: str) -> None:
    """Loads an encoder's state dict, which may have a prefix, a head beside it, and a library's classification layer.

    Raises:
        CheckpointError: if it belongs to another encoder, with what is missing or too much.

    Example:
        >>> put_encoder({"encoder.weight": torch.ones(1, 2), "head.a": torch.ones(1)}, nn.Linear(2, 1, bias=False), "x")
    """
    wanted = {name for name in encoder.state_dict() if not name.endswith("num_batches_tracked")}
    for prefix in PREFIXES:
        found = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        if wanted <= found.keys():
            break
    else:
        missing = sorted(wanted - tensors.keys())
        raise CheckpointError(
            f"need the weights of a {type(encoder).__name__}, {source} lacks {len(missing)} of {len(wanted)}: "
            f"{', '.join(missing[:3])} …, has {', '.join(sorted(tensors)[:3])} …; use the same --backbone and options"
        )
    left_out = tuple(getattr(encoder, "left_out", ()))
    kept = {n: t for n, t in found.items() if not any(n == layer or n.startswith(f"{layer}.") for layer in left_out)}
    with suppress(Exception):  # tensors of any kind: they do not fit then, which is said next
        kept = dict(resampled(kept, encoder))
    load_into(encoder, kept, source)


def read_state_dict(path: Path) -> Mapping[str, Tensor]:
    """The state dict in a ``.safetensors`` file, or in one of ``torch.save``, read as data alone.

    Raises:
        CheckpointError: if there is none.
    """
    from safetensors.torch import load

    try:
        if path.suffix == ".safetensors":
            return load(read_safetensors(path)[0])
        with open_regular(path) as file:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files end in any
        reason = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            reason = "more than names and tensors (a whole model, say), which is code and is not run"
        raise CheckpointError(
            f"need a run, a .safetensors file or one of torch.save for --weights, got {path}: {reason}; save "
            "model.state_dict()"
        ) from error
    for name in NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        raise CheckpointError(f"need a state dict, names and tensors, in {path}, got another thing; save one")
    return found


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Loads a state dict that came from ``source``; counts of batches, which older files lack, stay as they are.

    Raises:
        CheckpointError: if it belongs to another module.
    """
    own = module.state_dict()
    other = [n for n, t in tensors.items() if n in own and t.shape != own[n].shape]
    if other:
        name, got = other[0], tuple(tensors[other[0]].shape)
        raise CheckpointError(
            f"need the weights of this {type(module).__name__}, {source} has {name} of shape {got} where it takes "
            f"{tuple(own[name].shape)}; use the same --backbone and options, on images of as many channels"
        )
    counts = {n: t for n, t in own.items() if n.endswith("num_batches_tracked")}  # which older files lack
    try:
        module.load_state_dict({**counts, **tensors})
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        name = type(module).__name__
        raise CheckpointError(f"{source} belongs to another {name}: {reason}; use the same --backbone") from error
