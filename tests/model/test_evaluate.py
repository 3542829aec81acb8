"""Every figure against a slow loop; the interval against a scan of the test that it inverts."""

import json
import math
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
from captcha_exp.data.alphabet import Alphabet
from captcha_exp.data.dataset import Dataset, Split
from captcha_exp.model import networks
from captcha_exp.model.evaluate import Evaluation, evaluate, wilson_interval
from captcha_exp.model.networks import PositionHead, Recognizer

pytestmark = pytest.mark.usefixtures("one_thread")

ALPHABET = Alphabet("bac")  # not in the order of their codes

Texts = list[list[int]]


def drawn_with(alphabet: str) -> Dataset:
    """A dataset of which nothing is known but the alphabet; its pictures have numbers for names."""
    nothing = torch.empty(0)
    provenance = {"captcha": {"alphabet": alphabet}}
    return Dataset(nothing, nothing, [], {}, {"provenance": provenance, "files": []})


def evaluation(targets: Texts, predicted: Texts) -> Evaluation:
    return Evaluation(
        loss=0.5,
        predicted=np.array(predicted),
        targets=np.array(targets),
        confidences=np.ones((len(targets), len(targets[0])), np.float32),
        indices=np.arange(len(targets)),
    )


@st.composite
def readings(draw: st.DrawFn) -> tuple[Texts, Texts]:
    """(targets, predicted) of 1 to 12 pictures with 1 to 4 characters of three."""
    count, length = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    text = st.lists(st.integers(0, 2), min_size=length, max_size=length)
    texts = st.lists(text, min_size=count, max_size=count)
    targets = draw(texts)
    predicted = [draw(st.one_of(st.just(target), text)) for target in targets]
    return targets, predicted


# -- the interval --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 2, 10, 37, 400])
def test_wilson_holds_the_shares_that_the_score_test_accepts(total: int) -> None:
    """A share p belongs to it if |right/total - p| is at most 1.96 standard deviations under p."""
    grid = np.linspace(0, 1, 20_001)
    for right in {0, 1, total // 3, total // 2, total - 1, total}:
        accepted = grid[np.abs(right / total - grid) <= 1.959964 * np.sqrt(grid * (1 - grid) / total)]
        low, high = wilson_interval(right, total)
        assert low == pytest.approx(accepted.min(), abs=1e-4)
        assert high == pytest.approx(accepted.max(), abs=1e-4)


def test_wilson_has_the_textbook_s_values() -> None:
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


@given(total=st.integers(1, 10**6), place=st.floats(0, 1))
def test_wilson_stays_within_bounds_and_around_the_share(total: int, place: float) -> None:
    right = round(place * total)
    low, high = wilson_interval(right, total)
    assert 0 <= low <= right / total <= high <= 1
    assert low < high
    assert wilson_interval(total - right, total) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@pytest.mark.parametrize("total", [1, 3, 49, 1000])
def test_wilson_ends_at_nought_and_one_exactly(total: int) -> None:
    assert wilson_interval(0, total)[0] == 0.0
    assert wilson_interval(total, total)[1] == 1.0


# -- the figures ---------------------------------------------------------------------------------------------


@given(readings())
def test_shares_are_those_of_a_slow_count(reading: tuple[Texts, Texts]) -> None:
    targets, predicted = reading
    made = evaluation(targets, predicted)
    count, length = len(targets), len(targets[0])
    right = sum(t == p for t, p in zip(targets, predicted, strict=True))
    assert made.num_correct == right
    assert made.accuracy == pytest.approx(right / count)
    assert made.accuracy_interval == wilson_interval(right, count)
    by_position = [sum(targets[n][t] == predicted[n][t] for n in range(count)) for t in range(length)]
    assert made.accuracy_by_position() == pytest.approx([n / count for n in by_position])
    assert made.char_accuracy == pytest.approx(sum(by_position) / (count * length))
    assert made.metrics("val") == {
        "val/loss": 0.5,
        "val/accuracy": made.accuracy,
        "val/char_accuracy": made.char_accuracy,
    }


@given(readings())
def test_counts_of_characters_are_those_of_a_slow_count(reading: tuple[Texts, Texts]) -> None:
    targets, predicted = reading
    made = evaluation(targets, predicted)
    pairs = [(t, p) for ts, ps in zip(targets, predicted, strict=True) for t, p in zip(ts, ps, strict=True)]
    assert made.confusion_matrix(3).tolist() == [[pairs.count((t, p)) for p in range(3)] for t in range(3)]
    for k, character in enumerate("bac"):
        occurs = [p for t, p in pairs if t == k]
        share = made.accuracy_by_character(ALPHABET)[character]
        assert share == (pytest.approx(occurs.count(k) / len(occurs)) if occurs else None)
    errors = {("bac"[t], "bac"[p], pairs.count((t, p))) for t, p in pairs if t != p}
    assert set(made.confused_pairs(ALPHABET)) == errors
    assert len(made.confused_pairs(ALPHABET)) == len(errors)


@given(readings())
def test_chance_is_the_best_that_one_fixed_text_reaches(reading: tuple[Texts, Texts]) -> None:
    targets, _ = reading
    best = sum(max(sum(text[t] == k for text in targets) for k in range(3)) for t in range(len(targets[0])))
    assert evaluation(targets, targets).chance_char_accuracy() == pytest.approx(
        best / (len(targets) * len(targets[0]))
    )


@given(readings())
def test_the_summary_is_plain_json(reading: tuple[Texts, Texts]) -> None:
    output = evaluation(*reading).to_json(drawn_with("bac"))
    assert json.loads(json.dumps(output, allow_nan=False)) == output
    assert output["images"] == len(reading[0])
    assert output["accuracy_low"] <= output["accuracy"] <= output["accuracy_high"]


def test_rows_are_what_stands_there_and_columns_what_was_read() -> None:
    made = evaluation([[0, 1], [0, 2]], [[2, 1], [2, 2]])
    assert made.confusion_matrix(3).tolist() == [[0, 0, 2], [0, 1, 0], [0, 0, 1]]
    assert made.confused_pairs(ALPHABET) == [("b", "c", 2)]


def test_confusions_are_sorted_by_count_then_by_name() -> None:
    made = evaluation([[0, 0, 1, 2, 2, 2]], [[1, 2, 2, 1, 0, 0]])
    assert made.confused_pairs(ALPHABET) == [
        ("c", "b", 2),
        ("a", "c", 1),
        ("b", "a", 1),
        ("b", "c", 1),
        ("c", "a", 1),
    ]


def test_the_summary_names_the_twenty_most_frequent_confusions() -> None:
    alphabet = Alphabet("abcdefgh")
    pairs = [(t, p) for t in range(8) for p in range(8) if t != p]
    made = evaluation([[t] for t, _ in pairs], [[p] for _, p in pairs])
    assert len(made.confused_pairs(alphabet)) == 56
    output = made.to_json(drawn_with("abcdefgh"))
    assert len(output["confusions"]) == 20
    assert output["confusions"][0] == {"label": "a", "read": "b", "count": 1}


@pytest.mark.parametrize("label", ["[b]", "[/b]"])
def test_a_label_in_brackets_is_shown_as_it_is(label: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Not as a colour: `[b]` would be lost, and `[/b]` would end the command."""
    alphabet = Alphabet("[/]b")
    wrong = evaluation([alphabet.encode(label)], [alphabet.encode(label[::-1])])
    output.print_evaluation(wrong, drawn_with("[/]b"), Path("run"), "test")
    row = capsys.readouterr().out.splitlines()[-2]
    assert row.split("│")[2:4] == [f" {label:<5} ", f" {label[::-1]:<4} "]


def test_errors_name_the_picture_and_stand_in_the_order_of_how_sure_the_head_was() -> None:
    made = replace(
        evaluation([[0, 1], [2, 2], [1, 1]], [[0, 2], [2, 2], [2, 0]]),
        confidences=np.array([[0.5, 0.5], [0.1, 0.1], [0.9, 0.8]], np.float32),
        indices=np.array([7, 8, 9]),
    )
    files = [{"file": f"{n}.png"} for n in range(10)]
    named = replace(drawn_with("bac"), manifest={**drawn_with("bac").manifest, "files": files})

    found = [(e.index, e.image, e.label, e.predicted, round(e.confidence, 3)) for e in made.misreads(named)]
    assert found == [(9, "9.png", "aa", "cb", 0.72), (7, "7.png", "ba", "bc", 0.25)]
    assert [error.image for error in made.misreads(drawn_with("bac"))] == ["9", "7"]


# -- the pass over a split -----------------------------------------------------------------------------------


@pytest.fixture
def model(tiny: Config) -> Recognizer:
    torch.manual_seed(0)
    return networks.build(tiny.model, tiny.captcha)


@pytest.fixture
def split(tiny: Config) -> Split:
    """53 pictures, whose rows are other numbers."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (53, 16, 32, 3), dtype=torch.uint8, generator=generator)
    targets = torch.randint(0, 5, (53, 2), generator=generator)
    return Split(images, targets, torch.arange(53) * 3, torch.device("cpu"))


def with_batches_of(config: Config, size: int) -> Config:
    return replace(config, train=replace(config.train, eval_batch_size=size))


@pytest.mark.parametrize("size", [1, 7, 53, 100])
def test_every_picture_is_read_once(tiny: Config, model: Recognizer, split: Split, size: int) -> None:
    made = evaluate(model, split, with_batches_of(tiny, size))
    assert made.indices.tolist() == split.indices.tolist()
    assert made.targets.tolist() == split.targets.tolist()
    model.eval()
    with torch.no_grad():
        alone = [model(split.images[n : n + 1])[0].softmax(dim=1).max(dim=1) for n in range(53)]
    assert made.predicted.tolist() == [one.indices.tolist() for one in alone]
    expected = np.array([one.values.numpy() for one in alone])
    np.testing.assert_allclose(made.confidences, expected, atol=1e-5)


@pytest.mark.parametrize("size", [1, 7, 53, 100])
def test_the_loss_is_the_mean_over_pictures(tiny: Config, model: Recognizer, split: Split, size: int) -> None:
    """A short last batch counts by its pictures, not as a batch."""
    with torch.no_grad():
        logits = model.eval()(split.images).log_softmax(dim=2)
    losses = [-sum(float(logits[n, t, int(split.targets[n, t])]) for t in range(2)) / 2 for n in range(53)]
    made = evaluate(model, split, with_batches_of(tiny, size))
    assert made.loss == pytest.approx(math.fsum(losses) / 53, rel=1e-5)


def test_the_loss_of_an_evaluation_knows_no_smoothing(tiny: Config, model: Recognizer, split: Split) -> None:
    smooth = replace(tiny, train=replace(tiny.train, label_smoothing=0.5))
    plain = replace(tiny, train=replace(tiny.train, label_smoothing=0.0))
    assert evaluate(model, split, smooth).loss == evaluate(model, split, plain).loss


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_afterwards_as_it_was(
    tiny: Config, model: Recognizer, split: Split, training: bool
) -> None:
    model.train(training)
    evaluate(model, split, tiny)
    assert all(module.training == training for module in model.modules())


def test_weights_and_statistics_are_left_alone(tiny: Config, model: Recognizer, split: Split) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model.train(), split, tiny)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


class Teller(nn.Module):
    """A network whose logits are in the picture: it reads what a test wrote there."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :2, :3, 0].float()  # (B, T, K)


class Told(PositionHead):
    def forward(self, features: Tensor) -> Tensor:
        return features


def test_what_the_model_reads_is_what_is_counted(tiny: Config) -> None:
    """Three pictures, of which the second is read wrong in its last character."""
    images = torch.zeros(3, 2, 3, 1, dtype=torch.uint8)
    for n, text in enumerate([[0, 1], [2, 0], [1, 1]]):
        for t, k in enumerate(text):
            images[n, t, k] = 9
    targets = torch.tensor([[0, 1], [2, 2], [1, 1]])
    split = Split(images, targets, torch.tensor([5, 6, 7]), torch.device("cpu"))
    made = evaluate(Recognizer(Teller(), Told(1, 1, 2, 3)), split, with_batches_of(tiny, 2))
    assert made.predicted.tolist() == [[0, 1], [2, 0], [1, 1]]
    assert made.num_correct == 2
    assert made.confused_pairs(ALPHABET) == [("c", "b", 1)]
    assert made.confidences == pytest.approx(np.full((3, 2), math.exp(9) / (math.exp(9) + 2)))
