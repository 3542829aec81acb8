"""TensorRecorder with single operators; test_trace.py covers a whole training run."""

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


def test_allocation_and_deallocation_are_recorded(recorder: TensorRecorder) -> None:
    tensor = torch.zeros(3, 5, device=DEVICE)
    assert (type(tensor), tensor.device, tensor.shape, tensor.dtype) == (
        DeviceTensor,
        DEVICE,
        (3, 5),
        torch.float32,
    )
    assert recorder.events == [MemoryEvent(1, 60)]
    del tensor
    assert recorder.events == [MemoryEvent(1, 60), MemoryEvent(1, None)]


def test_host_tensors_are_not_recorded(recorder: TensorRecorder) -> None:
    on_host = torch.zeros(3) + torch.rand(3, generator=torch.Generator())
    assert (on_host.device, recorder.events) == (HOST, [])


def test_a_transferred_view_has_the_size_of_the_view(recorder: TensorRecorder) -> None:
    on_host = torch.zeros(100, 7)
    tensor = on_host[10:12].to(DEVICE)
    assert recorder.events == [MemoryEvent(1, 2 * 7 * 4)]
    with torch.inference_mode():  # inference mode uses another operator
        other = on_host[10:12].to(DEVICE)
    assert recorder.events == [MemoryEvent(1, 2 * 7 * 4), MemoryEvent(2, 2 * 7 * 4)]
    assert (tensor.device, other.device, tensor.to(HOST).device) == (DEVICE, DEVICE, HOST)


@pytest.mark.parametrize("inference", [False, True])
def test_storage_is_freed_with_its_last_view(recorder: TensorRecorder, inference: bool) -> None:
    tensor = torch.zeros(4, 6, device=DEVICE)
    with torch.inference_mode(inference):
        row = tensor[1].view(2, 3)
        tensor += 1
        row.mul_(2)
    assert row.stride() == (3, 1)
    del tensor
    assert recorder.events == [MemoryEvent(1, 96)]
    del row
    assert recorder.events == [MemoryEvent(1, 96), MemoryEvent(1, None)]


def test_tensors_saved_for_the_backward_pass_stay_allocated(recorder: TensorRecorder) -> None:
    weight = torch.nn.Parameter(torch.zeros(8, device=DEVICE))
    loss = (weight * weight).exp().sum()
    events = recorder.events.copy()
    assert [event.requested_bytes for event in events] == [32, 32, 32, None, 4]  # the square is freed
    loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
    assert MemoryEvent(3, None) in recorder.events
    assert weight.grad is not None
    assert type(weight.grad) is DeviceTensor


@pytest.mark.parametrize("again", [False, True])
def test_cached_results_depend_on_argument_types(recorder: TensorRecorder, again: bool) -> None:
    """1, 1.0 and True are equal as keys of a dict."""
    if not again:
        module._result_cache.clear()
    tensor = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    assert (tensor + 1).dtype == torch.int64
    assert (tensor + 1.0).dtype == torch.float32
    assert (tensor + True).dtype == torch.int64
    assert torch.full((2,), True, device=DEVICE).dtype == torch.bool
    assert torch.full((2,), 1, device=DEVICE).dtype == torch.int64
    assert torch.ones(2, device=DEVICE).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.ones(2, device=DEVICE).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_result_cache_is_bounded(recorder: TensorRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_result_cache", {})
    monkeypatch.setattr(module, "MAX_CACHED_RESULTS", 5)
    for size in range(1, 20):
        torch.zeros(size, device=DEVICE)
        assert len(module._result_cache) <= 5
    assert [event.requested_bytes for event in recorder.events[::2]] == [4 * size for size in range(1, 20)]


def test_tensors_from_python_values_are_recorded(recorder: TensorRecorder) -> None:
    tensor = torch.tensor([1.0, 2.0], device=DEVICE)
    assert (type(tensor), recorder.events) == (DeviceTensor, [MemoryEvent(1, 8)])
    assert torch.tensor([1.0, 2.0]).device == HOST


def test_an_operator_may_return_several_tensors(recorder: TensorRecorder) -> None:
    tensor = torch.zeros(2, 9, device=DEVICE)
    values, indices = tensor.max(dim=1)
    first, second = tensor[:, :5], tensor[:, 5:]
    assert [event.requested_bytes for event in recorder.events] == [
        72,
        8,
        16,
    ]  # views have no storage of their own
    assert (values.dtype, indices.dtype) == (torch.float32, torch.int64)
    assert (first.shape, second.shape) == ((2, 5), (2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_norm_has_the_dtypes_of_the_cpu(dtype: torch.dtype) -> None:
    def run() -> list[torch.dtype]:
        images = torch.ones(4, 8, 5, 5, dtype=dtype, device=DEVICE)
        weight, bias, mean, variance = (torch.ones(8, device=DEVICE) for _ in range(4))
        found = torch.native_batch_norm(images, weight, bias, mean, variance, True, 0.1, 1e-5)
        return [each.dtype for each in found]

    with TensorRecorder():
        found = run()
    assert found == run()


def test_values_cannot_be_read(recorder: TensorRecorder) -> None:
    tensor = torch.zeros((), device=DEVICE)
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(tensor)


def test_the_shape_of_a_tensor_cannot_change_in_place(recorder: TensorRecorder) -> None:
    tensor = torch.zeros(2, 1, device=DEVICE)
    with pytest.raises(NotImplementedError, match="changes the shape"):
        tensor.squeeze_()


def test_a_tensor_cannot_be_used_after_the_recorder_exits() -> None:
    with TensorRecorder():
        tensor = torch.zeros(2, device=DEVICE)
    with pytest.raises(RuntimeError, match="after its TensorRecorder exited"):
        tensor + 1
