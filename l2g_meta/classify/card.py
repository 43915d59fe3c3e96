"""The model card of an exported folder, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from l2g_meta.data.pairs import listed
from l2g_meta.files.names import shown


def model_card(values: Mapping[str, Any]) -> str:
    """The text of ``README.md``, from what is in ``model.json``."""
    loader = PackageLoader("l2g_meta.classify", "")
    templates = Environment(loader=loader, undefined=StrictUndefined, keep_trailing_newline=True)  # noqa: S701  # no HTML
    templates.filters |= {"plain": _plain, "listed": listed}
    return templates.get_template("card.md").render(values=values)


def _plain(text: str) -> str:
    """A name from somebody's folders without what Markdown would take for mark-up."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else shown(c) for c in text)
