"""What a sweep comes to, in sentences."""

from collections.abc import Iterable, Sequence

from captcha_exp.sweep.aggregate import BATCH_SIZE, MeanEstimate, SeedGroup, format_job, shorten_keys
from captcha_exp.sweep.results import Outcome

TARGET_FRACTION = 0.95  # of the most pictures a second
OUTCOME_PHRASES: tuple[tuple[Outcome, str, str], ...] = (
    ("finished", "finished", "finished"),
    ("oom", "ran out of memory", "ran out of memory"),
    ("unfit", "does not fit", "do not fit"),
    ("failed", "failed", "failed"),
    ("killed", "was killed", "were killed"),
    ("not run", "was not run", "were not run"),
)


def draw_conclusions(groups: Sequence[SeedGroup], parallelism: int) -> tuple[str, ...]:
    """What follows from the groups, each on one line; and what to beware of.

    `side_by_side` points ran at a time.
    """
    if not _any_finished(groups):
        return (f"nothing finished: {count_outcomes(groups)}",)
    found = []
    if is_batch_size_sweep(groups):
        for name, members in group_by_rest(groups):
            found.append(
                f"{name}: {_conclude_batch_sizes(members)}" if name else _conclude_batch_sizes(members)
            )
    else:
        found.append(_conclude_groups(groups))
    if parallelism > 1:
        found.append(
            f"{parallelism} points ran at a time: speeds are those of points that shared the machine"
        )
    return tuple(found)


def is_batch_size_sweep(groups: Sequence[SeedGroup]) -> bool:
    """Whether the batch size was swept, by numbers alone."""
    return bool(groups) and all(group.batch_size is not None for group in groups)


def group_by_rest(groups: Sequence[SeedGroup]) -> list[tuple[str, list[SeedGroup]]]:
    """Where batch sizes were swept: by what else was, its groups, the smallest batch first."""
    shorter = shorten_keys(key for group in groups for row in group.results for key in row.swept)
    found: dict[tuple[tuple[str, str], ...], list[SeedGroup]] = {}
    for group in sorted(groups, key=lambda group: group.batch_size or 0):
        others = tuple((key, value) for key, value in group.swept.items() if key != BATCH_SIZE)
        found.setdefault(others, []).append(group)
    in_order = sorted(found.items(), key=lambda item: min(group.number for group in item[1]))
    return [(format_job(dict(others), shorter), members) for others, members in in_order]


def count_outcomes(groups: Iterable[SeedGroup]) -> str:
    """How many points became what, as in of 5 points 3 finished and 2 failed."""
    became = [row.became for group in groups for row in group.results]
    parts = []
    for kind, one, many in OUTCOME_PHRASES:
        if number := became.count(kind):
            parts.append(f"{number:,} {one if number == 1 else many}")
    if len(became) < 2:
        return f"1 point, which {parts[0][2:]}" if parts else "there are no points"
    told = f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]
    return f"of {len(became):,} points {told}"


def _any_finished(groups: Iterable[SeedGroup]) -> bool:
    return any("finished" in group.outcome_counts for group in groups)


def _conclude_batch_sizes(groups: Sequence[SeedGroup]) -> str:
    """The smallest batch that is nearly the fastest, with its accuracy beside the best."""
    if not _any_finished(groups):
        return f"nothing finished: {count_outcomes(groups)}"
    able = [group for group in groups if group.is_recommendable]
    timed = [group for group in able if "images_per_second" in group.metrics]
    best = _best_group(groups)
    if not timed:
        why = "no speed is known of what fits" if able else "no batch size fits"
        return f"{why}{_format_accuracy_note(None, best)}"
    speeds = [group.metrics["images_per_second"].value for group in timed]
    most = max(speeds)
    chosen, speed = next(
        (group, speed) for group, speed in zip(timed, speeds, strict=True) if speed >= TARGET_FRACTION * most
    )
    limited = any(group.fits is not None for group in groups)
    if len(groups) == 1:
        said = f"{'fits and reaches' if limited else 'reaches'} {_format_speed(speed)} pictures/s"
    elif len(able) == 1 and limited:
        said = f"is the only one that fits ({_format_speed(speed)} pictures/s)"
    else:
        rank = "the most itself" if speed == most else f"of {_format_speed(most)}"
        said = (
            f"is the smallest that {'fits and comes' if limited else 'comes'} within 5 % of the most "
            f"pictures/s ({_format_speed(speed)}{', ' if speed == most else ' '}{rank})"
        )
    return f"batch_size={chosen.batch_size} {said}{_format_accuracy_note(chosen, best)}"


def _format_accuracy_note(chosen: SeedGroup | None, best: SeedGroup | None) -> str:
    """The accuracy of what was chosen, and the best of all that finished."""
    if best is None:
        return ""
    room = _format_misfit(best)
    top = f"{_format_accuracy(best)} (batch_size={best.batch_size}{f', which {room}' if room else ''})"
    if chosen is None or "val_accuracy" not in chosen.metrics:
        return f"; the best validation accuracy is {top}"
    said = f"; its validation accuracy is {_format_accuracy(chosen)}"
    return f"{said}, the best" if chosen is best else f"{said}, the best is {top}"


def _conclude_groups(groups: Sequence[SeedGroup]) -> str:
    """Who reads best, and whether that is certain."""
    best = _best_group(groups)
    if best is None:
        return f"there is no validation accuracy to compare: {count_outcomes(groups)}"
    room = _format_misfit(best)
    accuracy = f"{_format_accuracy(best)}{f', but it {room}' if room else ''}"
    if len(groups) == 1:
        return f"the validation accuracy is {accuracy}"
    said = f"{best.name} has the best validation accuracy, {accuracy}"
    second = _best_group([group for group in groups if group is not best])
    if second is None:
        return said
    said += f"; next is {second.name} with {_format_accuracy(second)}"
    upper, lower = best.metrics["val_accuracy"].interval, second.metrics["val_accuracy"].interval
    if upper is None or lower is None:
        return said
    if lower[1] >= upper[0]:
        return f"{said}; the intervals overlap, so that the difference is not certain"
    return f"{said}; the intervals do not overlap"


def _best_group(groups: Iterable[SeedGroup]) -> SeedGroup | None:
    """The group of the best validation accuracy, the first of several."""
    known = [group for group in groups if "val_accuracy" in group.metrics]
    return max(known, key=lambda group: group.metrics["val_accuracy"].value, default=None)


def _format_accuracy(group: SeedGroup) -> str:
    found: MeanEstimate = group.metrics["val_accuracy"]
    if found.interval is None:
        return f"{found.value:.2%}"
    low, high = found.interval
    return f"{found.value:.2%} (mean of {found.points}, 95 % interval {low:.2%} to {high:.2%})"


def _format_misfit(group: SeedGroup) -> str:
    words = {"does not fit": "does not fit", "unsure": "may not fit"}
    return words.get(group.fits or "", "")


def _format_speed(images_per_second: float) -> str:
    return f"{images_per_second:,.0f}" if images_per_second >= 10 else f"{images_per_second:.2g}"
