"""Evaluation metrics compared with slow loops, and the interval with the test that it inverts."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from captcha_exp.cli import output
from captcha_exp.config import Config
from captcha_exp.data.alphabet import END, Alphabet
from captcha_exp.data.dataset import Dataset, Split
from captcha_exp.model import networks
from captcha_exp.model.alignment import align
from captcha_exp.model.confidence import Calibration, OperatingPoint
from captcha_exp.model.evaluate import Evaluation, evaluate
from captcha_exp.model.heads import PositionHead
from captcha_exp.model.networks import Recognizer
from captcha_exp.model.proportions import wilson_interval

pytestmark = pytest.mark.usefixtures("one_thread")

ALPHABET = Alphabet("bac")  # not sorted

Texts = list[list[int]]


def dataset_with(alphabet: str) -> Dataset:
    """Return a dataset that has only an alphabet; the names of its images are their indices."""
    empty = torch.empty(0)
    provenance = {"captcha": {"alphabet": alphabet}}
    return Dataset(empty, empty, [], {}, {"provenance": provenance, "files": [], "folders": []})


def evaluation(targets: Texts, predicted: Texts) -> Evaluation:
    return Evaluation(
        loss=0.5,
        predicted=np.array(predicted),
        targets=np.array(targets),
        confidences=np.ones((len(targets), len(targets[0])), np.float32),
        text_confidences=np.ones(len(targets), np.float32),
        indices=np.arange(len(targets)),
    )


@st.composite
def predictions(draw: st.DrawFn) -> tuple[Texts, Texts]:
    """Draw (targets, predicted) of 1 to 12 images with 1 to 4 characters of three classes."""
    count, length = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    text = st.lists(st.integers(0, 2), min_size=length, max_size=length)
    texts = st.lists(text, min_size=count, max_size=count)
    targets = draw(texts)
    predicted = [draw(st.one_of(st.just(target), text)) for target in targets]
    return targets, predicted


# -- metrics -------------------------------------------------------------------------------------------------


@given(predictions())
def test_accuracies_equal_a_slow_count(texts: tuple[Texts, Texts]) -> None:
    targets, predicted = texts
    result = evaluation(targets, predicted)
    count, length = len(targets), len(targets[0])
    correct = sum(t == p for t, p in zip(targets, predicted, strict=True))
    assert result.num_correct == correct
    assert result.accuracy == pytest.approx(correct / count)
    assert result.accuracy_interval == wilson_interval(correct, count)
    by_position = [sum(targets[n][t] == predicted[n][t] for n in range(count)) for t in range(length)]
    assert result.accuracy_by_position() == pytest.approx([n / count for n in by_position])
    assert result.char_accuracy == pytest.approx(sum(by_position) / (count * length))
    assert result.metrics("val") == {
        "val/loss": 0.5,
        "val/accuracy": result.accuracy,
        "val/char_accuracy": result.char_accuracy,
    }


@given(predictions())
def test_character_counts_equal_a_slow_count(texts: tuple[Texts, Texts]) -> None:
    targets, predicted = texts
    result = evaluation(targets, predicted)
    pairs = [(t, p) for ts, ps in zip(targets, predicted, strict=True) for t, p in zip(ts, ps, strict=True)]
    assert result.confusion_matrix(range(3)).tolist() == [
        [pairs.count((t, p)) for p in range(3)] for t in range(3)
    ]
    for k, character in enumerate("bac"):
        occurs = [p for t, p in pairs if t == k]
        accuracy = result.accuracy_by_character(ALPHABET)[character]
        assert accuracy == (pytest.approx(occurs.count(k) / len(occurs)) if occurs else None)
    errors = {("bac"[t], "bac"[p], pairs.count((t, p))) for t, p in pairs if t != p}
    assert set(result.confused_pairs(ALPHABET)) == errors
    assert len(result.confused_pairs(ALPHABET)) == len(errors)


@given(predictions())
def test_chance_is_the_accuracy_of_the_best_constant_text(texts: tuple[Texts, Texts]) -> None:
    targets, _ = texts
    best = sum(max(sum(text[t] == k for text in targets) for k in range(3)) for t in range(len(targets[0])))
    assert evaluation(targets, targets).chance_char_accuracy() == pytest.approx(
        best / (len(targets) * len(targets[0]))
    )


@given(predictions())
def test_the_summary_is_json(texts: tuple[Texts, Texts]) -> None:
    output = evaluation(*texts).to_json(dataset_with("bac"))
    assert json.loads(json.dumps(output, allow_nan=False)) == output
    assert output["images"] == len(texts[0])
    assert output["accuracy_low"] <= output["accuracy"] <= output["accuracy_high"]


def test_rows_of_the_confusion_matrix_are_labels_and_columns_predictions() -> None:
    result = evaluation([[0, 1], [0, 2]], [[2, 1], [2, 2]])
    assert result.confusion_matrix(range(3)).tolist() == [[0, 0, 2], [0, 1, 0], [0, 0, 1]]
    assert result.confused_pairs(ALPHABET) == [("b", "c", 2)]


def test_confusions_are_sorted_by_count_then_by_character() -> None:
    result = evaluation([[0, 0, 1, 2, 2, 2]], [[1, 2, 2, 1, 0, 0]])
    assert result.confused_pairs(ALPHABET) == [
        ("c", "b", 2),
        ("a", "c", 1),
        ("b", "a", 1),
        ("b", "c", 1),
        ("c", "a", 1),
    ]


def test_the_summary_has_the_20_most_frequent_confusions() -> None:
    alphabet = Alphabet("abcdefgh")
    pairs = [(t, p) for t in range(8) for p in range(8) if t != p]
    result = evaluation([[t] for t, _ in pairs], [[p] for _, p in pairs])
    assert len(result.confused_pairs(alphabet)) == 56
    output = result.to_json(dataset_with("abcdefgh"))
    assert len(output["confusions"]) == 20
    assert output["confusions"][0] == {"label": "a", "predicted": "b", "count": 1}


@st.composite
def predictions_of_any_length(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    """Draw (labels, predicted texts) of 1 to 12 images with 1 to 4 characters of three."""
    text = st.text("bac", min_size=1, max_size=4)
    labels = draw(st.lists(text, min_size=1, max_size=12))
    return labels, [draw(st.one_of(st.just(label), text)) for label in labels]


def evaluation_of(labels: Sequence[str], predicted: Sequence[str]) -> Evaluation:
    longest = max(map(len, [*labels, *predicted]))
    return evaluation(*([ALPHABET.encode_padded(t, longest) for t in texts] for texts in (labels, predicted)))


@given(predictions_of_any_length())
def test_texts_of_any_length_equal_a_slow_count(texts: tuple[list[str], list[str]]) -> None:
    labels, predicted = texts
    result = evaluation_of(labels, predicted)
    pairs = list(zip(labels, predicted, strict=True))
    assert result.num_correct == sum(t == p for t, p in pairs)
    assert result.num_chars == sum(map(len, labels))
    for n, (count, accuracy) in result.accuracy_by_length().items():
        assert count == sum(len(t) == n for t in labels)
        assert accuracy == pytest.approx(np.mean([t == p for t, p in pairs if len(t) == n]))
    assert set(result.accuracy_by_length()) == set(map(len, labels))
    for found, step in ((result.accuracy_by_position(), 1), (result.accuracy_from_end(), -1)):
        expected = []
        for n in range(max(map(len, labels))):
            having = [(t[::step], p[::step]) for t, p in pairs if len(t) > n]
            expected.append(np.mean([n < len(p) and t[n] == p[n] for t, p in having]))
        assert found == pytest.approx(expected)
    aligned = [
        (t, p) for label, text in pairs for t, p in align(ALPHABET.encode(label), ALPHABET.encode(text))
    ]
    assert Counter(map(tuple, result.char_pairs.T.tolist())) == Counter(aligned)
    assert result.num_wrong_chars == sum(t != p for t, p in aligned)
    assert result.char_accuracy == pytest.approx(sum(t == p for t, p in aligned) / result.num_chars)
    assert all(0 <= (share or 0) <= 1 for share in result.accuracy_by_character(ALPHABET).values())
    json.dumps(result.to_json(dataset_with("bac")), allow_nan=False)


def test_missing_and_added_characters_are_confusions(capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluation_of(["abc", "bb", "ca"], ["ac", "bbb", "ca"])
    assert result.confused_pairs(ALPHABET) == [("", "b", 1), ("b", "", 1)]
    classes = result.most_confused_classes(3, 2)
    assert classes == [END, 0]
    assert result.confusion_matrix(classes).tolist() == [[0, 1], [1, 2]]
    assert result.num_wrong_chars == 2

    output.print_evaluation(result, dataset_with("bac"), Path("run"), "test")
    text = capsys.readouterr().out
    assert "per length of the label" in text
    assert "per position from the end" in text
    assert "∅" in text


def test_rows_that_are_left_out_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """20 characters, of which two are misread half of the time; 2 of 40 images without the threshold."""
    characters = "abcdefghijklmnopqrst"
    targets = [[n % 20] for n in range(40)]
    result = evaluation(targets, [[2], [3], *targets[2:]])
    calibration = Calibration(images=200, points=(OperatingPoint(0.75, 0.95, 0.995),))
    confidences = np.array([0.3] * 2 + [0.9] * 38, np.float32)
    result = replace(result, text_confidences=confidences, calibration=calibration)
    output.print_evaluation(result, dataset_with(characters), Path("run"), "test")
    rows = [[cell.strip() for cell in line.split("│")] for line in capsys.readouterr().out.splitlines()]
    assert ["", "8 more", "100.00%", ""] in rows
    assert ["", "99.0%", "0.7500", "95.0%", "100.00%", ""] in rows


@pytest.mark.parametrize("label", ["[b]", "[/b]"])
def test_a_label_in_brackets_is_printed_unchanged(label: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As rich markup `[b]` would be lost, and `[/b]` would be an error."""
    alphabet = Alphabet("[/]b")
    wrong = evaluation([alphabet.encode(label)], [alphabet.encode(label[::-1])])
    output.print_evaluation(wrong, dataset_with("[/]b"), Path("run"), "test")
    row = capsys.readouterr().out.splitlines()[-2]
    assert row.split("│")[2:4] == [f" {label:<5} ", f" {label[::-1]:<9} "]


def test_misreads_name_the_image_and_are_sorted_by_confidence() -> None:
    result = replace(
        evaluation([[0, 1], [2, 2], [1, 1]], [[0, 2], [2, 2], [2, 0]]),
        text_confidences=np.array([0.25, 0.01, 0.72], np.float32),
        indices=np.array([7, 8, 9]),
    )
    files = [{"file": f"{n}.png"} for n in range(10)]
    named = replace(dataset_with("bac"), manifest={**dataset_with("bac").manifest, "files": files})

    misreads = [
        (e.index, e.image, e.label, e.predicted, round(e.confidence, 3)) for e in result.misreads(named)
    ]
    assert misreads == [(9, "9.png", "aa", "cb", 0.72), (7, "7.png", "ba", "bc", 0.25)]
    assert [misread.image for misread in result.misreads(dataset_with("bac"))] == ["9", "7"]


# -- evaluating a split --------------------------------------------------------------------------------------


@pytest.fixture
def model(tiny: Config) -> Recognizer:
    torch.manual_seed(0)
    return networks.build(tiny.model, tiny.captcha)


@pytest.fixture
def split(tiny: Config) -> Split:
    """A split of 53 images, whose indices are multiples of 3."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (53, 16, 32, 3), dtype=torch.uint8, generator=generator)
    targets = torch.randint(0, 5, (53, 2), generator=generator)
    return Split(images, targets, torch.arange(53) * 3, torch.device("cpu"))


def with_batches_of(config: Config, size: int) -> Config:
    return replace(config, train=replace(config.train, eval_batch_size=size))


@pytest.mark.parametrize("size", [1, 7, 53, 100])
def test_every_image_is_predicted_once(tiny: Config, model: Recognizer, split: Split, size: int) -> None:
    result = evaluate(model, split, with_batches_of(tiny, size))
    assert result.indices.tolist() == split.indices.tolist()
    assert result.targets.tolist() == split.targets.tolist()
    model.eval()
    with torch.no_grad():
        single = [model(split.images[n : n + 1])[0].softmax(dim=1).max(dim=1) for n in range(53)]
    assert result.predicted.tolist() == [each.indices.tolist() for each in single]
    expected = np.array([each.values.numpy() for each in single])
    np.testing.assert_allclose(result.confidences, expected, atol=1e-5)


@pytest.mark.parametrize("size", [1, 7, 53, 100])
def test_the_loss_is_the_mean_over_images(tiny: Config, model: Recognizer, split: Split, size: int) -> None:
    """A short last batch is weighted by its number of images."""
    with torch.no_grad():
        logits = model.eval()(split.images).log_softmax(dim=2)
    losses = [-sum(float(logits[n, t, int(split.targets[n, t])]) for t in range(2)) / 2 for n in range(53)]
    result = evaluate(model, split, with_batches_of(tiny, size))
    assert result.loss == pytest.approx(math.fsum(losses) / 53, rel=1e-5)


def test_evaluation_has_no_label_smoothing(tiny: Config, model: Recognizer, split: Split) -> None:
    smooth = replace(tiny, train=replace(tiny.train, label_smoothing=0.5))
    plain = replace(tiny, train=replace(tiny.train, label_smoothing=0.0))
    assert evaluate(model, split, smooth).loss == evaluate(model, split, plain).loss


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored(
    tiny: Config, model: Recognizer, split: Split, training: bool
) -> None:
    model.train(training)
    evaluate(model, split, tiny)
    assert all(module.training == training for module in model.modules())


def test_evaluation_does_not_change_the_model(tiny: Config, model: Recognizer, split: Split) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model.train(), split, tiny)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


class ImageAsLogits(nn.Module):
    """A network that returns the image as logits."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :2, :3, 0].float()  # (B, T, K)


class IdentityHead(PositionHead):
    def forward(self, features: Tensor) -> Tensor:
        return features


def test_predictions_of_the_model_are_counted(tiny: Config) -> None:
    """Of three images the second is misread in its last character."""
    images = torch.zeros(3, 2, 3, 1, dtype=torch.uint8)
    for n, text in enumerate([[0, 1], [2, 0], [1, 1]]):
        for t, k in enumerate(text):
            images[n, t, k] = 9
    targets = torch.tensor([[0, 1], [2, 2], [1, 1]])
    split = Split(images, targets, torch.tensor([5, 6, 7]), torch.device("cpu"))
    result = evaluate(Recognizer(ImageAsLogits(), IdentityHead(1, 1, 2, 3)), split, with_batches_of(tiny, 2))
    assert result.predicted.tolist() == [[0, 1], [2, 0], [1, 1]]
    assert result.num_correct == 2
    assert result.confused_pairs(ALPHABET) == [("c", "b", 1)]
    assert result.confidences == pytest.approx(np.full((3, 2), math.exp(9) / (math.exp(9) + 2)))


def test_the_calibration_error_is_the_mean_over_ten_parts() -> None:
    found = evaluation([[0]] * 20, [[0]] * 15 + [[1]] * 5)
    confidences = np.concatenate([np.full(10, 0.9), np.full(10, 0.8)]).astype(np.float32)
    # The parts of two images: five right at 0.9; of those at 0.8, five images are wrong.
    right_at_80 = 5
    expected = (10 * 0.1 + 4 * 0.2 + 0.8 * 4 + abs(0.8 * 2 - 1)) / 20
    assert right_at_80 == int(found.is_correct[10:].sum())
    assert replace(found, text_confidences=confidences).calibration_error == pytest.approx(expected)
