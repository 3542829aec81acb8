"""Test when a speed counts as disturbed. No test needs an idle machine or depends on a clock."""

import threading
from collections.abc import Iterator

import pytest
import torch
from conftest import CPU

from captcha_exp.runtime import cpu_time, device
from captcha_exp.runtime.cpu_time import (
    MAX_TRIES,
    CpuClock,
    CpuTimes,
    cores_metrics,
    is_disturbed,  # the original: a fixture replaces the attribute of the module
    measure_undisturbed,
)

ALONE = {"used": 1.99, "waited": 0.004, "stolen": 0.0, "others": 0.01}
NEXT_TO_ONE = {"used": 1.33, "waited": 0.66, "stolen": 0.0, "others": 0.66}
"""figures of two threads on two cores, without and with one busy process; see `is_disturbed`"""


@pytest.mark.parametrize(
    ("cores", "threads", "num_cores", "expected"),
    [
        (ALONE, 2, 2, False),
        (NEXT_TO_ONE, 2, 2, True),
        ({"used": 1.99, "waited": 0.1}, 2, 2, False),
        ({"used": 1.99, "waited": 0.11}, 2, 2, True),
        ({"used": 1.0, "waited": 0.02, "others": 1.0}, 1, 2, False),  # a job in parallel, or any process
        ({"used": 2.0, "waited": 0.05, "others": 2.02}, 2, 4, False),
        ({"used": 1.0, "waited": 0.9, "others": 1.1}, 1, 2, True),
        ({"used": 3.9, "waited": 0.0, "others": 0.9}, 4, 4, True),  # on the hyper-thread of a core
        ({"used": 3.9, "waited": 0.0, "others": 0.4}, 4, 4, False),  # a desktop in the background
        ({"used": 2.0, "waited": 2.01}, 4, 2, False),  # more threads than cores wait for each other
        ({"used": 1.4, "waited": 2.6}, 4, 2, True),
        ({"used": 1.8, "waited": 0.0, "stolen": 0.2, "others": 0.2}, 2, 2, True),  # by the hypervisor
        ({"used": 1.0, "waited": 0.0, "stolen": 0.4, "others": 7.0}, 1, 8, False),  # mostly from others
        ({"used": 1.9, "others": 0.4}, 2, 2, False),  # not Linux
        ({"used": 1.3, "others": 0.7}, 2, 2, True),
        ({"used": 0.0}, 1, 1, False),
    ],
)
def test_a_process_that_lacks_cores_is_disturbed(
    cores: dict[str, float], threads: int, num_cores: int, expected: bool
) -> None:
    assert is_disturbed(cores, threads, num_cores) is expected


def times(wall: float = 1.0, waited: float | None = 0.0, others: float | None = 0.0) -> CpuTimes:
    return CpuTimes(wall, 2 * wall, waited, 0.0, others, None)


def test_the_metrics_are_medians_in_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short interruption does not change them; a time that is not known is left out."""
    monkeypatch.setattr(device, "cpu_quota", lambda: None)
    intervals = [times(2.0, 0.04), times(0.5, 0.05, None), times(1.0, 0.9, 0.8), times(1.0, 0.0), times()]
    assert cores_metrics(intervals, CPU) == pytest.approx(
        {
            "speed/cores_used": 2.0,
            "speed/cores_waited": 0.02,
            "speed/cores_stolen": 0.0,
            "speed/cores_others": 0.0,
            "speed/disturbed": 0.0,
        }
    )


def test_disturbed_depends_on_threads_device_and_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    def record(*arguments: object) -> bool:
        calls.append(arguments)
        return True

    monkeypatch.setattr(cpu_time, "is_disturbed", record)
    monkeypatch.setattr(device, "num_physical_cores", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(device, "cpu_quota", lambda: None)
    assert cores_metrics([times()], CPU)["speed/disturbed"] == 1.0
    cores_metrics([times()], torch.device("cuda"))
    monkeypatch.setattr(device, "cpu_quota", lambda: 4.0)
    metrics = cores_metrics([times()], CPU)
    known = {"used": 2.0, "waited": 0.0, "stolen": 0.0}
    assert calls == [(known | {"others": 0.0}, 6, 8), (known | {"others": 0.0}, 1, 8), (known, 6, 8)]
    assert "speed/cores_others" not in metrics


def counters(**values: object) -> cpu_time._Counters:
    start = {"wall": 10.0, "used": 5.0, "used_by_children": 1.0, "waited": {"1": 0.5, "2": 0.25}}
    system = {"idle": 100.0, "stolen": 3.0, "pressure": 7.0, "num_cpus": 2}
    return cpu_time._Counters(**(start | system | values))  # type: ignore[arg-type]  # as the test needs


def test_times_between_two_readings_of_the_counters() -> None:
    """Thread 2 has exited and thread 3 is new. Of 8 s on two CPUs, 2 were idle, 1 used and 4 by a child."""
    end = counters(
        wall=14.0,
        used=6.0,
        used_by_children=5.0,
        waited={"1": 0.75, "3": 0.5},
        idle=102.0,
        stolen=3.5,
        pressure=9.0,
    )
    assert cpu_time._times_between(counters(), end) == CpuTimes(4.0, 1.0, 0.75, 0.5, 1.0, 2.0)


def test_counters_in_ticks_are_not_used_for_short_intervals() -> None:
    end = counters(wall=10.1, used=5.1)
    assert cpu_time._times_between(counters(), end)[3:5] == (None, None)


def test_a_system_without_counters() -> None:
    start = counters(waited={}, stolen=None, pressure=None)
    end = counters(wall=11.0, used=6.0, waited={}, stolen=None, pressure=None, idle=100.5)
    assert cpu_time._times_between(start, end) == CpuTimes(1.0, 1.0, None, None, 0.5, None)
    assert cores_metrics([CpuTimes(1.0, 1.0, None, None, None, None)], CPU) == {
        "speed/cores_used": 1.0,
        "speed/disturbed": 0.0,
    }


def test_intervals_are_added() -> None:
    assert times(1.0, 0.5) + times(2.0, None) == CpuTimes(3.0, 6.0, None, 0.0, 0.0, None)


def test_the_counters_of_this_system_grow() -> None:
    clock = CpuClock()
    thread = threading.Thread(target=lambda: sum(range(100_000)))
    thread.start()
    thread.join()
    lap = clock.lap()
    assert lap.wall > 0
    assert lap.used > 0
    assert all(seconds is None or seconds >= 0 for seconds in lap)


def test_a_disturbed_measurement_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(disturbed: list[bool]) -> tuple[int, bool]:
        verdicts: Iterator[bool] = iter(disturbed)
        monkeypatch.setattr(cpu_time, "is_disturbed", lambda *_: next(verdicts))
        results = iter(range(9))
        return measure_undisturbed(lambda: next(results), CPU)

    assert measure([False]) == (0, False)
    assert measure([True, False]) == (1, False)
    assert measure([True] * MAX_TRIES) == (MAX_TRIES - 1, True)
