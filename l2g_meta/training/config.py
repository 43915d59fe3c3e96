"""Everything that defines a training run: one frozen dataclass, also the command line's flags and ``config.json``."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from l2g_meta.data import DATASETS, dataset_module
from l2g_meta.errors import L2GError
from l2g_meta.files.reading import read_text
from l2g_meta.files.sealed import opened, sealed
from l2g_meta.files.writing import write_text
from l2g_meta.models.backbones import BACKBONES
from l2g_meta.models.heads import HEADS
from l2g_meta.training.checks import HEAD_FLAGS, LEARNERS, METHODS, SUPERVISED, Names, Sizes, check, flag, setting

# The paper's protocol, where a data set has no smaller default. It gives no total of updates: 20,000 is our choice.
PAPER: dict[str, Any] = {"queries": 15, "pairs": 5, "iterations": 20_000, "eval_every": 500, "eval_episodes": 600}

# Fields of runs up to LAST_WITH that are no more, each with the values at which the run is what it is without them;
# where there are none, at any.
REMOVED: dict[str, tuple[Any, ...]] = {
    "inner_on": ("queries",),
    "fresh_queries": (False,),
    "shared_classes": (None,),
    "unit_step": (False,),
    "recompute": (False,),
    "cuda_graph": (False,),
    "outer_queries": (None,),  # or as many as queries
    "test_steps": (None, 10),
    "far_pairs": (False,),
    "train_classes": (None,),
    "resized_crop": (None,),
    "keep_weights": (),
    "keep": (),
    "rank_timeout": (),
    "tensorboard": (),
}
LAST_WITH = "0.1.0"
MACHINE = ("root", "device", "download", "save_every")  # where, not what


@dataclass(frozen=True)
class Config:
    """A training run; a field per flag of ``l2g train``.

    Where the default is ``None``, the data set or the head has one of its own, which ``resolved()`` fills in.

    Example:
        >>> Config(method="episodic").resolved().backbone
        'conv4'
    """

    data: str = setting("glyphs", "data set", choices=DATASETS)
    root: str | None = setting(None, "folder that holds the data (not needed for glyphs)", metavar="DIR")
    image_size: int = setting(None, "pixels; another size than the data set's own is another benchmark")
    download: bool = setting(False, "download missing data from where learn2learn gets it")
    split_seed: int = setting(0, "folder with one level of classes: seed of its train/validation/test split", least=0)
    augment: bool = setting(False, "vary training images: random crop, flip and colours")

    backbone: str = setting(
        None, f"encoder: {', '.join(BACKBONES)}, timm:NAME, torchvision:NAME or package.module:Class"
    )
    backbone_options: Names | None = setting(None, "arguments of the encoder, for example drop_rate=0.1 "
                                           "widths=64,128,256,512", nargs="+", metavar="NAME=VALUE")  # fmt: skip
    weights: str | None = setting(None, "initial weights of the encoder: a run (its best checkpoint), a .safetensors "
                                "file or one of torch.save with a state dict, or default: the pretrained ones of "
                                "timm or torchvision", metavar="RUN|FILE|default")  # fmt: skip
    head: str = setting(None, f"metric head: {', '.join(HEADS)}, or package.module:Class (default: prototypical)")
    distance: str | None = setting(
        None, "prototypical, and nearest prototypes of supervised: distance", choices=("euclidean", "squared", "cosine")
    )
    dims: str | None = setting(None, "prototypical: sum or mean over dimensions", choices=("sum", "mean"))
    temperature: float | None = setting(None, "prototypical, matching: scores are divided by it", above=0)
    learn_temperature: bool = setting(False, "prototypical, matching: train the temperature")
    reduction: str | None = setting(None, "loss: mean or sum over queries", choices=("mean", "sum"))

    ways: Sizes = setting(5, "classes of a task (T_i), or several numbers to draw from: 5,7,10")
    shots: Sizes = setting(1, "supports per class, or several: 1,5,10")
    queries: int = setting(None, "queries per class")
    outer_ways: Sizes = setting(None, "classes of T_j, one or several; as T_i by default, and so for the next")
    outer_shots: Sizes = setting(None, "supports per class of T_j, one or several")
    pairs: int = setting(None, "pairs of tasks per update")
    tasks_per_update: int | None = setting(None, "all but l2g: tasks per update, instead of 2 × pairs (maml: pairs; "
                                         "supervised: batches, 1)")  # fmt: skip

    method: str = setting("l2g", "training objective; maml-softmax and meta-lstm have no metric head and adapt on the "
                        "supports, at test too; supervised as `l2g pretrain`", choices=METHODS)  # fmt: skip
    inner_lr: float = setting(
        None, "α, step size of the inner step (default: 0.003, maml-softmax 0.01); the paper: 0.01", least=0
    )
    inner_steps: int = setting(None, "inner steps on T_i (default: 1); maml-softmax, meta-lstm: steps on the supports "
                             "(default: 5, at test 10; meta-lstm 1-shot: 12)", most=10_000)  # fmt: skip
    first_order: bool = setting(False, "drop the Hessian term of the meta-gradient")
    learn_inner_lr: str | None = setting(None, "learn α: one, per tensor, or per element (Meta-SGD)",
                                       choices=("scalar", "tensor", "element"))  # fmt: skip
    mix: float = setting(None, "l2g, maml: share of L(θ; T_i) in the loss, the rest being L(θ'; T_j); costs no time "
                       "(default: l2g 0.5, maml 0); Algorithm 1 of the paper: 0", least=0, below=1)  # fmt: skip
    adapt: Names | None = setting(None, "l2g, maml: parameters that the inner step changes, by prefix or pattern, for "
                                "example encoder.blocks.3 'head.*' (default: all)",
                                nargs="+", metavar="NAME")  # fmt: skip

    batch: int | None = setting(None, "supervised: images of a batch (default: 128)")
    optimizer: str = setting(
        None, "adam, or SGD with momentum 0.9 (default: adam; supervised: sgd)", choices=("adam", "sgd")
    )
    weight_decay: float = setting(None, "L2 penalty added to gradients (default: 0; supervised: 5e-4)", least=0)
    lr: float = setting(None, "step size of the optimizer (default: adam 1e-3, sgd 0.05)", above=0)
    schedule: str = setting(None, "of lr: halve every --lr-halve-every episodes; cosine to 0; step to a tenth after "
                          "3/5 and 4/5 of the updates (default: halve; supervised: cosine)",
                          choices=("halve", "cosine", "step"))  # fmt: skip
    lr_halve_every: int = setting(None, "episodes between halvings of lr; the paper: 10,000, for relation 100,000")
    clip_norm: float | None = setting(None, "largest meta-gradient norm (default: none, meta-lstm 0.25)", above=0)
    iterations: int = setting(None, "updates; 0: the initial weights are validated and kept", least=0)
    seed: int = setting(0, "of the initial weights and of the stream of tasks", least=0)

    eval_every: int = setting(None, "updates between validations; checkpoints are written then")
    eval_episodes: int = setting(None, "validation episodes")
    bn: str = setting("running", "BatchNorm statistics at validation", choices=("running", "batch"))

    precision: str = setting("fp32", "of convolutions and matrix products: fp32; tf32 on recent NVIDIA GPUs; bf16 by "
                           "autocast, with norms, losses and updates in fp32",
                           choices=("fp32", "tf32", "bf16"))  # fmt: skip
    deterministic: bool = setting(False, "PyTorch's deterministic algorithms: the same bits on a GPU, too, more slowly")
    skip_nonfinite: bool = setting(False, "leave updates out whose loss or gradient is not finite, and count them")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps …")

    save_every: int = setting(None, "updates between states to resume from (default: as --eval-every)")
    average: bool = setting(False, "also keep an average of the weights over the last part of training, as "
                          "average.safetensors; it moves no update")  # fmt: skip

    def resolved(self) -> Config:
        """The same run with every default filled in and checked.

        Raises:
            L2GError: for a value that cannot be, or options that exclude each other.
        """
        defaults = PAPER | dataset_module(self.data).DEFAULTS
        filled: dict[str, Any] = {
            name: defaults[name] for name in (*PAPER, "image_size") if getattr(self, name) is None
        }
        filled["save_every"] = self.save_every or self.eval_every or filled["eval_every"]
        filled |= self._of_method()
        if self.backbone is None:
            filled["backbone"] = {"relation": "conv4-relation", "softmax": "conv4-32"}.get(filled["head"], "conv4")
        if self.lr_halve_every is None:
            filled["lr_halve_every"] = 100_000 if self.head == "relation" else 10_000
        for name in ("ways", "shots"):
            filled[f"outer_{name}"] = getattr(self, f"outer_{name}") or getattr(self, name)
        if filled["head"] in HEADS:  # stored, so that another version's defaults do not change what a run was
            defaults = {name: p.default for name, p in inspect.signature(HEADS[filled["head"]]).parameters.items()}
            filled |= {name: defaults[name] for name in HEAD_FLAGS if getattr(self, name) is None and name in defaults}
        for name in ("adapt", "backbone_options"):
            if isinstance(getattr(self, name), list):  # as the command line gives it
                filled[name] = tuple(getattr(self, name))
        if self.root is not None:
            filled["root"] = str(Path(self.root).expanduser().absolute())
        config = replace(self, **filled)
        check(config)
        return config

    def _of_method(self) -> dict[str, Any]:
        """Head, inner steps, mix, optimizer and clipping, where the method has a default of its own."""
        own: dict[str, Any] = {"head": "prototypical", "inner_lr": 0.003, "inner_steps": 1}
        own["mix"] = 0.5 if self.method == "l2g" else 0.0
        own |= {"optimizer": "adam", "weight_decay": 0.0, "schedule": "halve"}
        if self.method == SUPERVISED:
            own |= {"head": "linear", "distance": "cosine", "batch": 128, "tasks_per_update": 1}
            own |= {"optimizer": "sgd", "weight_decay": 5e-4, "schedule": "cosine"}
        own["lr"] = 0.05 if (self.optimizer or own["optimizer"]) == "sgd" else 1e-3
        if self.method in LEARNERS:
            own |= {"head": "softmax", "inner_lr": 0.01, "inner_steps": 5}
        if self.method == "meta-lstm":
            own |= {"clip_norm": 0.25, "inner_steps": 12 if self.shots == 1 else 5}
        return {name: value if getattr(self, name) is None else getattr(self, name) for name, value in own.items()}

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

    def differences(self, other: Config) -> str:
        """What another run does differently, in words; empty if nothing. Where it runs does not count.

        Example:
            >>> Config(lr=0.1).differences(Config(lr=0.2, device="cpu"))
            '--lr 0.1, not 0.2'
        """
        names = [name for name in vars(self) if name not in MACHINE and getattr(self, name) != getattr(other, name)]
        return "; ".join(f"{flag(name)} {getattr(self, name)}, not {getattr(other, name)}" for name in names)

    def save(self, path: Path) -> None:
        """Writes JSON with a checksum."""
        write_text(path, json.dumps(sealed(asdict(self)), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Config:
        """Reads what ``save`` wrote, resolved and checked.

        Raises:
            L2GError: if the file is missing or holds something else.
        """
        try:
            return cls.from_json(opened(json.loads(read_text(path)))).resolved()
        except L2GError as error:
            raise type(error)(f"{path}: {error}") from error
        except Exception as error:  # JSON can hold values that fail in any comparison
            got = error.strerror if isinstance(error, OSError) else error
            raise L2GError(f"need a run's config in {path}, got: {got}; name a folder made by `l2g train`") from error

    @classmethod
    def from_json(cls, values: Any) -> Config:
        """A config from a run's JSON: lists become tuples; a run from before ``mix`` had none.

        Raises:
            L2GError: if the run used a field of ``REMOVED``.

        Example:
            >>> Config.from_json({"method": "maml", "fresh_queries": False}).method
            'maml'
        """
        found: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        if found.get("outer_queries") == found.get("queries"):
            found.pop("outer_queries", None)
        for name in REMOVED.keys() & found.keys():
            value = found.pop(name)
            if REMOVED[name] and value not in REMOVED[name]:
                raise L2GError(
                    f"need a run without {name}, which is no more, got {name} = {value!r}; l2g-meta {LAST_WITH} is the "
                    "last version that knows it: use that, or train without it"
                )
        return cls(**{"mix": 0.0} | found)
