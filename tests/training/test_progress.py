"""Test the speed of an epoch, with a scripted clock."""

from types import SimpleNamespace

import pytest
import torch
from conftest import CPU

from captcha_exp.model.state import EpochProgress
from captcha_exp.model.step import Step
from captcha_exp.runtime import cpu_time
from captcha_exp.runtime.console import ProgressBar
from captcha_exp.runtime.cpu_time import CpuTimes
from captcha_exp.training import progress as progress_module
from captcha_exp.training.progress import EpochMeter

STEP = Step(torch.tensor(1.0), torch.tensor(1), finite=torch.tensor(True), diverged=torch.tensor(False))


class Clock:
    """A clock that the test sets; its laps waited for a core as long as scripted."""

    def __init__(self) -> None:
        self.now = self.lap_start = self.waited = 0.0

    def lap(self) -> CpuTimes:
        lap = CpuTimes(self.now - self.lap_start, 1.0, self.waited, None, None, None)
        self.lap_start, self.waited = self.now, 0.0
        return lap


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(progress_module, "CpuClock", lambda: clock)
    monkeypatch.setattr(cpu_time, "is_disturbed", lambda cores, *_: cores["waited"] > 0.1)
    return clock


def run_steps(meter: EpochMeter, clock: Clock, *seconds: float, waited: float = 0.0) -> None:
    """Train a step of 10 images for each duration."""
    for each in seconds:
        clock.now += each
        clock.waited += waited
        meter.update(STEP, 10)


def test_the_speed_is_the_median_over_chunks(clock: Clock) -> None:
    """Chunks of 0.6 s are trained at 10 images per 0.2 s, and one waits for a core."""
    progress = EpochProgress.zeros(CPU)
    meter = EpochMeter(progress, ProgressBar(), "")
    run_steps(meter, clock, *[0.2] * 6)
    run_steps(meter, clock, 2.0, waited=1.5)
    run_steps(meter, clock, *[0.2] * 3)
    metrics = meter.metrics()
    assert metrics["speed/images_per_second"] == pytest.approx(50.0)
    assert (metrics["speed/cores_waited"], metrics["speed/disturbed"]) == (0.0, 0.0)
    assert progress.seconds == pytest.approx(3.8)
    assert [chunk[0] for chunk in progress.chunks] == [30, 30, 10, 30]


def test_an_epoch_that_waits_is_disturbed(clock: Clock) -> None:
    meter = EpochMeter(EpochProgress.zeros(CPU), ProgressBar(), "")
    run_steps(meter, clock, *[0.6] * 4, waited=0.3)
    assert meter.metrics()["speed/disturbed"] == 1.0


def test_the_rest_of_an_epoch_belongs_to_its_last_chunk(clock: Clock) -> None:
    progress = EpochProgress.zeros(CPU)
    meter = EpochMeter(progress, ProgressBar(), "")
    run_steps(meter, clock, 1.0, 0.1, 0.1)
    assert meter.metrics()["speed/images_per_second"] == pytest.approx(30 / 1.2)
    assert [chunk[:2] for chunk in progress.chunks] == [[30, pytest.approx(1.2)]]


def test_a_short_epoch_is_one_chunk(clock: Clock) -> None:
    meter = EpochMeter(EpochProgress.zeros(CPU), ProgressBar(), "")
    run_steps(meter, clock, 0.1, 0.1)
    assert meter.metrics()["speed/images_per_second"] == pytest.approx(100.0)


def test_the_number_of_chunks_grows_slowly(clock: Clock) -> None:
    """An hour of steps of 0.5 s would be 7,200 chunks, which each checkpoint contains."""
    progress = EpochProgress.zeros(CPU)
    run_steps(EpochMeter(progress, ProgressBar(), ""), clock, *[0.5] * 7200)
    assert 100 < len(progress.chunks) < 400


def test_chunks_before_an_interruption_count(clock: Clock) -> None:
    """Those of a checkpoint are lists. The images after its last chunk were trained in another process."""
    progress = EpochProgress.zeros(CPU)
    run_steps(EpochMeter(progress, ProgressBar(), ""), clock, 0.5, 0.5, 0.1)
    progress.chunks = [list(chunk) for chunk in progress.chunks]
    resumed = EpochMeter(progress, ProgressBar(), "")
    clock.lap()
    run_steps(resumed, clock, 1.0)
    assert [chunk[:2] for chunk in progress.chunks] == [[10, 0.5], [10, 0.5], [10, 1.0]]
    assert resumed.metrics()["speed/images_per_second"] == pytest.approx(20.0)


def test_an_epoch_resumed_after_its_last_step(clock: Clock) -> None:
    progress = EpochProgress.zeros(CPU)
    run_steps(EpochMeter(progress, ProgressBar(), ""), clock, 0.1)
    metrics = EpochMeter(progress, ProgressBar(), "").metrics()
    assert metrics["speed/images_per_second"] == pytest.approx(100.0)
    assert "speed/disturbed" not in metrics
