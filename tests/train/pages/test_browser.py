"""The page in a real browser: nothing complains, is fetched or cut off, and keys are enough."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train.pages.browser import Browser, found
from tests.train.pages.written import write_a_run
from train.pages.page import page
from train.pages.read.runs import read_runs

pytest.importorskip("matplotlib")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(found() is None, reason="no Chromium or Chrome on this machine"),
]

CLIPS = ("test/clip-00000.mp4", "test/clip-00001.mp4")
CONTRAST = """(() => {
  const light = text => {
    const [r, g, b] = text.match(/[0-9.]+/g).slice(0, 3).map(v => {
      const u = v / 255; return u <= 0.04045 ? u / 12.92 : ((u + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = element => {
    for (let e = element; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor;
      if (!c.endsWith(', 0)') && c !== 'transparent') return c;
    }
    return 'rgb(255, 255, 255)';
  };
  let worst = [99, ''];
  const words = 'p, li, h1, h2, h3, h4, h5, td, th, a, small, summary, code, dt, dd';
  for (const e of document.querySelectorAll(words)) {
    if (!e.textContent.trim() || !e.getClientRects().length) continue;
    const a = light(getComputedStyle(e).color), b = light(ground(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) worst = [ratio, e.outerHTML.slice(0, 80)];
  }
  return worst;
})()"""
"""The least contrast of a text with what is behind it, by WCAG 2's formula, and whose it is."""
CUT_OFF = """[...document.querySelectorAll('svg text')].filter(t => {
  const own = t.getBoundingClientRect(), all = t.ownerSVGElement.getBoundingClientRect();
  return own.left < all.left - 2 || own.right > all.right + 2;
}).map(t => t.textContent)"""
"""Words of drawings that reach beyond them."""
OVERLAPS = """[...document.querySelectorAll('svg')].flatMap(s => {
  const boxes = [...s.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
  return boxes.flatMap(([a, x], k) => boxes.slice(k + 1).filter(([b, y]) =>
    x.left < y.right - 1 && y.left < x.right - 1 && x.top < y.bottom - 2 && y.top < x.bottom - 2
  ).map(([b]) => a + ' / ' + b));
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser.start() as started:
        yield started


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, toy_bank: Path) -> Path:
    top = tmp_path_factory.mktemp("page")
    settings = {"bank": [str(toy_bank)], "max_frames_num": 6, "stage_path": "x/" * 60}
    names = ("good", "a-run-with-a-name-that-is-longer-than-most/seed-0")
    folders = [
        write_a_run(top / name, CLIPS, good=name == "good", settings=settings) for name in names
    ]
    path = top / "report.html"
    path.write_text(page(read_runs(folders)))
    return path


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_is_whole_and_readable(browser: Browser, place: Path, width: int, dark: bool) -> None:
    shown = browser.open(place, width=width, dark=dark)
    assert shown.complaints() == []
    assert shown.requests() == [place.as_uri()]
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    assert shown.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    contrast, whose = shown.evaluate(CONTRAST)
    assert contrast >= 4.5, whose
    assert shown.evaluate(CUT_OFF) == []
    assert shown.evaluate(OVERLAPS) == []
    is_dark = shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
    assert is_dark == dark
    shown.close()


def test_keys_are_enough(browser: Browser, place: Path) -> None:
    shown = browser.open(place, width=1280)
    shown.press("Tab", 9)
    assert shown.evaluate("document.activeElement.className") == "skip"
    assert shown.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    shown.press("Tab", 9)
    assert shown.evaluate("document.activeElement.getAttribute('href')") == "#short"
    assert shown.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    closed = "[...document.querySelectorAll('details')].filter(d => !d.open)"
    before = shown.evaluate(f"{closed}.length")
    shown.evaluate(f"{closed}[0].querySelector('summary').focus()")
    shown.press(" ", 32)
    assert shown.evaluate(f"{closed}.length") == before - 1
    # what scrolls by itself can be reached
    assert shown.evaluate(
        "[...document.querySelectorAll('.wide')].every(e => e.tabIndex === 0 && e.ariaLabel)"
    )
    assert shown.complaints() == []
    shown.close()
