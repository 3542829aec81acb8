"""Say in the figures of a benchmark whether other processes used the cores meanwhile.

from interference import interference
...
print(json.dumps({"benchmark": ..., **figures, **interference()}))

A benchmark with a goal prints `conclude(figure, at_least=...)` instead: a disturbed figure meets no goal and
misses none.
"""

import sys

from captcha_exp.runtime.cpu_time import CpuClock

MAX_CORES_OF_OTHERS = 0.1  # of undisturbed figures

_CLOCK = CpuClock()
_LAPS: list[tuple[float, float]] = []  # wall seconds and CPU seconds of others, up to each call


def interference() -> dict[str, float | bool]:
    """Return the mean number of cores that processes other than this one and its children used since the
    import of this module, and whether that disturbs the times in the figures."""
    times = _CLOCK.lap()
    _LAPS.append((times.wall, times.others or 0.0))
    wall, others = (sum(values) for values in zip(*_LAPS, strict=True))
    cores = others / wall
    return {"cores_of_others": round(cores, 2), "disturbed": cores > MAX_CORES_OF_OTHERS}


def conclude(
    figure: float, *, at_least: float | None = None, at_most: float | None = None
) -> dict[str, object]:
    """Return the goal of a figure, whether it is met, and `interference()`.

    Without a goal, and on a disturbed machine, `met` is None.
    """
    machine = interference()
    limits = [
        (name, limit) for name, limit in (("at least", at_least), ("at most", at_most)) if limit is not None
    ]
    if not limits:
        return {"goal": None, "met": None, **machine}
    met = all(figure >= limit if name == "at least" else figure <= limit for name, limit in limits)
    if machine["disturbed"]:
        print(
            f"no conclusion: other processes used {machine['cores_of_others']} cores, at most "
            f"{MAX_CORES_OF_OTHERS} are allowed; repeat this on an idle machine",
            file=sys.stderr,
        )
    goal = " and ".join(f"{name} {limit:g}" for name, limit in limits)
    return {"goal": goal, "met": None if machine["disturbed"] else met, **machine}


def exit_code(*conclusions: dict[str, object]) -> int:
    """Return 1 if a goal is missed, else 3 if one has no conclusion, else 0."""
    met = [each["met"] for each in conclusions if each["goal"] is not None]
    return 1 if False in met else 3 if None in met else 0
