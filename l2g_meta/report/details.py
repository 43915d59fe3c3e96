"""The parts of a page that show images: confusions, t-SNE, episodes; and the reliability of probabilities."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from l2g_meta.classify.calibration import expected_calibration_error
from l2g_meta.data.dataset import ClassDataset
from l2g_meta.errors import L2GError
from l2g_meta.report.charts import reliability_chart, scatter
from l2g_meta.report.confusion import Confusion, confusion, hardest
from l2g_meta.report.gather import Experiment, Report, Run
from l2g_meta.report.measure import Measured, among
from l2g_meta.report.reliability import reliability
from l2g_meta.report.svg import colour, escaped
from l2g_meta.report.thumbnails import Sheet
from l2g_meta.report.tsne import POINTS, choose_rows, flat
from l2g_meta.report.words import badge, figure, of_episodes

DETAILED = 6  # experiments whose images are shown
TILES = 100  # queries shown of an episode
SUPPORTS = 6  # shown of a class


@dataclass(eq=False)
class Images:
    """Experiments on one data set, their hard classes, and the sheet of its thumbnails.

    Args:
        number: of the sheet, in the style's class names.
        members: experiments with the number of their colour.
        sheet: collects the thumbnails.
        hard: classes, the hardest first.
        confusions: of each member, over its trained seeds, in episodes of the hard classes alone.
    """

    number: int
    members: list[tuple[int, Experiment]]
    sheet: Sheet
    hard: list[int] = field(default_factory=list)
    confusions: list[Confusion] = field(default_factory=list)

    @property
    def data(self) -> ClassDataset:
        """The data set."""
        return self.sheet.data

    def tile(self, row: int, more: str = "", inside: str = "", title: str = "") -> str:
        """An image of the data set."""
        x, y = self.sheet.place(row)
        shown = f' title="{escaped(title)}"' if title else ""
        style = f"tile s{self.number} {more}".strip()
        return f'<span class="{style}" style="--x:{x};--y:{y}"{shown}>{inside}</span>'

    def example(self, c: int) -> str:
        """The first image of a class."""
        return self.tile(int(self.data.index[c][0]))


def images_of(report: Report) -> list[Images]:
    """One for each data set that something was tested on; at most ``DETAILED`` experiments in all."""
    found, left = [], DETAILED
    for number, group in enumerate(report.by_data()):
        members = [(report.experiments.index(e), e) for e in group[:left]]
        left -= len(members)
        if not members:
            break
        images = Images(number, members, Sheet(group[0].measured[0].data))
        tested = [experiment.measured for _, experiment in members]
        images.hard = hardest(
            [_added(confusion(m.answers, images.data.n_classes) for m in of) for of in tested], report.asked.classes
        )
        hard = images.data.of_classes(images.hard)  # once, a copy of their images
        images.confusions = [
            _added(confusion(among(m, hard, report.asked), hard.n_classes) for m in of) for of in tested
        ]
        found.append(images)
    return found


def _added(counts: Iterable[Confusion]) -> Confusion:
    return functools.reduce(operator.add, counts)


def confusion_figures(images: Images) -> list[str]:
    """A matrix for each experiment."""
    names = [images.data.class_names[c] for c in images.hard]
    return [
        _matrix(i, e, images, counts, names) for (i, e), counts in zip(images.members, images.confusions, strict=True)
    ]


def _matrix(i: int, experiment: Experiment, images: Images, counts: Confusion, names: Sequence[str]) -> str:
    numbers = range(1, len(images.hard) + 1)
    head = "".join(f'<th scope="col" title="{escaped(name)}">{n}</th>' for n, name in zip(numbers, names, strict=True))
    rates = counts.rates
    own = np.eye(len(rates), dtype=bool)
    most = [float(np.nanmax(rates[part], initial=1e-9)) for part in (~own, own)]  # the darkest cell of each kind
    rows = []
    for a, (n, c) in enumerate(zip(numbers, images.hard, strict=True)):
        cells = "".join(_cell(counts, a, b, names, most[a == b]) for b in range(len(names)))
        title = (
            f'<th scope="row">{images.example(c)} {n} <span class="name" title="{escaped(names[a])}">'
            f"{escaped(names[a])}</span></th>"
        )
        rows.append(f"<tr>{title}{cells}</tr>")
    table = (
        '<div class="scroll" tabindex="0" role="region" aria-label="Confusions"><table class="confusion">'
        f'<thead><tr><th scope="col">class</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
    e = experiment.evaluation
    caption = f"Rows: true class; columns: predicted class, in per cent. {of_episodes(e)}, of these classes alone."
    return figure(f"{badge(i, experiment.letter)} {escaped(experiment.title)}", table, caption)


def _cell(counts: Confusion, a: int, b: int, names: Sequence[str], most: float) -> str:
    offered, taken = int(counts.offered[a, b]), int(counts.taken[a, b])
    if not offered:
        return f'<td style="--v:0" title="{escaped(names[a])} and {escaped(names[b])} never met">–</td>'
    rate = taken / offered
    what = "recognised" if a == b else f"taken for {names[b]}"
    title = escaped(f"{names[a]} {what}: {taken} of {offered} queries in episodes with {'it' if a == b else 'both'}")
    own = ' class="own"' if a == b else ""
    return f'<td{own} style="--v:{rate / most:.2f}" title="{title}">{100 * rate:.0f}</td>'


def tsne_figures(images: Images) -> list[str]:
    """A picture for each experiment, of its first tested run: the same images in all."""
    rows = choose_rows(images.data, images.hard)
    position = {c: n for n, c in enumerate(images.hard)}
    classes = [position[int(c)] for c in np.asarray(images.data.labels)[rows]]
    names = [images.data.class_names[c] for c in images.hard]
    all_rows = sum(len(images.data.index[c]) for c in images.hard)
    shown = "all" if len(rows) == all_rows else f"{len(rows)} of"
    figures = []
    for i, experiment in images.members:
        run = first_tested(experiment)
        title = f"{badge(i, run.label)} {escaped(experiment.title)}"
        try:
            points = flat(_measured(run).model, images.data, rows)
        except (L2GError, ImportError) as error:
            figures.append(figure(title, f'<p class="problem">{escaped(error)}</p>', ""))
            continue
        plot = scatter(points, classes, [images.sheet.place(row) for row in rows], names)
        tip = f'<div class="tip" hidden>{images.tile(rows[0])}<span class="what" aria-live="polite"></span></div>'
        buttons = "".join(
            f'<button type="button" aria-pressed="false" data-c="{n}"><span class="badge {colour(n)}">{n + 1}</span> '
            f"{escaped(name)}</button>"
            for n, name in enumerate(names)
        )
        body = (
            f'<div class="tsne">{plot}{tip}<div class="classes" role="group" aria-label="Classes">{buttons}</div></div>'
        )
        caption = (
            f"{shown} {all_rows:,} images of these {len(names)} classes (at most {POINTS} are drawn), embedded under θ "
            f"with running statistics by the run of seed {run.seed}. Buttons pick classes."
        )
        figures.append(figure(title, body, caption[0].upper() + caption[1:]))
    return figures


def reliability_figures(report: Report) -> list[str]:
    """A diagram for each experiment, over its trained seeds."""
    figures = []
    for i, experiment in enumerate(report.experiments):
        e = experiment.evaluation
        if e is None:
            continue
        confidence, correct = (
            torch.from_numpy(np.concatenate([getattr(a, name) for m in experiment.measured for a in m.answers]))
            for name in ("confidence", "correct")
        )
        error = 100 * expected_calibration_error(confidence, correct)
        found = reliability(confidence, correct)
        chart = reliability_chart(found, colour(i), experiment.letter)
        sure = "surer than right" if confidence.mean() > correct.double().mean() else "less sure than right"
        caption = (
            f"Expected calibration error {error:.1f} % ({len(found.count)} bins, {len(confidence):,} queries): on "
            f"average {100 * confidence.mean():.1f} % sure, {100 * correct.double().mean():.1f} % right, so {sure}. "
            f"{of_episodes(e)}."
        )
        figures.append(figure(f"{badge(i, experiment.letter)} {escaped(experiment.title)}", chart, caption))
    return figures


def episode_figures(images: Images, *, each: int) -> list[str]:
    """The worst and the best episodes of each experiment's first tested run."""
    figures = []
    for i, experiment in images.members:
        run = first_tested(experiment)
        ranked = _measured(run).ranked()
        chosen = [("worst", k) for k in ranked[:each]] + [("best", k) for k in ranked[::-1][:each]]
        if len(ranked) < 2 * each:
            chosen = [("episode", k) for k in ranked]
        figures += [_episode(i, run, images, kind, k) for kind, k in chosen]
    return figures


def _episode(i: int, run: Run, images: Images, kind: str, k: int) -> str:
    measured, names = _measured(run), images.data.class_names
    answers, accuracy = measured.answers[k], measured.evaluation.accuracies[k]
    rows, most = answers.rows, max(3, TILES // len(answers.rows.classes))
    parts, left_out = [], 0
    for n, c in enumerate(rows.classes):
        supports = rows.support[rows.support_y == n]
        queries = np.flatnonzero(rows.query_y == n)
        queries = queries[np.argsort(answers.correct[queries], kind="stable")]  # wrong ones first
        left_out += max(0, len(supports) - SUPPORTS) + max(0, len(queries) - most)
        shown = "".join(images.tile(row, title=f"support: {names[c]}") for row in supports[:SUPPORTS])
        asked = "".join(
            _query(images, answers.rows.query[q], int(answers.predicted[q]), n, rows.classes) for q in queries[:most]
        )
        right = int(answers.correct[queries].sum())
        others = np.bincount(answers.predicted[queries], minlength=len(rows.classes))
        taken = ", ".join(f"{m} for {b + 1}" for b, m in enumerate(others) if m and b != n)
        label = f"{right} of {len(queries)} right" + (f"; taken: {taken}" if taken else "")
        parts.append(
            f'<p class="name"><b>{n + 1}</b> {escaped(names[c])} <span class="soft">{label}</span></p>'
            f'<div class="of"><div class="tiles supports" role="img" aria-label="{len(supports)} supports of '
            f'{escaped(names[c])}">{shown}</div><div class="tiles queries" role="img" aria-label="Queries of '
            f'{escaped(names[c])}: {label}">{asked}</div></div>'
        )
    e = measured.evaluation
    caption = (
        f"Episode {k} of {e.episodes} (episode seed {e.episode_seed}), {e.split} split, BatchNorm {e.bn}: "
        f"{int(answers.correct.sum())} of {len(rows.query)} queries are right."
    )
    if left_out:
        caption += f" {left_out} images are left out here, recognised ones first."
    title = f"{badge(i, run.label)} {kind.capitalize()}: {accuracy:.1f} % right"
    return figure(title, f'<div class="episode">{"".join(parts)}</div>', caption)


def _query(images: Images, row: int, predicted: int, n: int, classes: np.ndarray) -> str:
    names = images.data.class_names
    if predicted == n:
        return images.tile(row, "right", title="recognised")
    return images.tile(row, "wrong", f"<i>{predicted + 1}</i>", f"taken for {names[classes[predicted]]}")


def first_tested(experiment: Experiment) -> Run:
    """The run whose images are shown."""
    return next(run for run in experiment.runs if run.measured is not None)


def _measured(run: Run) -> Measured:
    if run.measured is None:
        raise L2GError(f"need a run that was tested, got {run.folder.path}; see its problems")
    return run.measured
