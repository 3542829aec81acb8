"""Confidences and how far they can be trusted, compared with loops over the images."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captcha_exp.report.reliability import (
    at_coverage,
    coverage_curve,
    reliability_bins,
)

ANSWERS = st.lists(
    st.tuples(st.one_of(st.floats(0, 1), st.integers(0, 10).map(lambda n: n / 10)), st.booleans()), min_size=1
)


def split(answers: list[tuple[float, bool]]) -> tuple[np.ndarray, np.ndarray]:
    confidences, correct = zip(*answers, strict=True)
    return np.array(confidences, np.float64), np.array(correct, bool)


@given(answers=ANSWERS)
def test_each_image_is_in_the_bin_of_its_confidence(answers: list[tuple[float, bool]]) -> None:
    bins = reliability_bins(*split(answers))
    assert sum(each.num_images for each in bins) == len(answers)
    for each in bins:
        inside = [
            (confidence, correct)
            for confidence, correct in answers
            if np.ceil(confidence * 10) == round(each.high * 10) or (confidence == 0 and each.low == 0)
        ]
        assert each.num_images == len(inside)
        assert each.num_correct == sum(correct for _, correct in inside)
        assert each.mean_confidence == pytest.approx(np.mean([c for c, _ in inside]))
        assert each.interval[0] <= each.accuracy <= each.interval[1]


@given(answers=ANSWERS)
def test_a_point_of_the_curve_has_the_images_at_its_threshold_or_above(
    answers: list[tuple[float, bool]],
) -> None:
    curve = coverage_curve(*split(answers))
    assert [point.threshold for point in curve] == sorted({c for c, _ in answers}, reverse=True)
    for point in curve:
        answered = [correct for confidence, correct in answers if confidence >= point.threshold]
        assert (point.num_answered, point.num_correct) == (len(answered), sum(answered))
        assert point.coverage == len(answered) / len(answers)
        assert point.accuracy == sum(answered) / len(answered)
    assert curve[-1].coverage == 1


def test_the_point_at_a_coverage() -> None:
    curve = coverage_curve(np.array([0.9, 0.8, 0.8, 0.1]), np.array([True, False, True, False]))
    found = {coverage: at_coverage(curve, coverage) for coverage in (1.0, 0.9, 0.75, 0.7, 0.1)}
    assert [point and point.threshold for point in found.values()] == [0.1, 0.8, 0.8, 0.9, None]


def test_a_model_that_has_diverged_has_confidence_0() -> None:
    confidences = np.array([np.nan, 0.5, 1.0000001], np.float32)
    (low, _, high) = reliability_bins(confidences, np.array([False, True, True]))
    assert (low.num_images, low.mean_confidence, high.mean_confidence) == (1, 0.0, 1.0)
