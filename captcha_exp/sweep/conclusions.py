"""What a sweep comes to, in sentences."""

from collections.abc import Iterable, Sequence

from captcha_exp.sweep.aggregate import BATCH_SIZE, Group, Mean, named, short_names
from captcha_exp.sweep.results import Became

ENOUGH = 0.95  # of the most pictures a second
COUNTED: tuple[tuple[Became, str, str], ...] = (
    ("finished", "finished", "finished"),
    ("oom", "ran out of memory", "ran out of memory"),
    ("unfit", "does not fit", "do not fit"),
    ("failed", "failed", "failed"),
    ("killed", "was killed", "were killed"),
    ("not run", "was not run", "were not run"),
)


def sentences(groups: Sequence[Group], side_by_side: int) -> tuple[str, ...]:
    """What follows from the groups, each on one line; and what to beware of.

    `side_by_side` points ran at a time.
    """
    if not _finished(groups):
        return (f"nothing finished: {counted(groups)}",)
    found = []
    if batch_was_swept(groups):
        for name, members in by_others(groups):
            found.append(f"{name}: {_of_batches(members)}" if name else _of_batches(members))
    else:
        found.append(_of_groups(groups))
    if side_by_side > 1:
        found.append(
            f"{side_by_side} points ran at a time: speeds are those of points that shared the machine"
        )
    return tuple(found)


def batch_was_swept(groups: Sequence[Group]) -> bool:
    """Whether the batch size was swept, by numbers alone."""
    return bool(groups) and all(group.batch_size is not None for group in groups)


def by_others(groups: Sequence[Group]) -> list[tuple[str, list[Group]]]:
    """Where batch sizes were swept: by what else was, its groups, the smallest batch first."""
    shorter = short_names(key for group in groups for row in group.rows for key in row.swept)
    found: dict[tuple[tuple[str, str], ...], list[Group]] = {}
    for group in sorted(groups, key=lambda group: group.batch_size or 0):
        others = tuple((key, value) for key, value in group.swept.items() if key != BATCH_SIZE)
        found.setdefault(others, []).append(group)
    in_order = sorted(found.items(), key=lambda item: min(group.number for group in item[1]))
    return [(named(dict(others), shorter), members) for others, members in in_order]


def counted(groups: Iterable[Group]) -> str:
    """How many points became what, as in of 5 points 3 finished and 2 failed."""
    became = [row.became for group in groups for row in group.rows]
    parts = []
    for kind, one, many in COUNTED:
        if number := became.count(kind):
            parts.append(f"{number:,} {one if number == 1 else many}")
    if len(became) < 2:
        return f"1 point, which {parts[0][2:]}" if parts else "there are no points"
    told = f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]
    return f"of {len(became):,} points {told}"


def _finished(groups: Iterable[Group]) -> bool:
    return any("finished" in group.became for group in groups)


def _of_batches(groups: Sequence[Group]) -> str:
    """The smallest batch that is nearly the fastest, with its accuracy beside the best."""
    if not _finished(groups):
        return f"nothing finished: {counted(groups)}"
    able = [group for group in groups if group.can_be_taken]
    timed = [group for group in able if "pictures_per_second" in group.figures]
    best = _best(groups)
    if not timed:
        why = "no speed is known of what fits" if able else "no batch size fits"
        return f"{why}{_beside(None, best)}"
    speeds = [group.figures["pictures_per_second"].value for group in timed]
    most = max(speeds)
    chosen, speed = next(
        (group, speed) for group, speed in zip(timed, speeds, strict=True) if speed >= ENOUGH * most
    )
    limited = any(group.fits is not None for group in groups)
    if len(groups) == 1:
        said = f"{'fits and reaches' if limited else 'reaches'} {_speed(speed)} pictures/s"
    elif len(able) == 1 and limited:
        said = f"is the only one that fits ({_speed(speed)} pictures/s)"
    else:
        rank = "the most itself" if speed == most else f"of {_speed(most)}"
        said = (
            f"is the smallest that {'fits and comes' if limited else 'comes'} within 5 % of the most "
            f"pictures/s ({_speed(speed)}{', ' if speed == most else ' '}{rank})"
        )
    return f"batch_size={chosen.batch_size} {said}{_beside(chosen, best)}"


def _beside(chosen: Group | None, best: Group | None) -> str:
    """The accuracy of what was chosen, and the best of all that finished."""
    if best is None:
        return ""
    room = _without_room(best)
    top = f"{_accuracy(best)} (batch_size={best.batch_size}{f', which {room}' if room else ''})"
    if chosen is None or "val_accuracy" not in chosen.figures:
        return f"; the best validation accuracy is {top}"
    said = f"; its validation accuracy is {_accuracy(chosen)}"
    return f"{said}, the best" if chosen is best else f"{said}, the best is {top}"


def _of_groups(groups: Sequence[Group]) -> str:
    """Who reads best, and whether that is certain."""
    best = _best(groups)
    if best is None:
        return f"there is no validation accuracy to compare: {counted(groups)}"
    room = _without_room(best)
    accuracy = f"{_accuracy(best)}{f', but it {room}' if room else ''}"
    if len(groups) == 1:
        return f"the validation accuracy is {accuracy}"
    said = f"{best.name} has the best validation accuracy, {accuracy}"
    second = _best([group for group in groups if group is not best])
    if second is None:
        return said
    said += f"; next is {second.name} with {_accuracy(second)}"
    upper, lower = best.figures["val_accuracy"].interval, second.figures["val_accuracy"].interval
    if upper is None or lower is None:
        return said
    if lower[1] >= upper[0]:
        return f"{said}; the intervals overlap, so that the difference is not certain"
    return f"{said}; the intervals do not overlap"


def _best(groups: Iterable[Group]) -> Group | None:
    """The group of the best validation accuracy, the first of several."""
    known = [group for group in groups if "val_accuracy" in group.figures]
    return max(known, key=lambda group: group.figures["val_accuracy"].value, default=None)


def _accuracy(group: Group) -> str:
    found: Mean = group.figures["val_accuracy"]
    if found.interval is None:
        return f"{found.value:.2%}"
    low, high = found.interval
    return f"{found.value:.2%} (mean of {found.points}, 95 % interval {low:.2%} to {high:.2%})"


def _without_room(group: Group) -> str:
    words = {"does not fit": "does not fit", "unsure": "may not fit"}
    return words.get(group.fits or "", "")


def _speed(pictures_per_second: float) -> str:
    return f"{pictures_per_second:,.0f}" if pictures_per_second >= 10 else f"{pictures_per_second:.2g}"
