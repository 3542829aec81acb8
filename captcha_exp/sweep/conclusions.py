"""Draw conclusions from the results of a sweep, one line each."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import get_args

from captcha_exp.sweep import aggregate
from captcha_exp.sweep.aggregate import BATCH_SIZE, SeedGroup, format_number
from captcha_exp.sweep.record import shorten_keys
from captcha_exp.sweep.results import JobResult, Outcome

TARGET_FRACTION = 0.95  # of the highest training speed
MAX_NAMED_JOBS = 10  # in a line


def draw_conclusions(groups: Sequence[SeedGroup], parallelism: int) -> tuple[str, ...]:
    """Return the conclusions, and a caveat if `parallelism` jobs shared the machine."""
    if not _any_finished(groups):
        return (_describe_nothing(groups),)
    lines = []
    if is_batch_size_sweep(groups):
        for name, members in group_by_rest(groups):
            conclusion = _conclude_batch_sizes(members)
            lines.append(f"{name}: {conclusion}" if name else conclusion)
    else:
        lines.append(_conclude_groups(groups))
    if disturbed := [job for group in groups for job in group.finished if job.disturbed]:
        lines.append(_describe_disturbed(disturbed))
    if parallelism > 1:
        lines.append(f"{parallelism} jobs ran in parallel: speeds were measured on a shared machine")
    return tuple(lines)


def is_batch_size_sweep(groups: Sequence[SeedGroup]) -> bool:
    """Return whether the batch size was swept and is a number everywhere."""
    return all(group.batch_size is not None for group in groups)


def group_by_rest(groups: Sequence[SeedGroup]) -> list[tuple[str, list[SeedGroup]]]:
    """Split a sweep of the batch size by the other swept keys; sort each part by batch size."""
    keys = aggregate.swept_keys(result for group in groups for result in group.results)
    short_keys = shorten_keys(keys)
    return [
        (aggregate.format_job(rest, short_keys), sorted(members, key=lambda group: group.batch_size or 0))
        for rest, members in aggregate.group_by_swept(groups, (BATCH_SIZE,))
    ]


def count_outcomes(groups: Iterable[SeedGroup]) -> str:
    """Return the number of jobs per outcome, as in "5 jobs (3 finished, 2 failed)"."""
    counts = Counter(result.outcome for group in groups for result in group.results)
    phrases = {"oom": "out of memory"}
    parts = [f"{counts[kind]:,} {phrases.get(kind, kind)}" for kind in get_args(Outcome) if kind in counts]
    return f"{counts.total():,} job{'s' if counts.total() > 1 else ''} ({', '.join(parts)})"


def _any_finished(groups: Iterable[SeedGroup]) -> bool:
    return any("finished" in group.outcome_counts for group in groups)


def _describe_nothing(groups: Sequence[SeedGroup]) -> str:
    """Say that no job has finished, and what to do if all were skipped because of the memory budget."""
    skipped = all(result.outcome == "skipped" for group in groups for result in group.results)
    hint = (
        "; without a CUDA GPU, sweep.run_over_budget=true trains them, and gpu=NAME narrows the prediction"
        if skipped
        else ""
    )
    return f"no job finished: {count_outcomes(groups)}{hint}"


def _describe_disturbed(jobs: Sequence[JobResult]) -> str:
    """Name the jobs whose speed proves nothing, and say how to measure it again."""
    names = ", ".join(job.name for job in jobs[:MAX_NAMED_JOBS])
    more = f" and {len(jobs) - MAX_NAMED_JOBS:,} more" if len(jobs) > MAX_NAMED_JOBS else ""
    return (
        f"speeds disturbed by other processes, which took cores that the training asked for: {names}{more}; "
        "the same command with --rerun-disturbed trains these jobs again"
    )


def _conclude_batch_sizes(groups: Sequence[SeedGroup]) -> str:
    """Recommend the smallest batch size that is nearly the fastest, and compare its accuracy to the best."""
    if not _any_finished(groups):
        return _describe_nothing(groups)
    fitting = [group for group in groups if group.is_recommendable]
    speeds = [
        (group, group.metrics["images_per_second"].value)
        for group in fitting
        if "images_per_second" in group.metrics
    ]
    best = _best_group(groups)
    if not speeds:
        reason = "no speed was measured for the batch sizes that fit" if fitting else "no batch size fits"
        return f"{reason}{_format_accuracy_note(None, best)}"
    has_budget = any(group.fits is not None for group in groups)
    if any(group.is_disturbed for group, _ in speeds):
        reason = "no batch size is recommended, because speeds were disturbed"
        if len(fitting) == 1 and has_budget:
            reason = f"batch_size={fitting[0].batch_size} is the only one that fits"
        return f"{reason}{_format_accuracy_note(None, best)}"
    max_speed = max(speed for _, speed in speeds)
    chosen, speed = next((group, speed) for group, speed in speeds if speed >= TARGET_FRACTION * max_speed)
    reaches = "fits and reaches" if has_budget else "reaches"
    if len(groups) == 1:
        text = f"{reaches} {format_number(speed)} images/s"
    elif len(fitting) == 1 and has_budget:
        text = f"is the only one that fits ({format_number(speed)} images/s)"
    else:
        of_max = f" of {format_number(max_speed)} images/s" if speed < max_speed else " images/s, the highest"
        text = (
            f"is the smallest that {reaches} {100 * TARGET_FRACTION:.0f} % of the highest speed "
            f"({format_number(speed)}{of_max})"
        )
    return f"batch_size={chosen.batch_size} {text}{_format_accuracy_note(chosen, best)}"


def _format_accuracy_note(chosen: SeedGroup | None, best: SeedGroup | None) -> str:
    """Return the accuracy of the recommended group and the best of all that finished."""
    if best is None:
        return ""
    top = f"{_format_accuracy(best)} (batch_size={best.batch_size}{_format_misfit(best, ', which ')})"
    if chosen is None or "val_accuracy" not in chosen.metrics:
        return f"; the best validation accuracy is {top}"
    text = f"; its validation accuracy is {_format_accuracy(chosen)}"
    return f"{text}, the best" if chosen is best else f"{text}, the best is {top}"


def _conclude_groups(groups: Sequence[SeedGroup]) -> str:
    """Name the most accurate group, and say whether its interval is apart from that of the next one."""
    best = _best_group(groups)
    if best is None:
        return f"no validation accuracy to compare: {count_outcomes(groups)}"
    accuracy = f"{_format_accuracy(best)}{_format_misfit(best, ', but it ')}"
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
    mean = group.metrics["val_accuracy"]
    if mean.interval is None:
        return f"{mean.value:.2%}"
    low, high = mean.interval
    return f"{mean.value:.2%} (mean of {mean.num_jobs}, 95 % interval {low:.2%} to {high:.2%})"


def _format_misfit(group: SeedGroup, prefix: str) -> str:
    phrase = {"does not fit": "does not fit", "unsure": "may not fit"}.get(group.fits or "")
    return f"{prefix}{phrase}" if phrase else ""
