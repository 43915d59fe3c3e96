"""Everything that defines a training run: one frozen dataclass, also the command line's flags and ``config.json``."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from l2g_meta.backbones import BACKBONES
from l2g_meta.data import DATASETS, dataset_module
from l2g_meta.errors import L2GError
from l2g_meta.heads import HEADS
from l2g_meta.objectives import OBJECTIVES

# The paper's protocol, where a data set has no smaller default. It gives no total of updates: 20,000 is our choice.
PAPER: dict[str, Any] = {"queries": 15, "pairs": 5, "iterations": 20_000, "eval_every": 500, "eval_episodes": 600}


HEAD_FLAGS = ("distance", "dims", "temperature", "learn_temperature", "reduction")
TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}


def _flag(default: Any, help: str, **options: Any) -> Any:
    return field(default=default, metadata={"help": help, **options})


@dataclass(frozen=True)
class Config:
    """A training run; a field per flag of ``l2g train``.

    Where the default is ``None``, the data set or the head has one of its own, which ``resolved()`` fills in.

    Example:
        >>> Config(method="episodic").resolved().backbone
        'conv4'
    """

    data: str = _flag("glyphs", "data set", choices=DATASETS)
    root: str | None = _flag(None, "folder that holds the data (not needed for glyphs)")
    image_size: int = _flag(None, "pixels; another size than the data set's own is another benchmark")
    download: bool = _flag(False, "let learn2learn download missing data")
    split_seed: int = _flag(0, "folder with one level of classes: seed of its train/validation/test split")

    method: str = _flag("l2g", "training objective", choices=tuple(OBJECTIVES))
    head: str = _flag("prototypical", f"metric head: {', '.join(HEADS)}, or package.module:Class")
    backbone: str = _flag(None, f"encoder: {', '.join(BACKBONES)}, or package.module:Class")
    distance: str | None = _flag(None, "prototypical: distance", choices=("euclidean", "squared", "cosine"))
    dims: str | None = _flag(None, "prototypical: sum or mean over dimensions", choices=("sum", "mean"))
    temperature: float | None = _flag(None, "prototypical, matching: scores are divided by it")
    learn_temperature: bool = _flag(False, "prototypical, matching: train the temperature")
    reduction: str | None = _flag(None, "loss: mean or sum over queries", choices=("mean", "sum"))

    augment: bool = _flag(False, "vary training images: random crop, flip and colours")

    ways: int = _flag(5, "classes of a task (T_i)")
    shots: int = _flag(1, "supports per class")
    queries: int = _flag(None, "queries per class")
    outer_ways: int | None = _flag(None, "classes of T_j; as T_i by default, and so for the next two")
    outer_shots: int | None = _flag(None, "supports per class of T_j")
    outer_queries: int | None = _flag(None, "queries per class of T_j")

    inner_lr: float = _flag(0.003, "α, step size of the inner step; the paper: 0.01")
    inner_steps: int = _flag(1, "inner steps on T_i")
    first_order: bool = _flag(False, "drop the Hessian term of the meta-gradient")
    learn_inner_lr: str | None = _flag(None, "learn α: one, per tensor, or per element (Meta-SGD)",
                                       choices=("scalar", "tensor", "element"))  # fmt: skip
    recompute: bool = _flag(False, "less memory: evaluate the inner loss a second time instead of keeping its graph")
    fresh_queries: bool = _flag(False, "maml: other queries for the outer loss than for the inner")

    lr: float = _flag(1e-3, "step size of Adam")
    lr_halve_every: int = _flag(None, "episodes between halvings of lr; the paper: 10,000, for relation 100,000")
    pairs: int = _flag(None, "pairs of tasks per update")
    tasks_per_update: int | None = _flag(None, "episodic, maml: tasks per update, instead of 2 × pairs and pairs")
    iterations: int = _flag(None, "updates")
    eval_every: int = _flag(None, "updates between validations; checkpoints are written then")
    eval_episodes: int = _flag(None, "validation episodes")
    bn: str = _flag("running", "BatchNorm statistics at validation", choices=("running", "batch"))
    seed: int = _flag(0, "of the initial weights and of the stream of tasks")
    precision: str = _flag("fp32", "of convolutions and matrix products: fp32; tf32 on recent NVIDIA GPUs; bf16 by "
                           "autocast, with norms, losses and updates in fp32",
                           choices=("fp32", "tf32", "bf16"))  # fmt: skip
    cuda_graph: bool = _flag(False, "record the update once and replay it; for data that lies on a CUDA device")
    device: str = _flag("auto", "auto, cpu, cuda, cuda:1, mps …")
    tensorboard: bool = _flag(False, "also log to RUN/tensorboard")

    def resolved(self) -> Config:
        """The same run with every default filled in and checked.

        Raises:
            L2GError: for a value that cannot be, or options that exclude each other.
        """
        defaults = PAPER | dataset_module(self.data).DEFAULTS
        filled: dict[str, Any] = {
            name: defaults[name] for name in (*PAPER, "image_size") if getattr(self, name) is None
        }
        if self.backbone is None:
            filled["backbone"] = "conv4-relation" if self.head == "relation" else "conv4"
        if self.lr_halve_every is None:
            filled["lr_halve_every"] = 100_000 if self.head == "relation" else 10_000
        for name in ("ways", "shots"):
            filled[f"outer_{name}"] = getattr(self, f"outer_{name}") or getattr(self, name)
        filled["outer_queries"] = self.outer_queries or self.queries or filled["queries"]
        if self.head in HEADS:  # stored, so that another version's defaults do not change what a run was
            defaults = {name: p.default for name, p in inspect.signature(HEADS[self.head]).parameters.items()}
            filled |= {name: defaults[name] for name in HEAD_FLAGS if getattr(self, name) is None and name in defaults}
        if self.root is not None:
            filled["root"] = str(Path(self.root).expanduser().absolute())
        config = replace(self, **filled)
        config._check()
        return config

    def _check(self) -> None:
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata.get("choices")
            flag = "--" + f.name.replace("_", "-")
            if value is not None and type(value) not in TYPES[str(f.type).removesuffix(" | None")]:
                raise L2GError(f"need {flag} to be of type {f.type}, got {value!r}")
            if choices and value is not None and value not in choices:
                raise L2GError(f"need {flag} to be one of {', '.join(choices)}; got {value!r}")
            counted = f.type in ("int", "int | None") and f.name not in ("seed", "split_seed", "inner_steps")
            if counted and value is not None and value < 1:
                raise L2GError(f"need {flag} to be at least 1, got {value}")
        if self.seed < 0 or self.split_seed < 0 or self.inner_steps < 0:
            raise L2GError("need --seed, --split-seed and --inner-steps to be at least 0")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise L2GError(f"need --temperature above 0 and finite, got {self.temperature}")
        if not 0 < self.lr < math.inf:
            raise L2GError(f"need --lr above 0 and finite, got {self.lr}")
        if not 0 <= self.inner_lr < math.inf:
            raise L2GError(f"need --inner-lr of at least 0 and finite, got {self.inner_lr}")
        if self.tasks_per_update is not None and self.method == "l2g":
            raise L2GError("need --pairs for --method l2g, got --tasks-per-update; an update has 2 × pairs tasks")
        if self.cuda_graph and (self.tasks_per_update or 0) % 2:
            raise L2GError(f"need an even --tasks-per-update with --cuda-graph, got {self.tasks_per_update}")
        if self.fresh_queries and self.method != "maml":
            raise L2GError(f"--fresh-queries belongs to --method maml, got --method {self.method}")

    @property
    def episodes_per_update(self) -> int:
        """Outer tasks per update, the unit of the learning rate's schedule; equal for methods with equal ``pairs``."""
        return self.tasks_per_update or self.pairs

    @property
    def tasks_of_an_update(self) -> int:
        """Inner and outer tasks together."""
        return self.tasks_per_update or (self.pairs if self.method == "maml" else 2 * self.pairs)

    @property
    def head_options(self) -> dict[str, Any]:
        """The head's arguments that were given."""
        values = {name: getattr(self, name) for name in HEAD_FLAGS}
        return {name: value for name, value in values.items() if value is not None and value is not False}

    def save(self, path: Path) -> None:
        """Writes JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Config:
        """Reads what ``save`` wrote.

        Raises:
            L2GError: if the file is missing or holds something else.
        """
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError) as error:
            raise L2GError(f"need a run's config in {path}, got: {error}; name a folder made by `l2g train`") from error
