"""The heads, compared with slow loops, with torch's losses, and with all texts one by one."""

import itertools
import math
import random

import pytest
import torch
from torch import Tensor, nn

from captcha_exp.config import CaptchaConfig, HeadName
from captcha_exp.data.alphabet import END
from captcha_exp.errors import UserError
from captcha_exp.model import ctc
from captcha_exp.model.heads import CtcHead, EndClassHead, GroupedSoftmaxHead, Head, PositionHead, build_head

pytestmark = pytest.mark.usefixtures("one_thread")

# -- labels of one length ------------------------------------------------------------------------------------

FixedLengthHead = PositionHead | GroupedSoftmaxHead
each_head = pytest.mark.parametrize("kind", [PositionHead, GroupedSoftmaxHead])


def some_logits(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 3


@each_head
@pytest.mark.parametrize("classes", [2, 10, 36])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_at_chance_is_the_loss_of_equal_logits(
    kind: type[FixedLengthHead], classes: int, smoothing: float
) -> None:
    head = kind(8, 3, 4, classes)
    targets = torch.arange(20).view(5, 4) % classes
    loss = head.loss(torch.full((5, 4, classes), 0.7), targets, smoothing)
    assert head.loss_at_chance(targets) == pytest.approx(float(loss), rel=1e-5)


def test_loss_at_chance_has_the_known_values() -> None:
    targets = torch.zeros(5, 4, dtype=torch.int64)
    assert PositionHead(8, 3, 4, 36).loss_at_chance(targets) == pytest.approx(math.log(36))
    assert GroupedSoftmaxHead(8, 3, 4, 36).loss_at_chance(targets) == pytest.approx(0.127, abs=5e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_position_loss_is_the_mean_of_minus_log_softmax(smoothing: float) -> None:
    logits, targets = some_logits(3, 2, 5), torch.tensor([[0, 4], [2, 2], [3, 1]])
    total = 0.0
    for b, t in itertools.product(range(3), range(2)):
        row = logits[b, t].tolist()
        log_sum = math.log(sum(math.exp(x) for x in row))
        wanted = [(k == int(targets[b, t])) * (1 - smoothing) + smoothing / 5 for k in range(5)]
        total += sum(w * (log_sum - x) for w, x in zip(wanted, row, strict=True))
    loss = PositionHead(8, 3, 2, 5).loss(logits, targets, smoothing)
    assert float(loss) == pytest.approx(total / 6, rel=1e-5)


def test_grouped_softmax_loss_is_the_article_s() -> None:
    """BCELoss on the flattened softmax outputs against the flattened one-hot codes."""
    logits, targets = some_logits(6, 4, 36), torch.arange(24).view(6, 4)
    wanted = torch.zeros(6, 4 * 36)
    for b, t in itertools.product(range(6), range(4)):
        wanted[b, t * 36 + int(targets[b, t])] = 1
    outputs = torch.cat([logits[:, t].softmax(dim=1) for t in range(4)], dim=1)
    expected = nn.BCELoss()(outputs, wanted)
    assert float(GroupedSoftmaxHead(8, 1, 4, 36).loss(logits, targets)) == pytest.approx(float(expected))


def test_grouped_softmax_logits_are_grouped_by_position() -> None:
    head = GroupedSoftmaxHead(6, 2, 3, 4)
    features = some_logits(5, 6, 2)
    flat = features.reshape(5, 12) @ head.linear.weight.T + head.linear.bias
    for t in range(3):
        torch.testing.assert_close(head(features)[:, t], flat[:, t * 4 : (t + 1) * 4])


def test_position_head_is_attention_pooling() -> None:
    """Compared with a loop over positions and columns."""
    torch.manual_seed(0)
    head = PositionHead(6, 5, 3, 4)
    nn.init.normal_(head.pos_bias)
    features = some_logits(2, 6, 5)
    with torch.no_grad():
        logits = head(features)
        for b, t in itertools.product(range(2), range(3)):
            scores = [
                float(head.attn_score.weight[t, :, 0] @ features[b, :, s]) + float(head.pos_bias[t, s])
                for s in range(5)
            ]
            weights = [math.exp(x) / sum(map(math.exp, scores)) for x in scores]
            pooled = sum((weight * features[b, :, s] for s, weight in enumerate(weights)), torch.zeros(6))
            torch.testing.assert_close(logits[b, t], head.classifier(pooled), atol=1e-5, rtol=1e-4)


@each_head
@pytest.mark.parametrize(("positions", "classes"), [(1, 2), (3, 4), (4, 3)])
def test_decode_returns_the_most_probable_text(
    kind: type[FixedLengthHead], positions: int, classes: int
) -> None:
    logits = some_logits(6, positions, classes)
    ids, confidence, of_text = kind(8, 3, positions, classes).decode(logits)
    for b in range(6):
        chances = [[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in logits[b].tolist()]
        texts = itertools.product(range(classes), repeat=positions)
        best = max(texts, key=lambda text: math.prod(chances[t][k] for t, k in enumerate(text)))
        assert tuple(ids[b].tolist()) == best
        each = [chances[t][k] for t, k in enumerate(best)]
        assert confidence[b].tolist() == pytest.approx(each, rel=1e-5)
        assert float(of_text[b]) == pytest.approx(math.prod(each), rel=1e-5)


# -- labels of different lengths -----------------------------------------------------------------------------


def captcha(length: int, min_length: int | None = None) -> CaptchaConfig:
    return CaptchaConfig(
        width=56,
        height=24,
        channels=3,
        alphabet="0123456789",
        length=length,
        min_length=min_length,
        case="fold",
    )


def pad(text: tuple[int, ...], length: int) -> list[int]:
    return [*text, *[END] * (length - len(text))]


def end_class_probability(logits: Tensor, text: tuple[int, ...]) -> float:
    """Return the probability of a text, given logits (T, K + 1)."""
    probabilities = logits.double().softmax(dim=1)
    ends = [logits.shape[1] - 1] if len(text) < len(logits) else []
    return math.prod(float(probabilities[t, c]) for t, c in enumerate([*text, *ends]))


def all_texts(num_characters: int, min_length: int, length: int) -> list[tuple[int, ...]]:
    lengths = range(min_length, length + 1)
    return [text for n in lengths for text in itertools.product(range(num_characters), repeat=n)]


def end_class_case(seed: int) -> tuple[EndClassHead, Tensor, int, int]:
    """Return a head, logits (5, T, K + 1), K and T."""
    rng = random.Random(seed)
    characters, length = rng.randint(2, 3), rng.randint(2, 4)
    head = EndClassHead(4, 6, length, characters, rng.randint(1, length - 1))
    logits = 2 * torch.randn(5, length, characters + 1, generator=torch.Generator().manual_seed(seed))
    return head, logits, characters, length


@pytest.mark.parametrize("seed", range(10))
def test_end_class_loss_is_the_likelihood_of_the_text(seed: int) -> None:
    head, logits, characters, length = end_class_case(seed)
    assert sum(
        end_class_probability(logits[0], text) for text in all_texts(characters, 0, length)
    ) == pytest.approx(1)
    rng = random.Random(seed)
    texts = rng.choices(all_texts(characters, head.min_length, length), k=5)
    loss = head.loss(logits, torch.tensor([pad(text, length) for text in texts]))
    expected = [
        -math.log(end_class_probability(row, text)) / length for row, text in zip(logits, texts, strict=True)
    ]
    assert float(loss) == pytest.approx(sum(expected) / 5, abs=1e-5)


@pytest.mark.parametrize("seed", range(10))
def test_end_class_decodes_the_most_likely_text_of_an_allowed_length(seed: int) -> None:
    head, logits, characters, length = end_class_case(seed)
    decoded = head.decode(logits)
    for row in range(5):
        probability, best = max(
            (end_class_probability(logits[row], text), text)
            for text in all_texts(characters, head.min_length, length)
        )
        assert decoded.ids[row].tolist() == pad(best, length)
        assert float(decoded.text_confidence[row]) == pytest.approx(probability, abs=1e-5)
        expected = [float(logits[row, t].softmax(dim=0)[c]) for t, c in enumerate(best)]
        assert decoded.confidences[row].tolist() == pytest.approx(
            [*expected, *[1.0] * (length - len(best))], abs=1e-5
        )


@pytest.mark.parametrize("name", ["position", "end_class", "ctc"])
def test_log_likelihoods_are_those_of_the_loss(name: HeadName) -> None:
    length = 4
    head = build_head(name, 8, 12, captcha(length, 4 if name == "position" else 1))
    logits = head(torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(1))).detach()
    targets = torch.tensor([[1, 1, 2, 0], [3, 7, 4, 4], [2, 2, 5, 1]])
    if name != "position":
        targets[1, 1:], targets[2, 2:] = END, END
    expected = [-length * float(head.loss(logits[n : n + 1], targets[n : n + 1])) for n in range(3)]
    assert head.log_likelihood(logits, targets).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", [PositionHead, GroupedSoftmaxHead, EndClassHead])
def test_label_smoothing_is_taken_back(kind: type[Head]) -> None:
    """The logits that minimize the smoothed loss of known probabilities give these probabilities."""
    known, smoothing = (some_logits(1, 3, 5) / 3).softmax(dim=2), 0.2
    logits = ((1 - smoothing) * known + smoothing / 5).log()
    head: Head = EndClassHead(8, 6, 3, 4, 1) if kind is EndClassHead else kind(8, 6, 3, 5)
    targets = torch.tensor([[2, 0, 3]])
    expected = sum(math.log(known[0, t, int(c)]) for t, c in enumerate(targets[0]))
    assert float(head.log_likelihood(logits, targets, smoothing)) == pytest.approx(expected, rel=1e-4)


def test_an_impossible_label_has_a_finite_log_likelihood() -> None:
    for name in ("position", "ctc"):
        head = build_head(name, 8, 12, captcha(4, None))
        logits = torch.full((1, 12 if name == "ctc" else 4, 10 + (name == "ctc")), -1e4)
        logits[..., 0] = 1e4
        found = head.log_likelihood(logits, torch.tensor([[1, 2, 3, 4]]))
        assert float(found) == pytest.approx(4 * math.log(1e-3))


@pytest.mark.parametrize("name", ["end_class", "ctc"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_loss_of_a_batch_is_the_mean_of_its_images(name: HeadName, label_smoothing: float) -> None:
    head = build_head(name, 8, 12, captcha(4, 1))
    logits = head(torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(1)))
    targets = torch.tensor([[1, 1, 2, 0], [3, END, END, END], [2, 2, END, END]])
    each = [head.loss(logits[n : n + 1], targets[n : n + 1], label_smoothing) for n in range(3)]
    torch.testing.assert_close(head.loss(logits, targets, label_smoothing), torch.stack(each).mean())


@pytest.mark.parametrize("name", ["position", "end_class", "ctc", "grouped_softmax"])
def test_loss_at_chance_is_that_of_equal_logits(name: HeadName) -> None:
    lengths = name in ("end_class", "ctc")
    head = build_head(name, 8, 12, captcha(4, 2 if lengths else None))
    targets = torch.randint(0, 10, (50, 4), generator=torch.Generator().manual_seed(0))
    if lengths:
        targets[::2, 3:] = END
        targets[::3, 2:] = END
    logits = torch.zeros_like(head(torch.zeros(50, 8, 12)))
    assert head.loss_at_chance(targets) == pytest.approx(float(head.loss(logits, targets)), rel=1e-4)


def test_ctc_text_confidence_is_the_likelihood_of_the_text() -> None:
    head = CtcHead(4, 5, 2, 3, 1)
    logits = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))
    decoded = head.decode(logits)
    for row in range(6):
        nll = ctc.negative_log_likelihood(logits[row : row + 1], decoded.ids[row : row + 1])
        assert float(decoded.text_confidence[row]) == pytest.approx(float((-nll).exp()), abs=1e-6)


def test_ctc_needs_columns_for_doubled_characters() -> None:
    with pytest.raises(
        UserError, match=r"has 14 columns .* labels of 8 characters need 15; use a width of at"
    ):
        build_head("ctc", 8, 14, captcha(8))
    build_head("ctc", 8, 15, captcha(8))
