"""Say in the figures of a benchmark whether other processes used the cores meanwhile.

from interference import interference
...
print(json.dumps({"benchmark": ..., **figures, **interference()}))
"""

from captcha_exp.runtime.cpu_time import CpuClock

MAX_CORES_OF_OTHERS = 0.1  # of undisturbed figures

_CLOCK = CpuClock()


def interference() -> dict[str, float | bool]:
    """Return the mean number of cores that processes other than this one and its children used since the
    import of this module, and whether that disturbs the times in the figures."""
    times = _CLOCK.lap()
    cores = (times.others or 0.0) / times.wall
    return {"cores_of_others": round(cores, 2), "disturbed": cores > MAX_CORES_OF_OTHERS}
