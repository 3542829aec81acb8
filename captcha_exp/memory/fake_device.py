"""Tensors of a simulated device, and a dispatch mode that records their allocations and deallocations.

A tensor of the device has a shape and no values. The result of an operator comes from torch's `meta` kernel,
which runs once for each combination of arguments: a training repeats the same calls thousands of times, and
later traces use the same cache. Tensors of the host are plain `meta` tensors and are not recorded.

torch's FakeTensorMode does the same for the compiler and takes five times as long. The two are compared in
tests/memory/test_trace.py: they differ only in the mean and deviation of a batch norm, which are fp32 for
16-bit images, as they are on the CPU and on CUDA.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partialmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from captcha_exp.memory.allocator import MemoryEvent

HOST, DEVICE = torch.device("meta"), torch.device("cpu")
# The value that an optimizer reads as its step count. With 1 NAdam would divide by zero, and RAdam needs less
# memory in the first five steps.
ASSUMED_STEP = 100
MAX_CACHED_RESULTS = 50_000  # about 800 bytes each; a batch size adds about a hundred

_aten = torch.ops.aten
_CTC = {_aten._ctc_loss.default, _aten._ctc_loss.Tensor}
_CTC_BACKWARD = {_aten._ctc_loss_backward.default, _aten._ctc_loss_backward.Tensor}
_CONVOLUTIONS = {_aten.convolution.default, _aten.convolution_backward.default, _aten.conv2d.default}


class TensorMeta(NamedTuple):
    """The shape, strides and dtype of a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Storage:
    """The storage that a tensor shares with its views; freed with the last of them."""

    __slots__ = ("_events", "_storage_id")

    def __init__(self, events: list[MemoryEvent], storage_id: int, requested_bytes: int) -> None:
        self._events, self._storage_id = events, storage_id
        events.append(MemoryEvent(storage_id, requested_bytes))

    def __del__(self) -> None:
        self._events.append(MemoryEvent(self._storage_id, None))


class DeviceTensor(Tensor):
    """A tensor of the device: a shape without values."""

    tensor_meta: TensorMeta
    fake_storage: Storage

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as in Parameter

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's is a disabled implementation
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(f"{func}: a tensor without values was used after its TensorRecorder exited")

    def __repr__(self, *, tensor_contents: str | None = None) -> str:  # type: ignore[override]
        del tensor_contents
        return f"DeviceTensor(shape={tuple(self.shape)}, dtype={self.dtype})"

    def _raise_value_read(self, name: str, *_: Any, **__: Any) -> Any:
        """Raise UntraceableError, because the tensor has no values."""
        raise UntraceableError(f"{name} reads values on the host; remove it from the step")

    __array__ = partialmethod(_raise_value_read, "numpy.asarray")
    numpy = partialmethod(_raise_value_read, "Tensor.numpy")
    tolist = partialmethod(_raise_value_read, "Tensor.tolist")


class Convolution(NamedTuple):
    """A convolution, forward or backward, which may need a workspace while it runs."""

    event_index: int  # its results were allocated by the events before this one
    fp32_bytes: int  # of input, output and weight


class OpResult(NamedTuple):
    """A tensor that an operator returns."""

    aliased_input: int | None  # index of the device tensor whose storage it shares; None: a new storage
    meta: TensorMeta | None  # None: the input itself
    storage_bytes: int  # of a new storage


OpResults = OpResult | list["OpResults"] | tuple["OpResults", ...] | None
_result_cache: dict[tuple[Any, ...], OpResults] = {}


class UntraceableError(NotImplementedError):
    """An operator whose result depends on values, which a trace does not have."""

    module_path: str | None = None  # of the submodule that called it, if known


class TensorRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Record the allocations and deallocations of the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types for it
        self.events: list[MemoryEvent] = []
        self.phase_starts: list[tuple[str, int]] = []  # name and index of the first event
        self.convolutions: list[Convolution] = []
        # Returns the path of the submodule at work.
        self.get_module_path: Callable[[], str | None] = lambda: None
        self._num_storages = 0
        # Whether a value that is read is ASSUMED_STEP, as in an optimizer its step count is.
        self.allows_value_reads = False

    def begin_phase(self, phase: str) -> None:
        """Begin a phase, which ends the one before it."""
        self.phase_starts.append((phase, len(self.events)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return self._run_op(func, args, kwargs or {})
        except UntraceableError as error:
            error.module_path = error.module_path or self.get_module_path()
            raise

    def _run_op(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the result of an operator."""
        inputs: list[DeviceTensor] = []
        devices: list[torch.device] = []
        cache_key = [func, torch.is_inference_mode_enabled(), torch.get_default_dtype(), *kwargs]
        _collect_cache_key((*args, *kwargs.values()), cache_key, inputs, devices)
        if func is _aten.lift_fresh.default:  # called by torch.tensor for a new tensor
            devices.append(args[0].device)
        if func is _aten._local_scalar_dense.default and self.allows_value_reads:
            return True if args[0].dtype == torch.bool else ASSUMED_STEP
        if not inputs and DEVICE not in devices:
            with _raise_untraceable(func, args):
                return func(*args, **kwargs)
        if (key := tuple(cache_key)) not in _result_cache:
            meta_inputs = [_empty_meta(each.tensor_meta) for each in inputs]
            with _raise_untraceable(func, args):
                result = _run_on_meta(func, args, kwargs, meta_inputs)
            if HOST in devices:
                return result
            if len(_result_cache) >= MAX_CACHED_RESULTS:
                _result_cache.clear()
            _result_cache[key] = _to_op_results(result, meta_inputs)
        result = self._make_tensors(_result_cache[key], inputs)
        if func in _CONVOLUTIONS:
            operands = args[:3] if func is _aten.convolution_backward.default else (*args[:2], result)
            self.convolutions.append(Convolution(len(self.events), 4 * sum(x.numel() for x in operands)))
        return result

    def _make_tensors(self, result: OpResults, inputs: list[DeviceTensor]) -> Any:
        """Return device tensors for the results of an operator."""
        if result is None:
            return None
        if not isinstance(result, OpResult):
            return type(result)(self._make_tensors(each, inputs) for each in result)
        aliased_input, meta, storage_bytes = result
        if meta is None:
            assert aliased_input is not None
            return inputs[aliased_input]
        if aliased_input is None:
            self._num_storages += 1
            storage = Storage(self.events, self._num_storages, storage_bytes)
        else:
            storage = inputs[aliased_input].fake_storage
        # In inference mode a view of the weights is still not an inference tensor.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            tensor = Tensor._make_wrapper_subclass(
                DeviceTensor, meta.shape, meta.strides, dtype=meta.dtype, device=DEVICE
            )
        tensor.tensor_meta, tensor.fake_storage = meta, storage
        return tensor


def _collect_cache_key(
    values: Iterable[Any], key: list[Any], inputs: list[DeviceTensor], devices: list[torch.device]
) -> None:
    """Collect what a result depends on, the tensors of the device, and the devices given as arguments."""
    for value in values:
        kind = type(value)
        if kind is DeviceTensor:
            inputs.append(value)
            key.append(value.tensor_meta)
        elif kind is list or kind is tuple:
            key.append(len(value))
            _collect_cache_key(value, key, inputs, devices)
        elif isinstance(value, Tensor):
            key += (_tensor_meta(value), value.device)
        else:
            if kind is torch.device:
                devices.append(value)
            key += (kind, value)  # 1 is not True, though they are equal


@contextmanager
def _raise_untraceable(func: Any, args: Any) -> Iterator[None]:
    """Raise UntraceableError for an operator that reads values on the host or needs them for a shape."""
    try:
        yield
    except UntraceableError:
        raise
    except (NotImplementedError, RuntimeError) as error:
        is_dynamic = torch.Tag.dynamic_output_shape in func.tags
        if func is _aten.index.Tensor:  # integer indices give a known shape
            is_dynamic = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        if torch.Tag.data_dependent_output in func.tags:
            reason = "reads a value on the host; remove .item(), bool() and formatting from the step"
        elif is_dynamic:
            reason = "has a result whose shape depends on values; use a fixed shape (torch.where, topk)"
        elif isinstance(error, NotImplementedError):
            reason = "has no implementation for device='meta'; use an operator that has one"
        else:
            raise
        raise UntraceableError(f"{func} {reason}") from error


def _run_on_meta(func: Any, args: Any, kwargs: Any, meta_inputs: list[Tensor]) -> Any:
    """Run the `meta` kernel on the inputs, in place of the device tensors."""
    if torch.Tag.inplace_view in func.tags:
        raise UntraceableError(
            f"{func} changes the shape of a tensor in place; use one that returns a new one"
        )
    if not func._schema.returns:
        return None  # writes to its inputs; fused SGD has no `meta` kernel
    remaining = iter(meta_inputs)

    def to_meta(value: Any) -> Any:
        if isinstance(value, DeviceTensor):
            return next(remaining)
        if isinstance(value, torch.device):
            return HOST
        if isinstance(value, Tensor):
            return torch.empty_like(value, device=HOST)  # otherwise a transfer to meta would return the input
        return value

    arguments, keywords = tree_map(to_meta, (tuple(args), kwargs))
    if func in _CTC:
        return _ctc_loss_meta(*arguments[:4])
    if func in _CTC_BACKWARD:
        return torch.empty_like(arguments[1])
    result = func(*arguments, **keywords)
    if isinstance(result, Tensor) and result.layout is not torch.strided:
        raise UntraceableError(f"{func} returns a sparse tensor; use nn.Embedding(..., sparse=False)")
    # The `meta` kernel considers the memory format of the input only.
    operands = arguments[1:3] if func is _aten.convolution_backward.default else arguments[:2]
    if func in _CONVOLUTIONS and any(suggest_memory_format(x) == torch.channels_last for x in operands):
        return tree_map(_to_channels_last, result)
    return result


def _ctc_loss_meta(
    log_probs: Tensor, targets: Tensor, _: Any, lengths: Tensor | list[int]
) -> tuple[Tensor, Tensor]:
    """Return the losses (B,) and log_alpha (B, T, 2S + 1) for log_probs (T, B, C) and the longest target S.

    If the lengths are a tensor, S is the width of the targets.

    Source: aten/src/ATen/native/LossCTC.cpp, ctc_loss_allocate_outputs.
    """
    longest = targets.shape[-1] if isinstance(lengths, Tensor) else max(lengths, default=0)
    steps, size = log_probs.shape[:2]
    return log_probs.new_empty(size), log_probs.new_empty(size, steps, 2 * longest + 1)


def _to_channels_last(result: Any) -> Any:
    """Return a result in channels_last, the format of a convolution with such an input or weight."""
    is_image = isinstance(result, Tensor) and result.ndim == 4
    return result.to(memory_format=torch.channels_last) if is_image else result


def _to_op_results(result: Any, meta_inputs: list[Tensor]) -> OpResults:
    """Return the result without tensors, for the cache."""
    if result is None:
        return None
    if isinstance(result, (list, tuple)):
        return type(result)(_to_op_results(each, meta_inputs) for each in result)
    assert isinstance(result, Tensor)  # values cannot be read
    storage = result.untyped_storage()
    for index, each in enumerate(meta_inputs):
        if each is result:
            return OpResult(index, None, 0)
        if each.untyped_storage()._cdata == storage._cdata:
            return OpResult(index, _tensor_meta(result), 0)
    return OpResult(None, _tensor_meta(result), storage.nbytes())


def _tensor_meta(tensor: Tensor) -> TensorMeta:
    return TensorMeta(tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _empty_meta(meta: TensorMeta) -> Tensor:
    return torch.empty_strided(meta.shape, meta.strides, dtype=meta.dtype, device=HOST)
