"""Packages: which are there, which work, and what adds those that are missing."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import warnings
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from l2g_meta.errors import INSTALL_LEARN2LEARN


@dataclass(frozen=True)
class Part:
    """A package.

    Args:
        name: as it is installed.
        use: what it is for.
        module: as it is imported, if that is another name.
        extra: of l2g-meta, that brings it.
        remedy: the command that adds it, if no extra does.
    """

    name: str
    use: str
    module: str = ""
    extra: str = ""
    remedy: str = ""

    @property
    def command(self) -> str:
        """That adds it.

        Example:
            >>> Part("onnx", "", extra="export").command
            'pip install "l2g-meta[export]"'
        """
        return self.remedy or f'pip install "l2g-meta[{self.extra}]"'


_AGAIN = "pip install --force-reinstall {}"
REQUIRED = (
    Part("l2g-meta", "this library", "l2g_meta", remedy=_AGAIN.format("l2g-meta")),
    Part("filelock", "one process at a time", remedy=_AGAIN.format("filelock")),
    Part("torch", "everything", remedy=_AGAIN.format("torch")),
    Part("torchvision", "images", remedy=_AGAIN.format("torchvision")),
    Part("numpy", "data", remedy=_AGAIN.format("numpy")),
    Part("Pillow", "images", "PIL.Image", remedy=_AGAIN.format("Pillow")),
    Part("matplotlib", "curves", remedy=_AGAIN.format("matplotlib")),
    Part("safetensors", "checkpoints", "safetensors.torch", remedy=_AGAIN.format("safetensors")),
    Part("tqdm", "progress", remedy=_AGAIN.format("tqdm")),
)
OPTIONAL = (
    Part("learn2learn", "its task sets, and its clone in place of ours", remedy=INSTALL_LEARN2LEARN),
    Part("scikit-learn", "FewShotClassifier, l2g predict, l2g export, t-SNE", "sklearn", extra="classify"),
    Part("onnx", "l2g export", extra="export"),
    Part("onnxruntime", "l2g export", extra="export"),
    Part("onnxscript", "l2g export", extra="export"),
    Part("timm", "encoders by --backbone timm:NAME", extra="timm"),
    Part("submitit", "l2g submit, l2g reproduce --submit", extra="slurm"),
    Part("tensorboard", "l2g train --tensorboard", extra="tensorboard"),
    Part("triton", "fused kernels on NVIDIA GPUs", remedy="pip install triton"),
    Part("higher", "l2g bench", extra="bench"),
    Part("torchopt", "l2g bench", extra="bench"),
    Part("shtab", "l2g completion", extra="completion"),
)


def look(part: Part, *, required: bool = False) -> dict[str, Any]:
    """A part's ``version``, ``None`` where it is missing, and the ``error`` that importing it ends in, if it does.

    A required part that is missing is an error, too.
    """
    module = part.module or part.name
    found: dict[str, Any] = {"name": part.name, "use": part.use, "version": None, "error": None, "remedy": part.command}
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            with warnings.catch_warnings():  # some packages announce their successors there
                warnings.simplefilter("ignore")
                if importlib.util.find_spec(module.partition(".")[0]) is None:
                    found["error"] = "it is not installed" if required else None
                    return found
                imported = importlib.import_module(module)
        found["version"] = _version(part, imported)
    except (Exception, SystemExit) as error:  # whatever a broken package raises
        found["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return found


def _version(part: Part, module: Any) -> str:
    if part.module == "l2g_meta":  # as it is here: the metadata of a checkout may be older
        return module.__version__
    try:
        return metadata.version(part.name)
    except metadata.PackageNotFoundError:  # a folder on the path
        return str(getattr(module, "__version__", "of unknown version"))
