"""Test calibration: temperature, confidence, and the answers at a chosen accuracy."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch

from captcha_exp.config import Config
from captcha_exp.errors import UserError
from captcha_exp.model import calibration, networks
from captcha_exp.model.answer import Reader, ReadingOptions
from captcha_exp.model.confidence import Calibration, operating_points
from captcha_exp.model.heads import EndClassHead, PositionHead


def draw_labels(num_images: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (N, 4, 5), and labels drawn from the probabilities that they give at a temperature."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(num_images, 4, 5, generator=generator)
    probabilities = (logits / temperature).softmax(dim=2).flatten(0, 1)
    return logits, probabilities.multinomial(1, generator=generator).view(num_images, 4)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_the_temperature_of_labels_is_found(temperature: float) -> None:
    logits, labels = draw_labels(4000, temperature)
    head = PositionHead(8, 6, 4, 5)
    assert calibration.fit_temperature(head, logits, labels) == pytest.approx(temperature, rel=0.05)


def test_confidences_of_drawn_labels_are_the_accuracy() -> None:
    logits, labels = draw_labels(20_000, 0.4)
    head = PositionHead(8, 6, 4, 5)
    fitted = calibration.fit(head, logits[:10_000], labels[:10_000])
    decoded = head.decode(logits[10_000:] / fitted.temperature)
    is_correct = (decoded.ids == labels[10_000:]).all(dim=1).numpy()
    confidences = fitted.confidence(decoded.text_confidence.numpy())
    for part in np.array_split(np.argsort(confidences), 10):
        assert confidences[part].mean() == pytest.approx(is_correct[part].mean(), abs=0.05)
    point = fitted.operating_point(0.9)
    assert point is not None
    answered = confidences >= point.threshold
    assert answered.mean() == pytest.approx(point.coverage, abs=0.03)
    assert is_correct[answered].mean() == pytest.approx(0.9, abs=0.03)


def test_an_overconfident_model_becomes_modest() -> None:
    rng = np.random.default_rng(0)
    is_correct = rng.random(4000) < 0.7
    fitted = calibration.fit_confidence(1.0, np.full(4000, 0.999), is_correct)
    assert fitted.confidence([0.999]) == pytest.approx([0.7], abs=0.02)


def test_few_images_without_an_error_change_little() -> None:
    probabilities = np.linspace(0.9, 0.99, 20)
    fitted = calibration.fit_confidence(1.0, probabilities, np.ones(20))
    assert fitted.confidence(probabilities) == pytest.approx(probabilities, abs=0.02)


def test_the_same_data_give_the_same_calibration() -> None:
    logits, labels = draw_labels(500, 0.5)
    head = EndClassHead(8, 6, 4, 4, 2)
    first, second = (calibration.fit(head, logits, labels) for _ in range(2))
    assert first == second


def test_calibrated_outputs_are_those_of_the_formula(tiny: Config) -> None:
    config = tiny
    torch.manual_seed(0)
    model = networks.build(config.model, config.captcha).eval()
    images = torch.randint(0, 256, (3, config.captcha.height, config.captcha.width, config.captcha.channels))
    with torch.inference_mode():
        logits = model(images.to(torch.uint8))
        before = model.decode(logits)
        model.calibration = Calibration(temperature=0.5, slope=1.5, intercept=-0.2, images=10)
        after = model.decode(logits)
    sharp = (2 * logits).softmax(dim=2).max(dim=2)
    assert torch.equal(before.ids, after.ids)
    assert torch.allclose(after.confidences, sharp.values)
    expected = model.calibration.confidence(sharp.values.prod(dim=1).numpy())
    assert after.text_confidence.numpy() == pytest.approx(expected, abs=1e-5)
    assert torch.allclose(model.log_probs(logits), (2 * logits).log_softmax(dim=2))


def test_operating_points_are_means_over_the_most_confident() -> None:
    points = operating_points([0.5, 0.9, 0.7])
    assert [point.threshold for point in points] == [0.9, 0.7, 0.5]
    assert [point.coverage for point in points] == pytest.approx([1 / 3, 2 / 3, 1])
    assert [point.accuracy for point in points] == pytest.approx([0.9, 0.8, 0.7])
    fitted = Calibration(images=30, points=points)
    assert fitted.operating_point(0.8) == points[1]
    assert fitted.operating_point(0.95) is None
    assert fitted.best_accuracy == pytest.approx(0.9)
    few = Calibration(images=3, points=points)
    assert few.operating_point(0.65) == points[2], "one wrong answer in three needs three answers"
    assert few.operating_point(0.7) is None
    assert few.best_accuracy == pytest.approx(2 / 3)
    assert Calibration.from_json(fitted.to_json()) == fitted
    assert len(operating_points(np.linspace(0, 1, 5000))) == 100


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.0},
        {"temperature": math.nan},
        {"slope": "x"},
        {"points": [[1, 2]]},
        {"points": [[1, 2, math.inf]]},
        {"points": 3},
        {"images": None},
    ],
)
def test_damaged_values_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="has a calibration"):
        Calibration.from_json(Calibration().to_json() | change)


# -- reading -------------------------------------------------------------------------------------------------

CALIBRATED = Calibration(images=30, points=operating_points([0.5, 0.9, 0.7]))
LOG_PROBS = np.log([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]])


def read(options: ReadingOptions, calibrated: Calibration = CALIBRATED) -> Any:
    return Reader("position", "abc", 2, 2, calibrated, options).search(LOG_PROBS)


def test_alternatives_are_in_order() -> None:
    answer = read(ReadingOptions(top=3))
    assert [each.text for each in answer.alternatives] == ["ab", "bb", "aa"]
    assert [each.confidence for each in answer.alternatives] == pytest.approx([0.42, 0.21, 0.12])
    assert answer.text == "ab"
    assert answer.to_line() == "ab  42.0%  bb  21.0%  aa  12.0%"
    assert [each["text"] for each in answer.to_json()["alternatives"]] == ["ab", "bb", "aa"]


def test_a_mask_renormalizes() -> None:
    answer = read(ReadingOptions(mask="[bc]a"))
    assert answer.text == "ba"
    assert answer.confidence == pytest.approx(0.3 / 0.4)
    assert answer.confidences == pytest.approx([0.3 / 0.4, 1.0])
    assert answer.alternatives == ()
    assert set(answer.to_json()) == {"text", "confidence", "confidences"}


def test_an_unsure_model_abstains() -> None:
    answer = read(ReadingOptions(min_confidence=0.8, length=2))
    assert (answer.text, answer.abstains) == ("", True)
    assert answer.confidence == pytest.approx(0.42)
    assert answer.alternatives[0].text == "ab"
    assert answer.to_line() == "abstains  (ab  42.0%)"
    assert answer.to_json()["abstains"] is True
    assert not read(ReadingOptions(min_confidence=0.8, mask="ab")).abstains


def test_a_model_abstains_where_it_is_sure_that_a_mask_does_not_hold() -> None:
    """The texts of this mask have a probability of 0.01, and the only one of them is sure."""
    excluded = read(ReadingOptions(min_confidence=0.8, mask="cc"))
    assert excluded.abstains
    assert excluded.confidence == pytest.approx(1.0, abs=1e-5)
    assert read(ReadingOptions(mask="cc")).text == "cc"


def test_an_image_less_certain_than_all_of_the_validation_is_not_answered() -> None:
    calibrated = Calibration(images=30, points=operating_points([0.9, 0.95, 0.99]))
    assert calibrated.operating_point(0.9) == calibrated.points[-1]
    assert read(ReadingOptions(min_confidence=0.9, top=2), calibrated).abstains


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ReadingOptions(length=3), "--length 3: the model predicts texts of 2 characters"),
        (ReadingOptions(top=0), "--top 0: use 1 to 100"),
        (ReadingOptions(top=101), "--top 101: use 1 to 100"),
        (
            ReadingOptions(min_confidence=99.0),
            "--min-confidence 99.0: use a fraction between 0 and 1, as in 0.99",
        ),
        (ReadingOptions(min_confidence=math.nan), "--min-confidence nan: use a fraction"),
        (
            ReadingOptions(min_confidence=0.95),
            "--min-confidence 0.95: the 30 images of the validation split do not support this; use at most "
            "0.9000",
        ),
        (ReadingOptions(mask="aaa"), "--mask aaa: allows no text of 2 characters, which the model predicts"),
    ],
)
def test_what_a_model_cannot_do_is_refused(options: ReadingOptions, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        read(options)


def test_a_model_that_is_not_calibrated_cannot_promise() -> None:
    with pytest.raises(UserError, match="the confidences of this model are not calibrated; train it"):
        read(ReadingOptions(min_confidence=0.9), Calibration())
