"""The model card of an exported folder, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from l2g_meta.data.pairs import listed
from l2g_meta.files.names import shown
from l2g_meta.training.checks import SUPERVISED, flag
from l2g_meta.training.config import MACHINE, Config


def model_card(values: Mapping[str, Any], *, imagenet: bool = False) -> str:
    """The text of ``README.md``, from what is in ``model.json``; ``imagenet``: the weights have seen its photos."""
    loader = PackageLoader("l2g_meta.classify", "")
    templates = Environment(loader=loader, undefined=StrictUndefined, keep_trailing_newline=True)  # noqa: S701  # no HTML
    templates.filters |= {"plain": _plain, "listed": listed, "command": _command}
    return templates.get_template("card.md").render(values=values, imagenet=imagenet)


def _plain(text: str) -> str:
    """A name from somebody's folders without what Markdown would take for mark-up."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else shown(c) for c in text)


def _command(values: Mapping[str, Any]) -> str:
    """The command that trains such a model, with the settings that are not the defaults."""
    stored = {name: value for name, value in values["training"]["config"].items() if name not in MACHINE}
    config = Config.from_json(stored).resolved()
    usual = vars(Config(data=config.data, method=config.method).resolved())
    words = ["l2g pretrain"] if config.method == SUPERVISED else [f"l2g train --method {config.method}"]
    words += [f"--data {config.data}"] + ["--root DIR"] * (config.data != "glyphs")
    for name, value in vars(config).items():
        if value != usual[name] and name not in MACHINE:
            several = " ".join if name in ("adapt", "backbone_options") else ",".join
            text = several(map(str, value)) if isinstance(value, tuple) else str(value)
            words.append(flag(name) if value is True else f"{flag(name)} {shown(text)}")
    return " ".join(words)
