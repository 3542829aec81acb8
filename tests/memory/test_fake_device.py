"""What a Recorder sees of single operators; a whole training is in test_trace.py."""

from collections.abc import Iterator

import pytest
import torch

from captcha_exp.memory import fake_device as module
from captcha_exp.memory.allocator import MemoryEvent
from captcha_exp.memory.fake_device import DEVICE, HOST, DeviceTensor, TensorRecorder


@pytest.fixture
def recorder() -> Iterator[TensorRecorder]:
    with torch.device(HOST), TensorRecorder() as recorder:
        yield recorder


def test_a_tensor_comes_and_goes(recorder: TensorRecorder) -> None:
    there = torch.zeros(3, 5, device=DEVICE)
    assert (type(there), there.device, there.shape, there.dtype) == (
        DeviceTensor,
        DEVICE,
        (3, 5),
        torch.float32,
    )
    assert recorder.events == [MemoryEvent(1, 60)]
    del there
    assert recorder.events == [MemoryEvent(1, 60), MemoryEvent(1, None)]


def test_the_host_is_not_seen(recorder: TensorRecorder) -> None:
    here = torch.zeros(3) + torch.rand(3, generator=torch.Generator())
    assert (here.device, recorder.events) == (HOST, [])


def test_what_is_sent_is_as_large_as_itself(recorder: TensorRecorder) -> None:
    here = torch.zeros(100, 7)
    there = here[10:12].to(DEVICE)
    assert recorder.events == [MemoryEvent(1, 2 * 7 * 4)]
    with torch.inference_mode():  # there the same is another operator
        also = here[10:12].to(DEVICE)
    assert recorder.events == [MemoryEvent(1, 2 * 7 * 4), MemoryEvent(2, 2 * 7 * 4)]
    assert (there.device, also.device, there.to(HOST).device) == (DEVICE, DEVICE, HOST)


@pytest.mark.parametrize("inference", [False, True])
def test_memory_goes_with_the_last_who_looks_at_it(recorder: TensorRecorder, inference: bool) -> None:
    there = torch.zeros(4, 6, device=DEVICE)
    with torch.inference_mode(inference):
        row = there[1].view(2, 3)
        there += 1
        row.mul_(2)
    assert row.stride() == (3, 1)
    del there
    assert recorder.events == [MemoryEvent(1, 96)]
    del row
    assert recorder.events == [MemoryEvent(1, 96), MemoryEvent(1, None)]


def test_what_the_backward_pass_keeps_is_there(recorder: TensorRecorder) -> None:
    weight = torch.nn.Parameter(torch.zeros(8, device=DEVICE))
    loss = (weight * weight).exp().sum()
    events = recorder.events.copy()
    assert [event.requested_bytes for event in events] == [32, 32, 32, None, 4]  # the square goes
    loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
    assert MemoryEvent(3, None) in recorder.events
    assert weight.grad is not None
    assert type(weight.grad) is DeviceTensor


@pytest.mark.parametrize("again", [False, True])
def test_an_answer_is_for_its_own_question(recorder: TensorRecorder, again: bool) -> None:
    """1, 1.0 and True are one key of a dict."""
    if not again:
        module._result_cache.clear()
    there = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    assert (there + 1).dtype == torch.int64
    assert (there + 1.0).dtype == torch.float32
    assert (there + True).dtype == torch.int64
    assert torch.full((2,), True, device=DEVICE).dtype == torch.bool
    assert torch.full((2,), 1, device=DEVICE).dtype == torch.int64
    assert torch.ones(2, device=DEVICE).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.ones(2, device=DEVICE).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_answers_are_not_kept_for_ever(recorder: TensorRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_result_cache", {})
    monkeypatch.setattr(module, "MAX_CACHED_RESULTS", 5)
    for size in range(1, 20):
        torch.zeros(size, device=DEVICE)
        assert len(module._result_cache) <= 5
    assert [event.requested_bytes for event in recorder.events[::2]] == [4 * size for size in range(1, 20)]


def test_numbers_from_python_are_seen(recorder: TensorRecorder) -> None:
    there = torch.tensor([1.0, 2.0], device=DEVICE)
    assert (type(there), recorder.events) == (DeviceTensor, [MemoryEvent(1, 8)])
    assert torch.tensor([1.0, 2.0]).device == HOST


def test_an_operator_gives_several(recorder: TensorRecorder) -> None:
    there = torch.zeros(2, 9, device=DEVICE)
    values, places = there.max(dim=1)
    first, second = there[:, :5], there[:, 5:]
    assert [event.requested_bytes for event in recorder.events] == [72, 8, 16]  # two views have no own
    assert (values.dtype, places.dtype) == (torch.float32, torch.int64)
    assert (first.shape, second.shape) == ((2, 5), (2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_norm_keeps_what_it_keeps_on_a_cpu(dtype: torch.dtype) -> None:
    def run() -> list[torch.dtype]:
        pictures = torch.ones(4, 8, 5, 5, dtype=dtype, device=DEVICE)
        weight, bias, mean, variance = (torch.ones(8, device=DEVICE) for _ in range(4))
        found = torch.native_batch_norm(pictures, weight, bias, mean, variance, True, 0.1, 1e-5)
        return [each.dtype for each in found]

    with TensorRecorder():
        found = run()
    assert found == run()


def test_numbers_are_not_read(recorder: TensorRecorder) -> None:
    there = torch.zeros((), device=DEVICE)
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(there)


def test_a_tensor_keeps_its_form(recorder: TensorRecorder) -> None:
    there = torch.zeros(2, 1, device=DEVICE)
    with pytest.raises(NotImplementedError, match="changes the form"):
        there.squeeze_()


def test_a_tensor_is_good_for_nothing_afterwards() -> None:
    with TensorRecorder():
        there = torch.zeros(2, device=DEVICE)
    with pytest.raises(RuntimeError, match="outlived"):
        there + 1
