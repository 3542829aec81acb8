"""Test the training speed of a run: only undisturbed epochs are believed."""

import pytest

from captcha_exp.runs import MetricsRow, training_speed


def rows(*epochs: tuple[float, float | None]) -> list[MetricsRow]:
    """Return a row per epoch of (images/s, disturbed), and that of the test."""
    found = []
    for step, (speed, disturbed) in enumerate(epochs, 1):
        verdict = {} if disturbed is None else {"speed/disturbed": disturbed}
        found.append(MetricsRow(step, step, {"speed/images_per_second": speed} | verdict))
    return [*found, MetricsRow(len(found), 9, {"test/accuracy": 0.5})]


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        ([(10, 0), (30, 0), (40, 0)], (35, False)),  # the first epoch includes warm-up
        ([(10, 0)], (10, False)),
        ([(10, 1)], (10, True)),
        ([(10, 0), (30, 1), (40, 1)], (35, True)),
        ([(10, 1), (30, 1), (40, 0), (20, 1)], (40, False)),
        ([(10, None), (30, None)], (30, False)),  # of an earlier version
    ],
)
def test_the_speed_is_the_median_over_the_undisturbed_epochs(
    epochs: list[tuple[float, float | None]], expected: tuple[float, bool]
) -> None:
    assert training_speed(rows(*epochs)) == expected


def test_a_run_without_epochs_has_no_speed() -> None:
    assert training_speed(rows()) is None
