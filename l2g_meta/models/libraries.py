"""Encoders of timm and torchvision by name: ``timm:NAME``, ``torchvision:NAME``.

Features are the pooled embedding, what the library's own classification layer would get. ``preprocessing`` is how the
library's weights want their images; a run normalises as its data set says. Both are imported at first use.
"""

from __future__ import annotations

import logging
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from l2g_meta.errors import FitError, L2GError

# Not to be set by a config, which may be somebody else's: where weights come from, and what is set here.
OWN = {"weights", "weights_backbone", "progress", "num_classes", "in_chans", "model_name", "checkpoint_path",
       "cache_dir", "features_only", "aux_logits", "scriptable", "exportable", "no_jit"}  # fmt: skip


def timm_encoder(name: str, in_channels: int, options: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    """A model of timm without its classification layer.

    Args:
        name: one of ``timm.list_models()`` or ``timm.list_pretrained()``; none that loads code or files (``hf-hub:``).
        in_channels: channels of the images.
        options: of the model, for example ``img_size`` and ``patch_size`` of a vision transformer.
        pretrained: with timm's own weights, from its cache or the net.

    Shapes:
        (n, in_channels, H, W) -> (n, d).

    Raises:
        FitError: if there is no such model, or it does not take the options.
        ImportError: if timm is not installed.
    """
    timm = require_timm()
    _check_name("timm", name, [*timm.list_models(), *timm.list_pretrained()])
    net = _built("timm", name, options, lambda: timm.create_model(
        name, pretrained=pretrained, num_classes=0, in_chans=in_channels, **options
    ))  # fmt: skip
    classifier = net.pretrained_cfg.get("classifier") or ()
    net.left_out = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return net


def torchvision_encoder(name: str, in_channels: int, options: Mapping[str, Any]) -> nn.Module:
    """A classification model of torchvision without its last layer.

    Args:
        name: one of ``torchvision.models.list_models(module=torchvision.models)``.
        in_channels: channels of the images: 3, or 1, which is repeated.
        options: of the model, for example ``image_size`` of a vision transformer.

    Shapes:
        (n, in_channels, H, W) -> (n, d).

    Raises:
        FitError: if there is no such model, it does not take the options, or images have other channels.

    Example:
        >>> import torch
        >>> torchvision_encoder("resnet18", 1, {})(torch.randn(2, 1, 32, 32)).shape
        torch.Size([2, 512])
    """
    from torchvision import models

    _check_name("torchvision", name, models.list_models(module=models))
    if in_channels not in (1, 3):
        raise FitError(f"need images of 1 or 3 channels for torchvision:{name}, got {in_channels}; use timm:NAME")
    own = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    net = _built("torchvision", name, options, lambda: models.get_model(name, weights=None, **own, **options))
    layers = [k for k, m in net.named_modules() if 1000 in (getattr(m, s, 0) for s in ("out_features", "out_channels"))]
    net.set_submodule(layers[-1], nn.Identity())
    net.left_out = (layers[-1], "AuxLogits", "aux1", "aux2")
    if in_channels == 1:
        net.register_forward_pre_hook(_repeat_grey)
    return net


LIBRARIES: dict[str, Callable[[str, int, Mapping[str, Any]], nn.Module]] = {
    "timm": timm_encoder,
    "torchvision": torchvision_encoder,
}


def preprocessing(backbone: str, encoder: nn.Module, image_size: int | None = None) -> dict[str, Any]:
    """How a library prepares images for its weights, as the arguments of ``l2g_meta.classify.photos.Preparation``.

    Args:
        backbone: ``timm:NAME`` or ``torchvision:NAME``.
        encoder: that model.
        image_size: another size than the weights', in pixels; images are resized by the same factor before the crop.

    Raises:
        FitError: if it is none that ``Preparation`` knows.

    Example:
        >>> values = preprocessing("torchvision:resnet18", torchvision_encoder("resnet18", 3, {}))
        >>> values["size"], values["resize"], values["interpolation"]
        (224, 256, 'bilinear')
    """
    library, _, name = backbone.partition(":")
    if library == "timm":
        config = require_timm().data.resolve_model_data_config(encoder)
        mode, how, (_, size, width) = config["crop_mode"], config["interpolation"], config["input_size"]
        resize = math.floor((image_size or size) / config["crop_pct"])
        if size != width or mode not in ("center", "squash") or (mode == "squash" and config["crop_pct"] != 1):
            raise FitError(f"need {backbone} to take squares, cropped or stretched, got {config}; choose another")
    else:
        from torchvision.models import get_model_weights

        config = vars(get_model_weights(name)["DEFAULT"].transforms())
        mode, how = "center", config["interpolation"].value
        (size,), (resize,) = config["crop_size"], config["resize_size"]
        resize = round(resize * (image_size or size) / size)
    values = {"size": image_size or size, "channels": 3, "mean": tuple(config["mean"]), "std": tuple(config["std"])}
    return values | {"resize": None if mode == "squash" else resize, "interpolation": how}


def size_option(backbone: str, encoder: nn.Module, image_size: int) -> tuple[str, ...]:
    """The option, as ``--backbone-options`` has it, that a model of one image size takes for another; () without."""
    if getattr(encoder, "pretrained_cfg", {}).get("fixed_input_size"):
        return (f"img_size={image_size}",)
    return (f"image_size={image_size}",) if hasattr(encoder, "image_size") else ()


def resampled(tensors: Mapping[str, Tensor], encoder: nn.Module) -> Mapping[str, Tensor]:
    """A library's state dict with its position embeddings resampled for the encoder's image size, as the library does.

    Other state dicts are as they were.
    """
    own, home = encoder.state_dict(), sys.modules[type(encoder).__module__]
    if all(n not in own or t.shape == own[n].shape for n, t in tensors.items()):
        return tensors
    if home.__name__.startswith("timm.") and hasattr(home, "checkpoint_filter_fn"):
        return home.checkpoint_filter_fn(dict(tensors), encoder)
    if home.__name__ == "torchvision.models.vision_transformer":
        return home.interpolate_embeddings(encoder.image_size, encoder.patch_size, OrderedDict(tensors))
    return tensors


def library_weights(backbone: str, in_channels: int, options: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The state dict of a library's own pretrained weights, from its cache or the net.

    Raises:
        L2GError: if the encoder is none of timm's or torchvision's, has no such weights, or they cannot be had.
    """
    library, _, name = backbone.partition(":")
    if library not in LIBRARIES:
        raise L2GError(
            f"need --backbone timm:NAME or torchvision:NAME for --weights default, got {backbone}, which has none; "
            "name a file or a run"
        )
    logging.disable(logging.WARNING)  # of retries; the error says what became of them
    try:
        if library == "timm":
            return timm_encoder(name, in_channels, options, pretrained=True).state_dict()
        from torchvision.models import get_model_weights

        return get_model_weights(name)["DEFAULT"].get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (L2GError, ImportError):
        raise
    except Exception as error:  # what the libraries, and those they download with, raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise L2GError(
            f"need {library}'s pretrained weights of {name}, in its cache or from the net, got: {reason}; run this "
            "once with a network, copy the cache, or give a file of the state dict by --weights FILE"
        ) from error
    finally:
        logging.disable(logging.NOTSET)


def require_timm() -> ModuleType:
    """The timm module.

    Raises:
        ImportError: with the line that installs it.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"--backbone timm:NAME needs timm ({error}); pip install l2g-meta[timm]") from error
    return timm


def _check_name(library: str, name: str, known: list[str]) -> None:
    if name not in known:
        near = [n for n in known if n.startswith(name[:6])][:8] or known[:8]
        raise FitError(f"need a name of {library}'s {len(known)} models, got {name!r}; for example {', '.join(near)}")


def _built(library: str, name: str, options: Mapping[str, Any], build: Callable[[], Any]) -> Any:
    refused = sorted(o for o in options if o in OWN or o.startswith("pretrained"))
    if refused:
        raise FitError(f"--backbone-options cannot set {', '.join(refused)} of {library}:{name}; weights are --weights")
    try:
        return build()
    except (TypeError, ValueError, AssertionError, KeyError, AttributeError) as error:
        given = ", ".join(f"{name}={value}" for name, value in options.items()) or "none"
        raise FitError(f"{library}:{name} cannot be built with the options {given}: {error}") from error


def _repeat_grey(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].expand(-1, 3, -1, -1),)
