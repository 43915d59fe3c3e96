"""The page: what was measured put into its templates, small enough and without anything from outside."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from l2g_meta.data.pairs import listed
from l2g_meta.files.writing import write_text
from l2g_meta.report.charts import accuracy_chart, loss_chart, validation_chart
from l2g_meta.report.experiments import Report, differences
from l2g_meta.report.image_section import DETAILED, image_sections
from l2g_meta.report.projection import POINTS
from l2g_meta.report.thumbnails import SIZES
from l2g_meta.training.checks import flag
from l2g_meta.training.config import MACHINE, Config

LIMIT = 5_000_000  # bytes of a page


def write_report(report: Report, path: Path) -> int:
    """Writes the page, or leaves what was there as it is; returns its size in bytes.

    Raises:
        CheckpointError: if it cannot be written.
    """
    text = render(report)
    write_text(path, text)
    return path.stat().st_size


def render(report: Report) -> str:
    """The page as text; the same for the same runs and results."""
    loader = PackageLoader("l2g_meta.report", "")
    templates = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, extensions=["jinja2.ext.do"],
        keep_trailing_newline=True,
    )  # fmt: skip
    templates.filters["listed"] = listed
    images = image_sections(report)
    sections = templates.get_template("sections.html").render(
        report=report,
        accuracy_chart=accuracy_chart,
        paired=list(differences(report)),
        settings=settings(report),
        loss=loss_chart(report),
        validation=validation_chart(report),
        images=images,
        left_out=sum(bool(experiment.measured) for experiment in report.experiments) - DETAILED,
        points=POINTS,
    )
    page = templates.get_template("page.html")
    source, _, _ = loader.get_source(templates, "page.html")
    for side, quality in SIZES:
        text = page.render(
            report=report,
            contents=re.findall(r'<section id="(\w+)"[^>]*><h2[^>]*>([^<]*)', sections),
            sections=Markup(sections),  # noqa: S704  # the first template has escaped it
            sheets=[(shown.number, shown.sheet.encoded(side, quality)) for shown in images],
            version=metadata.version("l2g-meta"),
            script_sha256=script_digest(source),
        )
        if len(text.encode("utf-8", "replace")) < LIMIT:
            break
    # No page may hold lone surrogates and most control characters, which names of folders can have.
    return re.sub("[\x00-\x08\x0b-\x1f]", "?", text.encode("utf-8", "replace").decode())


def script_digest(template: str) -> str:
    """What a browser must find the page's script to be, for its Content-Security-Policy: no other one runs."""
    (script,) = re.findall("<script>(.*?)</script>", template, re.DOTALL)
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def settings(report: Report) -> dict[str, Any] | None:
    """Settings that differ between the experiments, or from the defaults if there is one; and those that do not."""
    experiments = [e for e in report.experiments if e.config is not None]
    if not experiments:
        return None
    configs = [{name: v for name, v in vars(e.config).items() if name not in MACHINE} for e in experiments]
    for values, experiment in zip(configs, experiments, strict=True):
        values["seed"] = tuple(run.seed for run in experiment.runs)
    if len(configs) == 1:
        default = Config(data=configs[0]["data"], method=configs[0]["method"])
        configs.append(vars(default.resolved()) | {"seed": (default.seed,)})
    rows: dict[bool, list[list[object]]] = {True: [], False: []}
    for name in [*(name for name in configs[0] if name != "seed"), "seed"]:
        texts = [_text(values[name]) for values in configs]
        same = len(set(texts)) == 1
        rows[same].append([Markup("<code>{}</code>").format(flag(name)), *texts[: 1 if same else None]])
    return {"experiments": experiments, "different": rows[False], "same": rows[True]}


def _text(value: Any) -> str:
    return "–" if value is None else ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
