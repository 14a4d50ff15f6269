"""The picture of an answer: spans fill their share of the time line, boxes lie where they are said.

pytest tests/preprocess/test_answer.py
"""

import numpy as np
import pytest
from PIL import Image, ImageColor

from preprocess.show.answer import BAR, BELOW, EMPTY, SAID, TRUE, Pointed, answer_page, frames_of
from preprocess.show.picture import GAP, Layout

TIMES = [0.5 * k for k in range(8)]  # of a clip of 4 seconds
END = 4.0
GREY = 90

Spans = tuple[tuple[float, float], ...]
Places = tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]


def drawn(said: Pointed, true: Pointed | None = None, width: int = 80) -> np.ndarray:
    frames = np.full((len(TIMES), 60, width, 3), GREY, dtype=np.uint8)
    return np.asarray(answer_page("When?", frames, TIMES, END, said, true))


def pointing(spans: Spans = (), places: Places = ()) -> Pointed:
    return Pointed("words", spans, places)


def layout(width: int = 80) -> Layout:
    return Layout.of(len(TIMES), 1, 60, width)


def filled(page: np.ndarray, line: int, ink: str, width: int = 80) -> list[float]:
    """Return of each frame how much of its share of a time line is filled."""
    own = layout(width)
    shares = []
    for k in range(len(TIMES)):
        x, y = own.place(k, 0)
        top = y + own.tile[1] + BELOW + line * (BAR + BELOW)
        bar = page[top : top + BAR, x : x + own.column_width - GAP]
        inked = (bar == ImageColor.getrgb(ink)).all(-1)
        assert (inked | (bar == ImageColor.getrgb(EMPTY)).all(-1)).all()
        shares.append(float(inked.mean()))
    return shares


SPANS: list[tuple[Spans, list[float]]] = [
    (((0.0, 4.0),), [1] * 8),
    (((1.0, 2.5),), [0, 0, 1, 1, 1, 0, 0, 0]),
    (((0.75, 1.125),), [0, 0.5, 0.25, 0, 0, 0, 0, 0]),
    (((3.5, 4.0),), [0, 0, 0, 0, 0, 0, 0, 1]),
    (((0.0, 0.25), (2.0, 2.5)), [0.5, 0, 0, 0, 1, 0, 0, 0]),
]


@pytest.mark.parametrize(("spans", "expected"), SPANS)
@pytest.mark.parametrize("width", [80, 12])
def test_a_span_fills_its_share_of_the_time_line(
    spans: Spans, expected: list[float], width: int
) -> None:
    wrong = pointing(((1.5, 2.0),))
    page = drawn(pointing(spans), wrong, width)
    assert np.allclose(filled(page, 0, SAID, width), expected, atol=0.02)
    assert np.allclose(filled(page, 1, TRUE, width), [0, 0, 0, 1, 0, 0, 0, 0], atol=0.02)


def test_a_single_time_is_a_tick_and_without_times_there_is_no_line() -> None:
    shares = filled(drawn(pointing(((2.25, 2.25),))), 0, SAID)
    assert [k for k, share in enumerate(shares) if share] == [4]
    assert 0 < shares[4] < 0.05
    x, y = layout().place(0, 0)
    below = drawn(pointing())[y + layout().tile[1] :][: BELOW + BAR, x:]
    assert (below == 255).all()


def tile(page: np.ndarray, k: int) -> np.ndarray:
    x, y = layout().place(k, 0)
    width, height = layout().tile
    return page[y : y + height, x : x + width]


def of_ink(image: np.ndarray, ink: str) -> np.ndarray:
    return (image == ImageColor.getrgb(ink)).all(-1)


def test_a_box_lies_where_it_is_said_on_the_frame_of_its_time() -> None:
    said, true = (0.25, 0.2, 0.75, 0.6), (0.5, 0.3, 0.9, 0.9)
    page = drawn(pointing(places=(((1.1,), said),)), pointing(places=(((1.1,), true),)))
    width, height = layout().tile
    for k in range(len(TIMES)):
        for ink, box in ((SAID, said), (TRUE, true)):
            mask = of_ink(tile(page, k), ink)
            if k != 2:  # 1.0 s is the nearest
                assert not mask.any()
                continue
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            found = np.array([columns[0], rows[0], columns[-1], rows[-1]])
            expected = np.array(box) * [width, height, width, height]
            assert np.abs(found - expected).max() <= 4, (ink, found, expected)
            middle = round(expected[[1, 3]].mean()), round(expected[[0, 2]].mean())
            assert not mask[middle]


def test_what_is_said_is_drawn_over_what_is_true_and_both_are_seen() -> None:
    same = pointing(places=(((0.0,), (0.2, 0.2, 0.8, 0.8)),))
    page = tile(drawn(same, same), 0)
    width, height = layout().tile
    row = page[height // 2]
    inks = [
        ("said" if a else "true" if b else "")
        for a, b in zip(of_ink(row, SAID), of_ink(row, TRUE), strict=True)
    ]
    left = [ink for ink in inks[: width // 2] if ink]
    assert list(dict.fromkeys(left)) == ["true", "said"]
    assert left == left[::-1]
    assert inks[round(0.2 * width)] == "said"


def test_a_point_is_a_ring_around_it_and_a_box_backwards_is_not_drawn() -> None:
    page = drawn(pointing(places=(((3.5,), (0.5, 0.5)), ((0.0,), (0.8, 0.8, 0.2, 0.2)))))
    rows, columns = np.nonzero(of_ink(tile(page, 7), SAID))
    width, height = layout().tile
    assert abs(columns.mean() - width / 2) < 1
    assert abs(rows.mean() - height / 2) < 1
    assert np.ptp(columns) < 20
    assert not of_ink(tile(page, 0), SAID).any()


def test_a_place_without_a_time_is_of_the_spans_or_of_every_frame() -> None:
    assert frames_of((1.8,), (), TIMES) == [4]
    assert frames_of((), ((1.0, 2.0),), TIMES) == [2, 3]
    assert frames_of((), (), TIMES) == list(range(8))
    assert frames_of((), ((0.1, 0.2),), TIMES) == []


def test_words_beyond_ascii_and_long_ones_are_written() -> None:
    frames = np.zeros((1, 20, 20, 3), dtype=np.uint8)
    said = Pointed("слово\n" * 400, (), ())
    page = answer_page("Wann ist das Mädchen zu sehen?", frames, [0.0], 1.0, said, None)
    assert isinstance(page, Image.Image)
    assert (np.asarray(page)[:, -5:] == 255).all()
