"""What several commands say and ask of trained runs."""

from __future__ import annotations

import argparse

from l2g_meta.config import Config


def add_run(parser: argparse.ArgumentParser) -> None:
    """Which weights of a run, where its data is, and where to compute."""
    parser.add_argument("--checkpoint", default="best", choices=("best", "last"), help="on validation, or after the "
                        "last update (default: best)")  # fmt: skip
    parser.add_argument("--root", metavar="DIR", help="folder of the data, if it has moved since training")
    parser.add_argument("--device", metavar="NAME", help="auto, cpu, cuda, … (default: as trained)")


def describe(config: Config) -> str:
    """What a result belongs to, in a few words."""
    settings = ", ".join(f"{name} {value}" for name, value in config.head_options.items())
    head = f"{config.head} ({settings})" if settings else config.head
    return f"{config.method} {head}, {config.data} at {config.image_size} px"
