"""The CPU time that this process gets, and whether it got the cores that it asked for.

A speed says something about a config only if it was not disturbed: each thread had a core of its own. CPU
time alone does not show that, because OpenMP threads that wait for one another spin. Linux also counts how
long a thread was ready to run but had no core; other systems count only the CPU time of other processes.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import psutil
import torch

from captcha_exp.runtime import device as devices

MAX_CORES_WAITED = 0.1
"""Mean number of cores that the threads of an undisturbed process wait for. Two threads on two cores that
nothing else could take (real-time priority) waited for less than 0.01; where the kernel kept 0.17 cores from
them, a training was 5 to 8 % slower. One busy process takes 0.67 (three threads share two cores)."""
MAX_CORES_CONTENDED = 0.5
"""Mean number of cores used by others of those that an undisturbed process asked for. Finds a busy process on
the second hyper-thread of a core, for which no thread waits; background processes use less."""
MIN_SECONDS = 0.2  # of an interval: some counters are in ticks of 10 ms
MAX_TRIES = 3  # of a measurement that was disturbed

T = TypeVar("T")


class CpuTimes(NamedTuple):
    """Seconds in an interval; None if the system does not count them, or the interval is too short."""

    wall: float
    used: float
    """CPU time of this process, all threads together"""
    waited: float | None
    """threads of this process were ready to run but had no core, all together"""
    stolen: float | None
    """the hypervisor ran something else on the cores that this process may use"""
    others: float | None
    """CPU time of other processes on these cores, including what was stolen"""
    pressure: float | None
    """some thread of the machine was ready to run but had no core"""

    def __add__(self, more: "CpuTimes") -> "CpuTimes":  # type: ignore[override]  # not a longer tuple
        """Return the times in two intervals together."""
        pairs = zip(self, more, strict=True)
        seconds = [None if one is None or other is None else one + other for one, other in pairs]
        return CpuTimes(*seconds)  # type: ignore[arg-type]  # wall and used are never None


class CpuClock:
    """A stopwatch for wall and CPU time."""

    def __init__(self) -> None:
        self._last = _read_counters()

    def lap(self) -> CpuTimes:
        """Return the times since the previous call, or since the start."""
        start, self._last = self._last, _read_counters()
        return _times_between(start, self._last)


def cores_metrics(intervals: Sequence[CpuTimes], device: torch.device) -> dict[str, float]:
    """Return the medians over the intervals, in cores, and whether a speed measured in them is disturbed.

    A training on a GPU needs a core for the main thread only.
    """
    cores: dict[str, float] = {}
    for name in CpuTimes._fields[1:]:
        known = [value / each.wall for each in intervals if (value := getattr(each, name)) is not None]
        if known and not (name == "others" and devices.cpu_quota() is not None):  # cores shared by design
            cores[name] = statistics.median(known)
    num_threads = torch.get_num_threads() if device.type == "cpu" else 1
    disturbed = is_disturbed(cores, num_threads, devices.num_physical_cores())
    metrics = {f"speed/cores_{name}": value for name, value in cores.items() if name != "pressure"}
    if "pressure" in cores:
        metrics["speed/cpu_pressure"] = cores["pressure"]
    return metrics | {"speed/disturbed": float(disturbed)}


def is_disturbed(cores: Mapping[str, float], num_threads: int, num_cores: int) -> bool:
    """Return whether a process with these cores, by field of `CpuTimes`, lacked some that it asked for.

    Threads in excess of the cores of the machine wait for each other: that is not a disturbance.
    """
    used, others = cores["used"], cores.get("others", 0.0)
    stolen = cores.get("stolen", 0.0) * used / (used + others) if used else 0.0  # its share
    waited = cores.get("waited", 0.0) + stolen - max(0, num_threads - num_cores)
    contended = others - max(0, num_cores - num_threads)
    return waited > MAX_CORES_WAITED or contended > MAX_CORES_CONTENDED


def measure_undisturbed(measure: Callable[[], T], device: torch.device) -> tuple[T, bool]:
    """Return the result of `measure`, and whether it is disturbed; repeat it a few times if it is."""
    for _ in range(MAX_TRIES):
        clock = CpuClock()
        result = measure()
        if not cores_metrics([clock.lap()], device)["speed/disturbed"]:
            return result, False
    return result, True


# -- the counters of the system ------------------------------------------------------------------------------


class _Counters(NamedTuple):
    """Seconds since some time in the past."""

    wall: float
    used: float
    used_by_children: float
    """by those that have exited"""
    waited: Mapping[str, float]
    """thread -> its seconds"""
    idle: float
    stolen: float | None
    pressure: float | None
    num_cpus: int


def _read_counters() -> _Counters:
    cpus, times = psutil.cpu_times(percpu=True), os.times()
    if sys.platform == "linux":
        cpus = [cpus[number] for number in os.sched_getaffinity(0) if number < len(cpus)] or cpus
    return _Counters(
        wall=time.perf_counter(),
        used=time.process_time(),
        used_by_children=times.children_user + times.children_system,
        waited=_read_waited(),
        idle=sum(cpu.idle + getattr(cpu, "iowait", 0.0) for cpu in cpus),
        stolen=sum(cpu.steal for cpu in cpus) if hasattr(cpus[0], "steal") else None,
        pressure=_read_pressure(),
        num_cpus=len(cpus),
    )


def _times_between(start: _Counters, end: _Counters) -> CpuTimes:
    wall, used = end.wall - start.wall, end.used - start.used
    waited = sum(seconds - start.waited.get(thread, 0.0) for thread, seconds in end.waited.items())
    stolen = others = None
    if wall >= MIN_SECONDS:
        if start.stolen is not None and end.stolen is not None:
            stolen = max(0.0, end.stolen - start.stolen)
        busy = end.num_cpus * wall - (end.idle - start.idle)
        others = max(0.0, busy - used - (end.used_by_children - start.used_by_children))
    pressure = None if start.pressure is None or end.pressure is None else end.pressure - start.pressure
    return CpuTimes(wall, used, waited if end.waited else None, stolen, others, pressure)


def _read_waited() -> dict[str, float]:
    """Return the seconds that each thread waited for a core; empty where the kernel does not count them."""
    seconds = {}
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            seconds[path.parent.name] = int(path.read_text().split()[1]) / 1e9
        except OSError:  # the thread has exited
            continue
    return seconds


def _read_pressure() -> float | None:
    try:
        some = Path("/proc/pressure/cpu").read_text().splitlines()[0]
    except OSError:
        return None
    return int(some.rpartition("total=")[2]) / 1e6
