"""The operators that a trace replaces, compared with those of torch on real values."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captcha_exp.memory.fake_device import DEVICE, HOST, TensorRecorder
from captcha_exp.memory.gpu_kernels import emulate_cuda_operators
from captcha_exp.memory.module_trace import trace_module

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, SIZE, CLASSES, LENGTH = 20, 4, 8, 6
LENGTHS = ([STEPS] * SIZE, [6, 3, 1, 2])


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("zero_infinity", [False, True])
@pytest.mark.parametrize("as_tensors", [False, True])
@pytest.mark.parametrize("steps", [STEPS, 4])  # in 4 steps a target of 6 has no path
def test_ctc_loss_equals_that_of_torch(
    reduction: str, zero_infinity: bool, as_tensors: bool, steps: int
) -> None:
    log_probs = torch.randn(steps, SIZE, CLASSES).log_softmax(-1)
    targets = torch.randint(1, CLASSES, (SIZE, LENGTH))
    lengths: Any = [steps] * SIZE, LENGTHS[1]
    if as_tensors:
        lengths = tuple(map(torch.tensor, lengths))

    def loss() -> Tensor:
        return F.ctc_loss(
            log_probs, targets, lengths[0], lengths[1], reduction=reduction, zero_infinity=zero_infinity
        )

    expected = loss()
    with emulate_cuda_operators():
        found = loss()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("as_tensors", [False, True])
def test_ctc_loss_of_one_sequence_equals_that_of_torch(as_tensors: bool) -> None:
    log_probs, targets = torch.randn(STEPS, CLASSES).log_softmax(-1), torch.tensor([1, 2, 3])
    lengths: Any = (torch.tensor(STEPS), torch.tensor(3)) if as_tensors else ((STEPS,), (3,))
    expected = F.ctc_loss(log_probs, targets, lengths[0], lengths[1], reduction="none")
    with emulate_cuda_operators():
        torch.testing.assert_close(
            F.ctc_loss(log_probs, targets, lengths[0], lengths[1], reduction="none"), expected
        )


def test_a_traced_ctc_loss_has_the_shapes_of_a_real_one() -> None:
    targets = torch.randint(1, CLASSES, (SIZE, LENGTH))
    real = torch._ctc_loss(torch.randn(STEPS, SIZE, CLASSES).log_softmax(-1), targets, *LENGTHS)
    with torch.device(HOST), TensorRecorder():
        log_probs = torch.zeros(STEPS, SIZE, CLASSES, device=DEVICE)
        targets_on_device = torch.zeros(SIZE, LENGTH, dtype=torch.int64, device=DEVICE)
        for lengths in (LENGTHS, tuple(map(torch.tensor, LENGTHS))):
            found = torch._ctc_loss(log_probs, targets_on_device, *lengths)
            assert [x.shape for x in found] == [x.shape for x in real]
            assert [x.dtype for x in found] == [x.dtype for x in real]


@pytest.mark.parametrize("as_tensors", [False, True])
def test_training_with_ctc_can_be_traced(as_tensors: bool) -> None:
    def peak(length: int) -> int:
        lengths: Any = [STEPS] * SIZE, [length] * SIZE
        if as_tensors:
            lengths = tuple(map(torch.tensor, lengths))
        traced = trace_module(
            nn.Linear(CLASSES, CLASSES),
            torch.empty(STEPS, SIZE, CLASSES),
            torch.optim.SGD,
            lambda output, targets: F.ctc_loss(output.log_softmax(-1), targets, *lengths),
            targets=torch.zeros(SIZE, length, dtype=torch.int64),
        )
        return traced.peak_bytes("step")

    log_alpha, targets = SIZE * STEPS * 2 * 100 * 4, SIZE * 100 * 8
    assert peak(202) - peak(102) == log_alpha + targets


@pytest.mark.parametrize(("given", "expected"), [((), torch.float16), ((torch.bfloat16,), torch.bfloat16)])
def test_cuda_autocast_inside_a_module_applies(given: Any, expected: torch.dtype) -> None:
    class WithAutocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cuda", *given):
                y: Tensor = self.layer(x)
            dtypes.append(y.dtype)
            return y

    dtypes: list[torch.dtype] = []
    plain = torch.autocast.__init__
    trace_module(WithAutocast(), torch.empty(4, 8), torch.optim.SGD, lambda y: y.float().mean())
    assert set(dtypes) == {expected}
    assert torch.autocast.__init__ is plain
