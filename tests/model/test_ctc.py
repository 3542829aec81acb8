"""CTC against all alignments, one by one, and against torch's own."""

import itertools
import random
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from captcha_exp.data.alphabet import END
from captcha_exp.model import ctc


def collapse(path: tuple[int, ...], blank: int) -> tuple[int, ...]:
    """Return the text of an alignment: repeats are one character, then blanks are removed."""
    return tuple(c for c, _ in itertools.groupby(path) if c != blank)


def text_probabilities(logits: Tensor) -> dict[tuple[int, ...], float]:
    """Return the probability of each text, given logits (S, C), as the sum over all alignments."""
    probabilities, blank = logits.double().softmax(dim=1), logits.shape[1] - 1
    found: dict[tuple[int, ...], float] = defaultdict(float)
    for path in itertools.product(range(logits.shape[1]), repeat=len(logits)):
        each = 1.0
        for column, c in enumerate(path):
            each *= float(probabilities[column, c])
        found[collapse(path, blank)] += each
    return found


def best_alignment(logits: Tensor, min_length: int, length: int) -> tuple[float, tuple[int, ...]]:
    """Return the log probability of the best alignment with a text of these lengths, and its text."""
    log_probs, blank = logits.double().log_softmax(dim=1), logits.shape[1] - 1
    return max(
        (sum(float(log_probs[column, c]) for column, c in enumerate(path)), collapse(path, blank))
        for path in itertools.product(range(logits.shape[1]), repeat=len(logits))
        if min_length <= len(collapse(path, blank)) <= length
    )


def pad(text: tuple[int, ...], length: int) -> list[int]:
    return [*text, *[END] * (length - len(text))]


@pytest.mark.parametrize("seed", range(12))
def test_likelihood_is_the_sum_over_all_alignments(seed: int) -> None:
    rng = random.Random(seed)
    columns, classes, length = rng.randint(3, 6), rng.randint(3, 4), rng.randint(1, 3)
    logits = 2 * torch.randn(1, columns, classes, generator=torch.Generator().manual_seed(seed))
    probabilities = text_probabilities(logits[0])
    for text, expected in probabilities.items():
        if not 1 <= len(text) <= length:
            continue
        found = (-ctc.negative_log_likelihood(logits, torch.tensor([pad(text, length)]))).exp()
        assert float(found) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_impossible_text_has_no_likelihood(seed: int) -> None:
    # Two equal characters need a blank between them.
    logits = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(seed))
    assert float((-ctc.negative_log_likelihood(logits, torch.tensor([[1, 1]]))).exp()) == 0


def random_case(seed: int) -> tuple[Tensor, Tensor]:
    """Return logits (B, S, C) and labels (B, T) of different lengths, with doubled characters."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    length, classes = rng.randint(2, 6), rng.randint(3, 8)
    columns = 2 * length + rng.randint(0, 5)
    labels = [pad(tuple(rng.choices(range(classes - 1), k=rng.randint(1, length))), length) for _ in range(7)]
    return torch.randn(7, columns, classes, generator=generator), torch.tensor(labels)


@pytest.mark.parametrize("seed", range(20))
def test_agrees_with_torch(seed: int) -> None:
    logits, labels = random_case(seed)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = ctc.negative_log_likelihood(ours, labels)
    expected = F.ctc_loss(
        theirs.log_softmax(dim=2).transpose(0, 1),
        labels.clamp(min=0),
        torch.full((7,), logits.shape[1]),
        (labels != END).sum(dim=1),
        blank=logits.shape[2] - 1,
        reduction="none",
    )
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    weights = torch.arange(1.0, 8.0)
    (loss * weights).sum().backward()  # type: ignore[no-untyped-call]
    (expected * weights).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5)


def test_gradient_agrees_with_finite_differences() -> None:
    logits, labels = random_case(3)
    logits = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ctc.negative_log_likelihood(x, labels), (logits,))


@pytest.mark.parametrize("seed", range(20))
def test_decodes_the_best_of_all_alignments(seed: int) -> None:
    rng = random.Random(seed)
    columns, classes = rng.randint(3, 6), rng.randint(3, 4)
    length = rng.randint(1, 3)
    min_length = rng.randint(1, length)
    logits = 2 * torch.randn(4, columns, classes, generator=torch.Generator().manual_seed(seed))
    if columns < 2 * length - 1:
        length = min_length = 1
    found = ctc.decode(logits, min_length, length)
    for row in range(4):
        _, text = best_alignment(logits[row], min_length, length)
        assert found.ids[row].tolist() == pad(text, length)


def test_decoding_keeps_doubled_characters_and_gives_their_confidences() -> None:
    blank, classes = 3, 4
    path = [0, 0, blank, 0, 1, blank, blank]
    logits = torch.full((1, len(path), classes), 0.0)
    for column, c in enumerate(path):
        logits[0, column, c] = 3 + column
    found = ctc.decode(logits, 1, 4)
    assert found.ids.tolist() == [[0, 0, 1, END]]
    probabilities = logits[0].softmax(dim=1)
    expected = torch.stack([probabilities[1, 0], probabilities[3, 0], probabilities[4, 1], torch.tensor(1.0)])
    torch.testing.assert_close(found.confidences[0], expected)


def test_equal_bits_in_three_runs() -> None:
    results = []
    for _ in range(3):
        logits, labels = random_case(11)
        logits.requires_grad_()
        loss = ctc.negative_log_likelihood(logits, labels)
        loss.sum().backward()  # type: ignore[no-untyped-call]
        assert logits.grad is not None
        results.append((loss.detach(), logits.grad, *ctc.decode(logits.detach(), 1, labels.shape[1])))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_long_sequences_stay_finite() -> None:
    logits = (50 * torch.randn(2, 128, 63, generator=torch.Generator().manual_seed(0))).requires_grad_()
    loss = ctc.negative_log_likelihood(logits, torch.tensor([[5] * 32, [7] + [END] * 31]))
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert loss.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
