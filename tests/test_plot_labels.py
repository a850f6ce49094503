"""Labels of a picture can be read: none covers another or a point, and none leaves the axes."""

from __future__ import annotations

from itertools import combinations

import pytest

matplotlib = pytest.importorskip("matplotlib", reason="pictures are drawn by matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from nai_t5_core.bench.plot_labels import label  # noqa: E402

# Bits and errors of kinds: seven of nearly one size and error, some the very same, and some at an edge.
CROWD = [(4.5, error) for error in (0.14, 0.14, 0.16, 0.17, 0.18, 0.19, 0.22)]
EDGES = [(2.6, 0.43), (8.5, 0.01), (8.5, 0.0101), (8.5, 0.43)]


@pytest.mark.parametrize("points", [CROWD, EDGES, CROWD + EDGES], ids=["crowd", "edges", "both"])
def test_labels_cover_nothing(points: list[tuple[float, float]]) -> None:
    others = [(bits, error / 4) for bits, error in points]
    figure = Figure(figsize=(8, 6.4), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.scatter(*zip(*points, *others, strict=True))
    axes.set_yscale("log")
    axes.margins(x=0.12, y=0.12)
    texts = label(axes, [(f"a kind, {number}", *point) for number, point in enumerate(points)], others)
    assert sorted(text.get_text() for text in texts) == sorted(f"a kind, {number}" for number in range(len(points)))
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in texts]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    places = axes.transData.transform([*points, *others])
    assert not any(box.contains(*place) for box in boxes for place in places)
    frame = axes.bbox
    assert all(frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1) for box in boxes)


def test_a_label_of_a_point_by_itself_is_just_beside_it() -> None:
    figure = Figure(figsize=(8, 6.4), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.scatter([0, 1, 2], [0, 1, 2])
    (text,) = label(axes, [("kind", 1.0, 1.0)], [(0.0, 0.0), (2.0, 2.0)])
    figure.canvas.draw()
    x, y = axes.transData.transform((1.0, 1.0))
    box = text.get_window_extent()
    assert 0 < box.x0 - x < 15 * figure.dpi / 72 and box.y0 < y < box.y1
