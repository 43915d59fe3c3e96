"""Where a run's encoder begins: another run's, a file's state dict, or a library's pretrained ones (``--weights``)."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from l2g_meta.files.tensors import load_tensors
from l2g_meta.models.libraries import library_weights
from l2g_meta.models.pretrained import encoder_of, load_into, put_encoder, read_state_dict
from l2g_meta.training.checks import parsed_options
from l2g_meta.training.config import Config


def initialise(model: nn.Module, config: Config) -> None:
    """Puts the weights that ``config.weights`` names into a model's encoder.

    A run's head comes along where it is of the same kind, with the same options.

    Raises:
        L2GError: if they cannot be had, or belong to another encoder.
    """
    source, encoder = config.weights or "", encoder_of(model)
    if source == "default":
        channels = next((m.in_channels for m in encoder.modules() if isinstance(m, nn.Conv2d)), 3)
        tensors = library_weights(config.backbone, channels, parsed_options(config.backbone_options))
        put_encoder(tensors, encoder, f"the pretrained weights of {config.backbone}")
        return
    path = Path(source).expanduser()
    if not path.is_dir():
        put_encoder(read_state_dict(path), encoder, str(path))
        return
    tensors, info = load_tensors(path / "best.safetensors")
    theirs = Config.from_json(info["config"])
    put_encoder(tensors, encoder, f"{path}, a run with --backbone {theirs.backbone},")
    if (theirs.head, theirs.head_options) == (config.head, config.head_options) and isinstance(
        getattr(model, "head", None), nn.Module
    ):
        found = {name.removeprefix("module.head."): t for name, t in tensors.items() if name.startswith("module.head.")}
        load_into(model.head, found, str(path))  # type: ignore[arg-type]
