"""The page: sections of HTML put into the template, small enough and without anything from outside."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata, resources
from pathlib import Path
from string import Template
from typing import Any

from l2g_meta.files.writing import write_text
from l2g_meta.report.charts import accuracy_chart, loss_chart, validation_chart
from l2g_meta.report.details import (
    DETAILED,
    Images,
    confusion_figures,
    episode_figures,
    images_of,
    reliability_figures,
    tsne_figures,
)
from l2g_meta.report.gather import Report, differences
from l2g_meta.report.svg import escaped
from l2g_meta.report.thumbnails import SIZES
from l2g_meta.report.words import CLASSES, badge, figure, plus_minus, shape_of, table
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
    images = images_of(report)
    sections = {
        "summary": ("Summary", _summary(report)),
        "accuracy": ("Accuracy", _accuracy(report)),
        "settings": ("Settings", _settings(report)),
        "curves": ("Learning curves", _curves(report)),
        "confusion": ("Confusions", _confusions(images, report)),
        "embeddings": ("Embeddings", _embeddings(images)),
        "reliability": ("Reliability", _reliability(report)),
        "episodes": ("Episodes", _episodes(images, report)),
    }
    shown = {key: value for key, value in sections.items() if value[1]}
    template = resources.files("l2g_meta.report").joinpath("template.html").read_text(encoding="utf-8")
    values = {
        "title": escaped(_title(report)),
        "subtitle": escaped(_subtitle(report)),
        "contents": "".join(f'<li><a href="#{key}">{title}</a></li>' for key, (title, _) in shown.items()),
        "sections": "\n".join(
            f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>{body}</section>'
            for key, (title, body) in shown.items()
        ),
        "footer": "Made by <code>l2g report</code>; nothing on this page is loaded from elsewhere. "
        f"l2g-meta {escaped(metadata.version('l2g-meta'))}.",
        "version": escaped(metadata.version("l2g-meta")),
        "script_sha256": script_digest(template),
    }
    for side, quality in SIZES:
        sheets = [f".s{i.number} {{ background-image: url({i.sheet.encoded(side, quality)}); }}" for i in images]
        text = Template(template).substitute(values, sheets="\n".join(sheets))
        if len(text.encode()) < LIMIT:
            break
    return text


def script_digest(template: str) -> str:
    """What a browser must find the page's script to be, for its Content-Security-Policy: no other one runs."""
    (script,) = re.findall("<script>(.*?)</script>", template, re.DOTALL)
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _title(report: Report) -> str:
    names = [run.folder.name for run in report.runs]
    return "Report: " + (", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} other runs")


def _subtitle(report: Report) -> str:
    of = report.asked
    tested = sum(run.measured is not None for run in report.runs)
    n, groups = len(report.runs), len(report.experiments)
    runs = f"{n} run{'s' * (n != 1)}" + (f" of {groups} experiments" if n != groups else "")
    return (
        f"{runs}, {tested} tested: {of.split} split ({CLASSES[of.split]}), {of.episodes} episodes of seed "
        f"{of.episode_seed}, BatchNorm {of.bn}, checkpoints best on validation."
    )


def _summary(report: Report) -> str:
    cards = []
    for i, experiment in enumerate(report.experiments):
        e, config = experiment.evaluation, experiment.config
        title = f"<h3>{badge(i, experiment.letter)} {escaped(experiment.title)}</h3>"
        big, over = '<p class="big">not tested</p>', []
        if e is not None:
            half = "" if e.ci95_episodes != e.ci95_episodes else f" <small>± {e.ci95_episodes:.1f}</small>"
            big = f'<p class="big">{e.accuracy_mean:.1f}{half} %</p>'
            over.append(f"{shape_of(e)}; ± 95 % over {e.episodes} episodes")
            if e.ci95_runs is not None:
                over.append(f"± {e.ci95_runs:.1f} over {len(e.run_means)} trained seeds (Student t)")
        if config is not None:
            over.append(f"{config.data} at {config.image_size} px, {config.backbone}")
        over += [f"{run.label}: {run.folder.name}, {run.folder.progress}" for run in experiment.runs]
        cards.append(f'<div class="card">{title}{big}{"".join(f"<p>{escaped(line)}</p>" for line in over)}</div>')
    problems = [
        f'<p class="problem" role="note"><b>{escaped(run.label)} {escaped(run.folder.path)}</b>: {escaped(problem)}</p>'
        for run in report.runs
        for problem in run.problems
    ]
    return f'<div class="cards">{"".join(cards)}</div>{"".join(problems)}'


def _accuracy(report: Report) -> str:
    parts = []
    groups = report.by_data()
    for group in groups:
        members = [(report.experiments.index(experiment), experiment) for experiment in group]
        data = group[0].measured[0].data
        name = f"{data.name} {data.split}".strip()
        chart = accuracy_chart(members, name)
        caption = (
            f"{name}, {data.n_classes} classes. Whiskers are 95 % intervals over episodes; "
            "of a letter alone, the mean of its trained seeds, over those (Student t)."
        )
        parts.append(figure(escaped(name), chart, caption))
    if not parts:
        return ""
    rows = []
    for i, experiment in enumerate(report.experiments):
        for run in experiment.runs:
            if run.measured is not None:
                e = run.measured.evaluation
                rows.append([
                    f"{badge(i, run.label)} {escaped(run.folder.name)}", plus_minus(e.accuracy_mean, e.ci95_episodes),
                    escaped(f"{e.episodes} episodes"), escaped(shape_of(e)), escaped(e.bn), f"{e.loss_mean:.3f}",
                    _chosen(run.folder.best),
                ])  # fmt: skip
        e_all = experiment.evaluation
        if e_all is not None and e_all.ci95_runs is not None:
            rows.append([
                f"{badge(i, experiment.letter)} mean", plus_minus(e_all.accuracy_mean, e_all.ci95_runs),
                f"{len(e_all.run_means)} trained seeds", escaped(shape_of(e_all)), escaped(e_all.bn),
                f"{e_all.loss_mean:.3f}", "",
            ])  # fmt: skip
    head = ["run", "accuracy (%)", "± 95 % over", "episodes", "BatchNorm", "loss", "chosen on validation"]
    return f'<div class="grid">{"".join(parts)}</div>{table(head, rows, numbers=(1, 5))}{_paired(report)}'


def _chosen(best: Any) -> str:
    accuracy, update = best.get("val_accuracy"), best.get("iteration")
    if not isinstance(accuracy, int | float) or not isinstance(update, int):
        return ""
    return f"{accuracy:.2f} % at update {update:,}"


def _paired(report: Report) -> str:
    index = {id(e): i for i, e in enumerate(report.experiments)}
    rows = []
    for d in differences(report):
        seeds = "" if d.seeds is None else f"± {d.seeds:.2f}"
        rows.append([
            f"{badge(index[id(d.a)], d.a.letter)} − {badge(index[id(d.b)], d.b.letter)}",
            plus_minus(d.mean, d.episodes, sign=True), seeds, _verdict(d.mean, d.episodes),
        ])  # fmt: skip
    if not rows:
        return ""
    note = (
        "Both saw the same episodes of the same images, so that what is hard for both drops out; of "
        "several seeds the mean counts. "
        f"± is 95 %, over {report.asked.episodes} episodes; over seeds where both have the same. With few seeds, an "
        "interval over episodes says little about other seeds."
    )
    head = ["difference", "points, ± over episodes", "± over seeds", "over these episodes"]
    return f"<h3>Paired differences</h3><p>{escaped(note)}</p>{table(head, rows, numbers=(1, 2))}"


def _verdict(mean: float, half: float) -> str:
    if half != half:
        return "one episode"
    return "not settled" if abs(mean) <= half else ("the first is ahead" if mean > 0 else "the second is ahead")


def _settings(report: Report) -> str:
    found = [(i, e, e.config) for i, e in enumerate(report.experiments) if e.config is not None]
    if not found:
        return ""
    values = [{name: v for name, v in asdict(c).items() if name not in MACHINE} for _, _, c in found if c is not None]
    if len(found) == 1:
        data = values[0]["data"]
        values.append(asdict(Config(data=data, method=values[0]["method"]).resolved()))
        heads = [badge(found[0][0], found[0][1].letter), "default"]
        intro = f"What differs from the defaults of l2g train for this method on {data}."
    else:
        heads = [badge(i, e.letter) for i, e, _ in found]
        intro = "What differs between the experiments; runs of one experiment differ in their seed alone."
    names = [name for name in values[0] if name != "seed"]
    different = [name for name in names if len({str(v[name]) for v in values}) > 1]
    rows = [[f"<code>{escaped(flag(name))}</code>", *(escaped(_value(v[name])) for v in values)] for name in different]
    seeds = [", ".join(str(run.seed) for run in e.runs) for _, e, _ in found]
    seeds += [str(Config().seed)] if len(found) == 1 else []
    same = [[f"<code>{escaped(flag(n))}</code>", escaped(_value(values[0][n]))] for n in names if n not in different]
    if len(set(seeds)) > 1:
        rows.append(["<code>--seed</code>", *map(escaped, seeds)])
    else:
        same.append(["<code>--seed</code>", escaped(seeds[0])])
    common = table(["setting", "value"], same)
    what = "at its default" if len(found) == 1 else "the same in all"
    return (
        f"<p>{escaped(intro)}</p>{table(['setting', *heads], rows)}"
        f"<details><summary>{len(same)} settings that are {what}</summary>{common}</details>"
    )


def _value(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value))
    return "–" if value is None else str(value)


def _curves(report: Report) -> str:
    charts = [("Training", loss_chart(report), "Mean over the tasks of an update, smoothed over a fiftieth of the run. "
               "Losses of different methods differ in kind (L2G: of T_j after an inner step) and are not to be "
               "compared."),
              ("Validation", validation_chart(report), _validations(report))]  # fmt: skip
    figures = [figure(title, chart, caption) for title, chart, caption in charts if chart]
    if not figures:
        return ""
    legend = "".join(
        f"<li>{badge(i, e.letter)} {escaped(e.title)}: {escaped(', '.join(run.folder.name for run in e.runs))}</li>"
        for i, e in enumerate(report.experiments)
    )
    return f'<ul class="legend">{legend}</ul><div class="grid">{"".join(figures)}</div>'


def _validations(report: Report) -> str:
    configs = [run.folder.config for run in report.runs if run.folder.config is not None]
    over = sorted({f"{c.eval_episodes} episodes, BatchNorm {c.bn}" for c in configs})
    return f"On the validation split under θ ({'; '.join(over)}); bands are 95 % over episodes."


def _confusions(images: Sequence[Images], report: Report) -> str:
    parts = []
    for of in images:
        note = (
            f"The {len(of.hard)} of {of.data.n_classes} classes that are recognised least often, the hardest first, in "
            "further episodes of these classes alone. An episode has only a few of them: a cell is the share of the "
            "row's queries, in episodes with both classes, that were taken for the column's. On the diagonal: "
            "recognised. –: never met. Stop over a cell for its counts."
        )
        parts.append(f'<p>{escaped(note)}</p><div class="grid">{"".join(confusion_figures(of))}</div>')
    return "".join(parts) + (_limited(report) if parts else "")


def _limited(report: Report) -> str:
    more = sum(bool(e.measured) for e in report.experiments) - DETAILED
    return f'<p class="soft">{more} more experiments are left out here and below.</p>' if more > 0 else ""


def _embeddings(images: Sequence[Images]) -> str:
    note = (
        "t-SNE of the hard classes above, the same images for all; easier classes lie farther apart. Stop over a "
        "point, touch it, or go there with Tab and the arrow keys, to see the image. t-SNE keeps neighbours, not "
        "distances or sizes of groups; it is a picture, not a result."
    )
    figures = [f'<div class="grid">{"".join(tsne_figures(of))}</div>' for of in images if of.hard]
    return f"<p>{escaped(note)}</p>{''.join(figures)}" if figures else ""


def _reliability(report: Report) -> str:
    figures = reliability_figures(report)
    note = (
        "Queries by the probability of their prediction, the softmax of the scores without a temperature. Bars: how "
        "often they are right; on the dashed line probabilities would be true. Red frames: the gap. Grey: how many."
    )
    return f'<p>{escaped(note)}</p><div class="grid">{"".join(figures)}</div>' if figures else ""


def _episodes(images: Sequence[Images], report: Report) -> str:
    each = 2 if sum(len(of.members) for of in images) == 1 else 1
    figures = [f'<div class="grid">{"".join(episode_figures(of, each=each))}</div>' for of in images]
    note = (
        f"The worst and the best of {report.asked.episodes} episodes: extremes, chosen for what they show, not typical "
        "ones. Left, on grey, the supports; then the queries, red with the number of the class that they were "
        "taken for, green if recognised."
    )
    return f"<p>{escaped(note)}</p>{''.join(figures)}" if figures else ""
