"""Labels beside the points of a picture that cover neither each other nor a point."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

# Lengths are in typographic points.
_SIZE = 8
_MARKER = 7.0
_DISTANCES = (8, 15, 22, 30, 39, 49, 60, 72, 85, 99)
# Beside the point first, then above and below. A line leads to a label that is not just beside its point.
_ANGLES = (0, 180, 30, -30, 150, -150, 60, -60, 120, -120, 90, -90)


def label(axes: Any, labels: Sequence[tuple[str, float, float]], others: Sequence[tuple[float, float]]) -> list[Any]:
    """Writes a label beside each of its points: what, x, y. To be called when all else is drawn.

    Args:
        axes: matplotlib's, whose figure has a canvas.
        others: further points that no label is to cover.

    Returns:
        matplotlib's texts. One that finds no free place is right of its point.
    """
    figure = axes.figure
    figure.canvas.draw()  # so that the axes have their place
    scale = figure.dpi / 72
    points = [axes.transData.transform(place) for place in [(x, y) for _, x, y in labels] + list(others)]
    taken = [_around(x, y, _MARKER * scale, _MARKER * scale) for x, y in points]
    made = []
    # From above: the lines of labels further up then cross none that come later.
    for what, x, y in sorted(labels, key=lambda each: -each[2]):
        text = axes.annotate(what, (x, y), (0, 0), textcoords="offset points", fontsize=_SIZE, va="center", ha="center")
        extent = text.get_window_extent()
        width, height = extent.width / scale + 2, extent.height / scale
        here = axes.transData.transform((x, y))
        for dx, dy in _offsets(width):
            box = _around(here[0] + dx * scale, here[1] + dy * scale, width * scale, height * scale)
            if _is_within(box, axes.bbox) and not any(map(box.overlaps, taken)):
                break
        else:
            dx, dy = _DISTANCES[0] + width / 2, 0.0
            box = _around(here[0] + dx * scale, here[1], width * scale, height * scale)
        text.set_position((dx, dy))
        taken.append(box)
        if abs(dy) > 1 or abs(dx) > width / 2 + _DISTANCES[0] + 1:
            _lead(axes, (x, y), dx, dy, width)
        made.append(text)
    return made


def _offsets(width: float) -> Iterator[tuple[float, float]]:
    """Centres of a label from its point, the nearest first."""
    for distance in _DISTANCES:
        for angle in _ANGLES:
            x, y = distance * math.cos(math.radians(angle)), distance * math.sin(math.radians(angle))
            beside = 0.0 if abs(angle) == 90 else math.copysign(width / 2, x)
            yield x + beside, y


def _lead(axes: Any, place: tuple[float, float], dx: float, dy: float, width: float) -> None:
    end = (math.copysign(max(0.0, abs(dx) - width / 2), dx), dy)
    line = {"arrowstyle": "-", "color": "gray", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
    axes.annotate("", place, end, textcoords="offset points", arrowprops=line)


def _around(x: float, y: float, width: float, height: float) -> Any:
    # Imported only here, as whoever calls this has it.
    from matplotlib.transforms import Bbox

    return Bbox.from_bounds(x - width / 2, y - height / 2, width, height)


def _is_within(box: Any, frame: Any) -> bool:
    return bool(box.x0 > frame.x0 and box.x1 < frame.x1 and box.y0 > frame.y0 and box.y1 < frame.y1)
