"""Line charts and dot plots as coordinates; templates/charts.html draws them as SVG and HTML.

A chart is 360 units wide, about as wide as a phone: its text is legible there and on a desktop. Texts
are escaped by the template.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

WIDTH, HEIGHT = 360.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 48.0, 12.0, 10.0, 38.0  # margins
MAX_POINTS = 400  # of a line; of more, every n-th and the last are drawn
MAX_MARKERS = 60  # points of a line that are drawn as circles
NUM_COLORS = 6

Point = tuple[float, float]
Format = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """Points with a name; points that are not finite interrupt the line."""

    name: str
    points: Sequence[Point]
    intervals: Sequence[tuple[float, float]] = ()
    """(low, high) of each point; empty: none are drawn"""
    is_line: bool = True
    is_band: bool = False
    """whether the intervals are drawn as an area instead of bars"""
    color: int | None = None


class Circle(NamedTuple):
    """A point with the text that is shown over it."""

    x: float
    y: float
    title: str


class Tick(NamedTuple):
    """A position on an axis, and its text."""

    position: float
    text: str


@dataclass
class Mark:
    """The shapes of a series."""

    name: str
    color: int
    paths: list[str] = field(default_factory=list)
    circles: list[Circle] = field(default_factory=list)
    bars: list[tuple[float, float, float]] = field(default_factory=list)
    """(x, y, y) of the interval of each point"""
    area: str = ""


@dataclass(frozen=True)
class Chart:
    """A line chart, in units of its view box."""

    title: str
    x_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[Mark]
    diagonal: tuple[float, float, float, float] | None = None
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


@dataclass(frozen=True)
class Axis:
    """The range of an axis, and its position on the chart."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def position(self, value: float) -> float:
        """Return the position of a value; of one outside the range, that of the nearest end."""
        low, high, value = (math.log(v) if self.is_log else v for v in (self.low, self.high, value))
        share = 0.5 if high <= low else min(max((value - low) / (high - low), 0.0), 1.0)
        return round(self.start + share * (self.end - self.start), 1)


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_format: Format,
    x_format: Format | None = None,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    x_values: Sequence[float] = (),
    y_limits: tuple[float, float] = (-math.inf, math.inf),
    has_diagonal: bool = False,
) -> Chart | None:
    """Return a chart of the series that have finite points; None without any.

    Args:
        title: Shown above it.
        series: What to draw; colors follow their order.
        x_label: Shown below the x axis.
        y_format: Formats a value of the y axis.
        x_format: The same for the x axis; by default its values are whole numbers, as epochs are.
        x_range: Of the x axis; by default that of the points.
        y_range: Of the y axis; by default that of the points and their intervals.
        x_values: Positive values to be labeled on a logarithmic x axis, as batch sizes are.
        y_limits: Which the range of the y axis does not exceed.
        has_diagonal: Whether to draw the line on which y equals x.
    """
    known = [each for each in series if any(map(_is_finite, each.points))]
    if not known:
        return None
    points = [point for each in known for point in each.points if _is_finite(point)]
    ends = [end for each in known for interval in each.intervals for end in interval if math.isfinite(end)]
    x_low, x_high = x_range or _range_of([x for x, _ in points])
    y_low, y_high = y_range or _padded(_range_of([y for _, y in points] + ends), y_limits)
    x_axis = Axis(x_low, x_high, LEFT, WIDTH - RIGHT, is_log=bool(x_values))
    y_axis = Axis(y_low, y_high, HEIGHT - BOTTOM, TOP)
    min_step = 0.0 if x_format else 1.0
    x_texts = _spaced(x_values, x_axis) if x_values else nice_ticks(x_low, x_high, 6, min_step)
    x_format = x_format or "{:,.0f}".format
    return Chart(
        title=title,
        x_label=x_label,
        x_ticks=_unique(Tick(x_axis.position(x), x_format(x)) for x in x_texts),
        y_ticks=_unique(Tick(y_axis.position(y), y_format(y)) for y in nice_ticks(y_low, y_high, 6)),
        marks=[
            _draw(each, n if each.color is None else each.color, x_axis, y_axis, x_format, y_format)
            for n, each in enumerate(known)
        ],
        diagonal=(
            (x_axis.position(0), y_axis.position(0), x_axis.position(1), y_axis.position(1))
            if has_diagonal
            else None
        ),
    )


def _draw(series: Series, color: int, x_axis: Axis, y_axis: Axis, x_format: Format, y_format: Format) -> Mark:
    mark = Mark(series.name, color % NUM_COLORS)
    step = -(-len(series.points) // MAX_POINTS) or 1
    kept = sorted({*range(0, len(series.points), step), len(series.points) - 1})
    parts: list[list[str]] = [[]]
    upper, lower = [], []
    for n in kept:
        point = series.points[n]
        if not _is_finite(point):
            parts.append([])
            continue
        x, y = x_axis.position(point[0]), y_axis.position(point[1])
        parts[-1].append(f"{x:g},{y:g}")
        text = y_format(point[1])
        if series.intervals:
            low, high = series.intervals[n]
            text += f" ({y_format(low)} to {y_format(high)})"
            upper.append(f"{x:g},{y_axis.position(high):g}")
            lower.append(f"{x:g},{y_axis.position(low):g}")
            if not series.is_band:
                mark.bars.append((x, y_axis.position(low), y_axis.position(high)))
        if len(kept) <= MAX_MARKERS and not series.is_band:
            mark.circles.append(Circle(x, y, f"{series.name} {x_format(point[0])}: {text}".strip()))
    if series.is_line:
        mark.paths = [" ".join(part) for part in parts if len(part) > 1]
    if series.is_band:
        mark.area = " ".join([*upper, *reversed(lower)])
    return mark


class DotRow(NamedTuple):
    """A value with its interval in a dot plot; positions in percent of the width."""

    label: str
    text: str
    dot: float | None
    """None without a value"""
    low: float
    width: float
    """of the interval"""


@dataclass(frozen=True)
class DotPlot:
    """Values in rows on a common axis."""

    title: str
    rows: list[DotRow]
    low: str
    high: str
    """texts at the ends of the axis"""


def dot_plot(
    title: str,
    values: Sequence[tuple[str, float | None, tuple[float, float] | None, str]],
    *,
    y_format: Format,
    limits: tuple[float, float],
) -> DotPlot | None:
    """Return a plot of (label, value, interval, text after it); None without a value."""
    ends = [v for _, value, interval, _ in values for v in (value, *(interval or ())) if v is not None]
    ends = [v for v in ends if math.isfinite(v)]
    if not ends:
        return None
    low, high = _padded(_range_of(ends), limits)
    axis = Axis(low, high, 0.0, 100.0)
    rows = []
    for label, value, interval, text in values:
        dot = None if value is None or not math.isfinite(value) else axis.position(value)
        start, end = (0.0, 0.0) if interval is None else (axis.position(each) for each in interval)
        rows.append(DotRow(label, text, dot, start, round(end - start, 1)))
    return DotPlot(title, rows, y_format(low), y_format(high))


def percent(value: float) -> str:
    """Return a fraction in percent with up to two decimals, as in 98.5%."""
    return f"{100 * value:.2f}".rstrip("0").rstrip(".") + "%"


def nice_ticks(low: float, high: float, max_ticks: int, min_step: float = 0.0) -> list[float]:
    """Return multiples of 1, 2 or 5 times a power of ten in a range; its ends if it is empty."""
    if not high > low:
        return [low]
    rough = max((high - low) / max(1, max_ticks - 1), min_step)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def _unique(ticks: Iterable[Tick]) -> list[Tick]:
    """Return the ticks without those whose text repeats that of the one before."""
    found: list[Tick] = []
    for tick in ticks:
        if not found or tick.text != found[-1].text:
            found.append(tick)
    return found


def _spaced(values: Sequence[float], axis: Axis) -> list[float]:
    """Return the values that are far enough from the one before for their texts."""
    shown: list[float] = []
    for value in sorted(set(values)):
        if not shown or axis.position(value) - axis.position(shown[-1]) >= 26:
            shown.append(value)
    return shown


def _range_of(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _padded(bounds: tuple[float, float], limits: tuple[float, float]) -> tuple[float, float]:
    """Return a range that is a little larger, within limits."""
    low, high = bounds
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return max(limits[0], low - margin), min(limits[1], high + margin)


def _is_finite(point: Point) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1])
