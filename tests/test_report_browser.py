"""The page of `l2g report` in a headless Chromium: plots are drawn, nothing complains, thumbnails show themselves."""

import numpy as np
import pytest
from chromium import PROGRAM, Chromium

from l2g_meta.report.experiments import evaluate_runs
from l2g_meta.report.measure import ReportOptions
from l2g_meta.report.page import write_report

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no chromium is installed (Debian: apt install chromium)")

DESKTOP, PHONE = {"width": 1280}, {"width": 390, "height": 844, "mobile": True}
BLUE, ORANGE = (0x2F, 0x6F, 0xD6), (0xD9, 0x68, 0x0A)  # of the first two experiments
DARK_BLUE = (0x6E, 0xA8, 0xFF)
CENTRE = "(() => {{ const b = document.querySelector('{}').getBoundingClientRect(); "
CENTRE += "return [b.x + b.width / 2, b.y + b.height / 2]; }})()"
TIP = "(() => { const t = document.querySelector('.tip'), i = t.querySelector('.tile'); return t.hidden ? null : "
TIP += "[t.querySelector('.what').textContent, i.style.getPropertyValue('--x') + ' ' + i.style.getPropertyValue('--y')]"
TIP += "; })()"


@pytest.fixture(scope="module")
def page(trained_glyphs, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(evaluate_runs(trained_glyphs, ReportOptions(episodes=12, classes=6), tell=lambda line: None), path)
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def boxes(browser, selector):
    """Where elements are on the page, (n, 4): left, top, right, bottom."""
    return browser.evaluate(
        f"[...document.querySelectorAll({selector!r})].map(e => {{ const b = e.getBoundingClientRect(); return ["
        "b.left + scrollX, b.top + scrollY, b.right + scrollX, b.bottom + scrollY].map(Math.round); })"
    )


def near(pixels, colour, tolerance=24):
    """How many pixels are about of this colour."""
    return int((abs(pixels.astype(int) - colour).max(-1) <= tolerance).sum())


@pytest.mark.parametrize("window", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_plots_are_there_and_nothing_complains(browser, page, window):
    browser.open(page, **window)
    assert browser.evaluate("document.documentElement.scrollWidth") == window["width"]
    pixels = np.asarray(browser.screenshot())
    wanted = {
        "#accuracy svg": (BLUE, ORANGE), "#curves svg": (BLUE, ORANGE), "#embeddings svg": (BLUE, ORANGE),
    }  # fmt: skip
    for selector, colours in wanted.items():
        found = boxes(browser, selector)
        assert found, selector
        drawn = []
        for left, top, right, bottom in found:
            assert right - left > 200 and 0 <= left and right <= window["width"]
            drawn.append([near(pixels[top:bottom, left:right], colour) for colour in colours])
        # Lines that cross or cover each other leave little of one colour in one plot, not in a section as a whole.
        assert np.all(np.sum(drawn, 1) > 60) and np.all(np.sum(drawn, 0) > 60), (selector, drawn)
    thumbnails = boxes(browser, "#episodes .tile") + boxes(browser, "#confusion tbody .tile")
    assert len(thumbnails) > 100
    filled = [pixels[top:bottom, left:right].std() > 10 for left, top, right, bottom in thumbnails if right > left]
    assert np.mean(filled) > 0.99  # white strokes on black
    assert browser.errors == []
    assert all(url.startswith(("file:", "data:")) for url in browser.requests) and browser.requests


def test_dark_scheme(browser, page):
    browser.open(page, **DESKTOP, dark=True)
    pixels = np.asarray(browser.screenshot())
    assert np.median(pixels) < 60 and near(pixels, DARK_BLUE) > 500


def test_text_can_be_read_in_both_schemes(browser, page):
    luminance = """(() => { const lum = c => { const v = c.match(/[0-9.]+/g).slice(0, 3).map(x => x / 255)
      .map(x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4); return .2126*v[0] + .7152*v[1] + .0722*v[2]; };
      const of = (e, p) => lum(getComputedStyle(e)[p]);
      const ratio = (a, b) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
      const body = document.body, card = document.querySelector('.card');
      return [ratio(of(body, 'color'), of(body, 'backgroundColor')),
        ratio(of(document.querySelector('figcaption'), 'color'), of(card, 'backgroundColor')),
        ratio(of(document.querySelector('nav a'), 'color'), of(body, 'backgroundColor')),
        ...[...document.querySelectorAll('.badge')].map(b => ratio(of(b, 'color'), of(b, 'backgroundColor')))]; })()"""
    for dark in (False, True):
        browser.open(page, **DESKTOP, dark=dark)
        ratios = browser.evaluate(luminance)
        assert min(ratios[:3]) >= 4.5 and min(ratios[3:]) >= 3.0  # WCAG AA; badges are bold and repeat the text


def test_a_thumbnail_on_hover(browser, page):
    browser.open(page, **DESKTOP)
    assert browser.evaluate(TIP) is None
    browser.evaluate("document.querySelector('.tsne').scrollIntoView({behavior: 'instant', block: 'center'})")
    point = ".tsne .pt:nth-of-type(20)"
    browser.move(*browser.evaluate(CENTRE.format(point)))
    shown = "(e => [e.getAttribute('aria-label'), e.dataset.x + ' ' + e.dataset.y])(document.querySelector('.current'))"
    tip = browser.evaluate(TIP)
    assert tip and tip == browser.evaluate(shown)  # the point itself, or one that covers it
    ((left, top, right, bottom),) = boxes(browser, ".tsne .tip:not([hidden]) .tile")
    assert np.asarray(browser.screenshot())[top:bottom, left:right].std() > 10  # the image itself
    browser.move(5, 5)
    assert browser.evaluate(TIP) is None


def test_a_thumbnail_by_the_keyboard(browser, page):
    browser.open(page, **DESKTOP)
    browser.evaluate("document.querySelector('.pt').focus()")
    first = browser.evaluate(TIP)
    browser.press("ArrowRight")
    second = browser.evaluate(TIP)
    assert first and second and first[1] != second[1]
    browser.press("ArrowLeft")
    assert browser.evaluate(TIP) == first
    browser.press("End")
    assert browser.evaluate("document.activeElement === [...document.querySelector('.tsne svg').children].at(-1)")
    browser.press("Escape")
    assert browser.evaluate(TIP) is None
    # Tab leaves the picture at once: one of its points is a stop, not all.
    browser.press("Tab")
    assert browser.evaluate("document.activeElement.tagName") == "BUTTON"
    browser.evaluate("document.activeElement.click()")
    assert browser.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    picked = browser.evaluate("[...document.querySelector('.tsne svg').querySelectorAll('.on')].map(p => p.dataset.c)")
    assert set(picked) == {"0"} and len(picked) > 1


def test_a_thumbnail_by_touch(browser, page):
    browser.open(page, **PHONE)
    browser.evaluate("document.querySelector('.tsne').scrollIntoView({behavior: 'instant', block: 'center'})")
    browser.touch(*browser.evaluate(CENTRE.format(".tsne .pt:nth-of-type(20)")))
    assert browser.evaluate(TIP)
    ((left, _, right, _),) = boxes(browser, ".tsne .tip:not([hidden])")
    assert 0 <= left and right <= PHONE["width"]


def test_another_script_does_not_run(browser, page, tmp_path):
    text = page.read_text(encoding="utf-8")
    forged = tmp_path / "forged.html"
    forged.write_text(text.replace("<main>", "<main><script>document.title = 'run'</script>"), encoding="utf-8")
    browser.open(forged, **DESKTOP)
    assert browser.evaluate("document.title").startswith("Report: ") and any("Security" in e for e in browser.errors)
