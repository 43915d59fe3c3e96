"""What several commands say and ask of trained runs."""

from __future__ import annotations

from collections.abc import Sequence

from l2g_meta.cli.flags import Arguments, at_least, natural, positive
from l2g_meta.data.images import SPLITS
from l2g_meta.models.batchnorm_policy import POLICIES
from l2g_meta.training.config import Config

MODELS = (
    "run directory, exported folder, timm:NAME, torchvision:NAME or package.module:Class (default: the model that "
    "comes with the package)"
)


def add_run(parser: Arguments) -> None:
    """Which weights of a run, where its data is, and where to compute."""
    parser.add_argument("--checkpoint", default="best", choices=("best", "last", "average"), help="on validation, "
                        "after the last update, or the average of a run with --average (default: best)")  # fmt: skip
    parser.add_argument("--root", metavar="DIR", help="folder of the data, if it has moved since training")
    parser.add_argument("--device", metavar="NAME", help="auto, cpu, cuda, … (default: as trained)")


def add_model(parser: Arguments, name: str | None = "--model") -> None:
    """Which model, trained or pretrained; ``name=None``: the command has a place for it."""
    add = parser.add_argument
    if name is not None:
        add(name, metavar="RUN|NAME", help=MODELS)
    own = "timm:NAME, torchvision:NAME, package.module:Class"
    add("--weights", metavar="FILE", help=f"{own}: a state dict instead of the library's pretrained weights")
    add("--image-size", type=positive, metavar="N", help=f"{own}: pixels (default: its own)")
    add_trust(parser)


def add_trust(parser: Arguments) -> None:
    """Whether modules that a run or an exported folder names are imported."""
    parser.add_argument("--trust", action="store_true", help="import the module that a stored run or model names as "
                        "its head or backbone, package.module:Class, which runs it")  # fmt: skip


def add_episodes(parser: Arguments, each: str, splits: Sequence[str] = SPLITS) -> None:
    """Which episodes a run is tested on; ``each``: what ``--episodes`` counts."""
    add = parser.add_argument
    add("--split", default="test", choices=splits, help="default: test")
    add("--ways", type=at_least(2), metavar="N", help="classes per episode (default: as trained)")
    add("--shots", type=positive, metavar="N", help="supports per class (default: as trained)")
    add("--queries", type=positive, metavar="N", help="queries per class (default: as trained)")
    add("--episodes", type=positive, metavar="N", default=600, help=f"{each} (default: 600)")
    add("--episode-seed", type=natural, metavar="N", default=0, help="of the episodes (default: 0)")
    add("--bn", default="running", choices=POLICIES, help="BatchNorm statistics (default: running)")


def describe(config: Config) -> str:
    """What a result belongs to, in a few words."""
    settings = ", ".join(f"{name} {value}" for name, value in config.head_options.items())
    head = f"{config.head} ({settings})" if settings else config.head
    method = f"{config.method}, mix {config.mix:g}," if config.mix else config.method
    return f"{method} {head}, {config.data} at {config.image_size} px"
