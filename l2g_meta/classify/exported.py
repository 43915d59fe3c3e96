"""A trained run as one folder to share: weights, how to build and use them, what they are worth."""

from __future__ import annotations

import glob
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from l2g_meta.classify import source as sources
from l2g_meta.classify.calibration import calibrate
from l2g_meta.classify.card import model_card
from l2g_meta.classify.prepared_data import open_data
from l2g_meta.data.images import SPLITS
from l2g_meta.errors import L2GError
from l2g_meta.evaluation.episodes import evaluate
from l2g_meta.files.locks import claim
from l2g_meta.files.sealed import sealed
from l2g_meta.files.tensors import make_folder, read_info, save_tensors
from l2g_meta.files.writing import PARTIAL, sync, write_text
from l2g_meta.models.linear_head import LinearHead
from l2g_meta.training.build import build_data, build_device
from l2g_meta.training.checks import LEARNERS
from l2g_meta.training.config import MACHINE
from l2g_meta.training.log import read_log

CARD = "README.md"


def export(
    model: Any,
    out: Path | str,
    *,
    half: bool = False,
    episodes: int = 600,
    root: str | None = None,
    checkpoint: str = "best",
    device: str | None = None,
    trust: bool = False,
    weights: Path | str | None = None,
    image_size: int | None = None,
) -> dict[str, Any]:
    """Writes a model as a folder that ``FewShotClassifier`` reads on another machine; returns ``model.json``'s values.

    Of a run, temperatures are fitted on episodes of its validation split, and checked on its test split; other models
    keep what is known of them. The folder appears when all is well.

    Args:
        model: folder made by ``l2g train``, or what ``open_source`` takes.
        out: folder to make.
        half: store weights as float16; what is measured is what they give, read back as float32.
        episodes: for each number of shots, on each split.
        root: folder of the data, if it has moved since training.
        checkpoint: of a run: ``"best"`` on validation, ``"last"`` or ``"average"``.
        device: as of ``load_run``.
        trust: as of ``load_run``.
        weights: as of ``open_source``, and so for the next.
        image_size: of an encoder by its name.

    Raises:
        L2GError: if the model or its data cannot be used, or ``out`` is there.
    """
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise L2GError(f"need a folder that is not there yet to export to, got {out}; remove it or choose another")
    if (run := sources.run_of(model)) and (weights or image_size):
        raise L2GError(f"weights and image_size belong to the name of an encoder, got the run {run}; leave them out")
    if run:
        source = sources.open_run(run, device, checkpoint=checkpoint, trust=trust)
    else:
        source = sources.open_source(model, device or "auto", trust=trust, weights=weights, image_size=image_size)
    if source.config is None or source.preparation is None:
        raise L2GError("need a run, an exported folder or the name of an encoder to export, got a module; wrap it")
    net, preparation = source.model, source.preparation
    tensors = halved(net.state_dict()) if half else net.state_dict()
    net.load_state_dict(tensors)
    values = {name: source.values.get(name) for name in ("calibration", "classes", "training", "elsewhere")}
    if run:
        values |= _measured(source, run, checkpoint, episodes, root)
    values |= {
        "format": sources.FORMAT,
        "architecture": sources.architecture(source.config),
        "preparation": asdict(preparation),
        "parameters": sum(p.numel() for p in net.parameters()),
        "weights": "float16" if half else "float32",
    }
    with _appears(out) as folder:
        head = getattr(net, "head", None)
        n_classes = head.linear.out_features if isinstance(head, LinearHead) else None
        header: dict[str, Any] = {"image_shape": preparation.image_shape, "given": [], "n_classes": n_classes}
        save_tensors(folder / sources.WEIGHTS, tensors, header)
        write_text(folder / sources.MODEL, json.dumps(sealed(values), indent=1) + "\n")
        try:
            card = model_card(values, imagenet=source.pretrained or source.config.data in sources.IMAGENET_SETS)
        except Exception as error:  # values of any kind, from somebody's model.json
            raise L2GError(f"need what is known of {model}, got: {error!r}; export its run again") from error
        write_text(folder / CARD, card)
    return values


def halved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as float16; norms and biases, which take little room and may be small numbers, as they are."""
    return {name: t.half() if t.is_floating_point() and t.ndim > 1 else t for name, t in tensors.items()}


def _measured(source: sources.Source, run: Path, checkpoint: str, episodes: int, root: str | None) -> dict[str, Any]:
    """What a run's model is worth, and what a reader should know of its training, but for what one machine is."""
    config = source.config
    info, rows = read_info(run / f"{checkpoint}.safetensors"), read_log(run) if (run / "log.csv").is_file() else []
    train, validation, test = (build_data(replace(config, root=root or config.root), split) for split in SPLITS)
    most = min(len(validation.index), len(test.index))
    learner = config.method in LEARNERS and isinstance(config.ways, int)
    smallest = min(len(rows) for data in (validation, test) for rows in data.index)
    shots = tuple(k for k in (1, 5) if k < smallest)
    options: dict[str, Any] = {"episodes": episodes, "device": build_device(config.device), "shots": shots}
    options |= {"queries": max(1, min(15, smallest - max(shots))), "ways": min(5, most, *[config.ways] * learner)}
    measured = calibrate(source.model, validation, test, **options)
    values: dict[str, Any] = {"calibration": asdict(measured), "classes": list(train.class_names), "elsewhere": None}
    if config.data in sources.IMAGENET_SETS and source.preparation is not None:  # how far from photos it is of use
        drawn = open_data("glyphs", "test", source.preparation)
        found = [evaluate(source.model, drawn, **(options | {"shots": k})) for k in shots]
        values["elsewhere"] = {"glyphs": [
            {"shots": e.shots, "accuracy": e.accuracy_mean, "accuracy_ci95": e.ci95_episodes} for e in found
        ]}  # fmt: skip
    return values | {
        "training": {
            "checkpoint": checkpoint,
            "iteration": info.get("iteration"),
            "validation_accuracy": info.get("val_accuracy"),
            "validation_ways": info.get("val_ways"),
            "seconds": round(sum(float(row["seconds"] or 0) for row in rows), 1) if rows else None,
            "config": {name: value for name, value in asdict(config).items() if name not in MACHINE},
        }
    }


@contextmanager
def _appears(out: Path) -> Iterator[Path]:
    """A folder beside its place, renamed into it when all is well, else removed; as is what killed exports left."""
    make_folder(out.parent, "a folder to export to", "choose another")
    with claim(out.with_name(f".{out.name}.lock"), remove=True) as ours:
        if not ours:
            raise L2GError(f"another process exports to {out}; wait for it, or choose another folder")
        for left in out.parent.glob(f".{glob.escape(out.name)}{PARTIAL}*"):
            shutil.rmtree(left, ignore_errors=True)  # which follows no link
        try:
            partial = Path(tempfile.mkdtemp(prefix=f".{out.name}{PARTIAL}", dir=out.parent))
            try:
                yield partial
                partial.chmod(0o755)  # mkdtemp makes it the user's alone
                partial.rename(out)
                sync(out.parent)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        except OSError as error:
            raise L2GError(f"cannot write {out}: {error.strerror}; make room or choose another folder") from error
