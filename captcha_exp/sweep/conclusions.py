"""Draw conclusions from the results of a sweep, one line each."""

from collections.abc import Iterable, Sequence

from captcha_exp.sweep.aggregate import BATCH_SIZE, MeanEstimate, SeedGroup, format_job, shorten_keys
from captcha_exp.sweep.results import Outcome

TARGET_FRACTION = 0.95  # of the highest training speed
OUTCOME_PHRASES: dict[Outcome, str] = {
    "finished": "finished",
    "oom": "out of memory",
    "skipped": "skipped",
    "failed": "failed",
    "killed": "killed",
    "not run": "not run",
}


def draw_conclusions(groups: Sequence[SeedGroup], parallelism: int) -> tuple[str, ...]:
    """Return the conclusions, and a caveat if `parallelism` jobs shared the machine."""
    if not _any_finished(groups):
        return (f"no job finished: {count_outcomes(groups)}",)
    lines = []
    if is_batch_size_sweep(groups):
        for name, members in group_by_rest(groups):
            conclusion = _conclude_batch_sizes(members)
            lines.append(f"{name}: {conclusion}" if name else conclusion)
    else:
        lines.append(_conclude_groups(groups))
    if parallelism > 1:
        lines.append(f"{parallelism} jobs ran in parallel: speeds were measured on a shared machine")
    return tuple(lines)


def is_batch_size_sweep(groups: Sequence[SeedGroup]) -> bool:
    """Return whether the batch size was swept and is a number everywhere."""
    return bool(groups) and all(group.batch_size is not None for group in groups)


def group_by_rest(groups: Sequence[SeedGroup]) -> list[tuple[str, list[SeedGroup]]]:
    """Split a sweep of the batch size by the other swept keys; sort each part by batch size."""
    short_keys = shorten_keys(key for group in groups for result in group.results for key in result.swept)
    by_rest: dict[tuple[tuple[str, str], ...], list[SeedGroup]] = {}
    for group in sorted(groups, key=lambda group: group.batch_size or 0):
        rest = tuple((key, value) for key, value in group.swept.items() if key != BATCH_SIZE)
        by_rest.setdefault(rest, []).append(group)
    in_order = sorted(by_rest.items(), key=lambda item: min(group.number for group in item[1]))
    return [(format_job(dict(rest), short_keys), members) for rest, members in in_order]


def count_outcomes(groups: Iterable[SeedGroup]) -> str:
    """Return the number of jobs per outcome, as in "5 jobs (3 finished, 2 failed)"."""
    outcomes = [result.outcome for group in groups for result in group.results]
    if not outcomes:
        return "no jobs"
    counts = [
        f"{outcomes.count(kind):,} {OUTCOME_PHRASES[kind]}" for kind in OUTCOME_PHRASES if kind in outcomes
    ]
    return f"{len(outcomes):,} job{'s' if len(outcomes) > 1 else ''} ({', '.join(counts)})"


def _any_finished(groups: Iterable[SeedGroup]) -> bool:
    return any("finished" in group.outcome_counts for group in groups)


def _conclude_batch_sizes(groups: Sequence[SeedGroup]) -> str:
    """Recommend the smallest batch size that is nearly the fastest, and compare its accuracy to the best."""
    if not _any_finished(groups):
        return f"no job finished: {count_outcomes(groups)}"
    fitting = [group for group in groups if group.is_recommendable]
    timed = [group for group in fitting if "images_per_second" in group.metrics]
    best = _best_group(groups)
    if not timed:
        reason = "no speed was measured for the batch sizes that fit" if fitting else "no batch size fits"
        return f"{reason}{_format_accuracy_note(None, best)}"
    speeds = [group.metrics["images_per_second"].value for group in timed]
    max_speed = max(speeds)
    chosen, speed = next(
        (group, speed)
        for group, speed in zip(timed, speeds, strict=True)
        if speed >= TARGET_FRACTION * max_speed
    )
    has_budget = any(group.fits is not None for group in groups)
    if len(groups) == 1:
        text = f"{'fits and reaches' if has_budget else 'reaches'} {_format_speed(speed)} images/s"
    elif len(fitting) == 1 and has_budget:
        text = f"is the only one that fits ({_format_speed(speed)} images/s)"
    else:
        speed_text = (
            f"{_format_speed(speed)} images/s, the highest"
            if speed == max_speed
            else f"{_format_speed(speed)} of {_format_speed(max_speed)} images/s"
        )
        text = (
            f"is the smallest that {'fits and reaches' if has_budget else 'reaches'} "
            f"{100 * TARGET_FRACTION:.0f} % of the highest speed ({speed_text})"
        )
    return f"batch_size={chosen.batch_size} {text}{_format_accuracy_note(chosen, best)}"


def _format_accuracy_note(chosen: SeedGroup | None, best: SeedGroup | None) -> str:
    """Return the accuracy of the recommended group and the best of all that finished."""
    if best is None:
        return ""
    misfit = _format_misfit(best)
    top = f"{_format_accuracy(best)} (batch_size={best.batch_size}{f', which {misfit}' if misfit else ''})"
    if chosen is None or "val_accuracy" not in chosen.metrics:
        return f"; the best validation accuracy is {top}"
    text = f"; its validation accuracy is {_format_accuracy(chosen)}"
    return f"{text}, the best" if chosen is best else f"{text}, the best is {top}"


def _conclude_groups(groups: Sequence[SeedGroup]) -> str:
    """Name the most accurate group, and say whether its interval is apart from that of the next one."""
    best = _best_group(groups)
    if best is None:
        return f"no validation accuracy to compare: {count_outcomes(groups)}"
    misfit = _format_misfit(best)
    accuracy = f"{_format_accuracy(best)}{f', but it {misfit}' if misfit else ''}"
    if len(groups) == 1:
        return f"the validation accuracy is {accuracy}"
    text = f"{best.name} has the best validation accuracy, {accuracy}"
    second = _best_group([group for group in groups if group is not best])
    if second is None:
        return text
    text += f"; next is {second.name} with {_format_accuracy(second)}"
    upper, lower = best.metrics["val_accuracy"].interval, second.metrics["val_accuracy"].interval
    if upper is None or lower is None:
        return text
    if lower[1] >= upper[0]:
        return f"{text}; the intervals overlap: the difference is not certain"
    return f"{text}; the intervals do not overlap"


def _best_group(groups: Iterable[SeedGroup]) -> SeedGroup | None:
    """Return the group with the best validation accuracy, the first on a tie."""
    known = [group for group in groups if "val_accuracy" in group.metrics]
    return max(known, key=lambda group: group.metrics["val_accuracy"].value, default=None)


def _format_accuracy(group: SeedGroup) -> str:
    mean: MeanEstimate = group.metrics["val_accuracy"]
    if mean.interval is None:
        return f"{mean.value:.2%}"
    low, high = mean.interval
    return f"{mean.value:.2%} (mean of {mean.num_jobs}, 95 % interval {low:.2%} to {high:.2%})"


def _format_misfit(group: SeedGroup) -> str:
    phrases = {"does not fit": "does not fit", "unsure": "may not fit"}
    return phrases.get(group.fits or "", "")


def _format_speed(images_per_second: float) -> str:
    return f"{images_per_second:,.0f}" if images_per_second >= 10 else f"{images_per_second:.2g}"
