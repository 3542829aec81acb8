"""Tensors of a device that is not there, and a mode that sees their memory come and go.

A tensor of the device has a shape and no numbers. What an operator gives is asked of torch's kernel for
`meta`, once for each kind of arguments: a training asks the same thousands of times, and the next trace
knows the answers too. Tensors of the host are torch's own of `meta`, and nobody looks at them.

torch's FakeTensorMode does the same for a compiler and takes five times as long. tests/memory/test_trace.py
compares the two: they differ only in the mean and deviation of a batch norm, which have 32 bits where the
images have 16, as they do on the CPU and on CUDA.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode

from captcha_exp.memory.allocator import MemoryEvent

HOST, DEVICE = torch.device("meta"), torch.device("cpu")
# The answer where an optimizer reads a number. Not 1: NAdam divides by 1 - product of its momenta, and RAdam
# needs less memory in the first five steps.
ASSUMED_STEP = 100
MAX_CACHED_RESULTS = (
    50_000  # answers that are kept, of 800 bytes each; each batch size has a hundred of its own
)

_aten = torch.ops.aten
_CTC = {_aten._ctc_loss.default, _aten._ctc_loss.Tensor}
_CTC_BACKWARD = {_aten._ctc_loss_backward.default, _aten._ctc_loss_backward.Tensor}
_CONVOLUTIONS = {_aten.convolution.default, _aten.convolution_backward.default, _aten.conv2d.default}


class TensorMeta(NamedTuple):
    """A tensor but for its numbers."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Storage:
    """Where tensors that look at the same numbers lie. It goes with the last of them."""

    __slots__ = ("_events", "_storage_id")

    def __init__(self, events: list[MemoryEvent], storage_id: int, requested_bytes: int) -> None:
        self._events, self._storage_id = events, storage_id
        events.append(MemoryEvent(storage_id, requested_bytes))

    def __del__(self) -> None:
        self._events.append(MemoryEvent(self._storage_id, None))


class DeviceTensor(Tensor):
    """A tensor of the device."""

    tensor_meta: TensorMeta
    fake_storage: Storage

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as in Parameter

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's is one that is switched off
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(f"{func}: a tensor without numbers outlived its Recorder")

    def __repr__(self, *, tensor_contents: str | None = None) -> str:  # type: ignore[override]
        del tensor_contents
        return f"DeviceTensor(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise _value_read_error("numpy.asarray")

    def numpy(self, *_: Any, **__: Any) -> Any:
        """Raise Untraceable: there are no values."""
        raise _value_read_error("Tensor.numpy")

    def tolist(self) -> Any:
        """Raise Untraceable: there are no values."""
        raise _value_read_error("Tensor.tolist")


class Convolution(NamedTuple):
    """A convolution, forward or backward, which may want a workspace while it runs."""

    event_index: int  # its results have come with the events before this one
    fp32_bytes: int  # of the pictures that go in, those that come out, and the weights


class OpResult(NamedTuple):
    """A tensor that an operator gives."""

    aliased_input: (
        int | None
    )  # of the device's tensors among the arguments, whose memory it has; None: its own
    meta: TensorMeta | None  # None: it is that argument
    storage_bytes: int  # of its own memory


OpResults = OpResult | list["OpResults"] | tuple["OpResults", ...] | None
_result_cache: dict[tuple[Any, ...], OpResults] = {}


class UntraceableError(NotImplementedError):
    """An operator whose result depends on values, which a trace does not have."""

    def __init__(self, operator: str, reason: str, remedy: str) -> None:
        super().__init__(f"{operator} {reason}; {remedy}")
        self.operator, self.reason, self.remedy = operator, reason, remedy
        self.module_path: str | None = None  # of the submodule that called it, where a tracer knows it


def _value_read_error(name: str) -> UntraceableError:
    """Return the error for a method that reads values."""
    return UntraceableError(
        name, "reads values on the host", f"remove {name.rpartition('.')[2]}() from the step"
    )


class TensorRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Sees memory of the device come and go."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types for it
        self.events: list[MemoryEvent] = []
        self.phase_starts: list[tuple[str, int]] = []  # where phases begin
        self.convolutions: list[Convolution] = []
        self.get_module_path: Callable[[], str | None] = lambda: (
            None
        )  # returns the path of the submodule at work
        self._num_storages = 0
        self._value_reads_allowed = False

    def begin_phase(self, phase: str) -> None:
        """A phase begins, and the one before it ends."""
        self.phase_starts.append((phase, len(self.events)))

    @contextmanager
    def allow_value_reads(self) -> Iterator[None]:
        """Answer a read of a number with LATE_STEP. An optimizer reads how many steps it has taken."""
        self._value_reads_allowed = True
        try:
            yield
        finally:
            self._value_reads_allowed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return self._run_op(func, args, kwargs or {})
        except UntraceableError as error:
            error.module_path = error.module_path or self.get_module_path()
            raise

    def _run_op(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return what the operator gives."""
        given: list[DeviceTensor] = []
        devices: list[torch.device] = []
        question = [func, torch.is_inference_mode_enabled(), torch.get_default_dtype(), *kwargs]
        _collect_cache_key(args, question, given, devices)
        _collect_cache_key(kwargs.values(), question, given, devices)
        if func is _aten.lift_fresh.default:  # of torch.tensor, which has just made it somewhere
            devices.append(args[0].device)
        if func is _aten._local_scalar_dense.default and self._value_reads_allowed:
            return True if args[0].dtype == torch.bool else ASSUMED_STEP
        if not given and DEVICE not in devices:
            with _raise_untraceable(func, args):
                return func(*args, **kwargs)
        if (key := tuple(question)) not in _result_cache:
            stand_ins = [_empty_meta(each.tensor_meta) for each in given]
            with _raise_untraceable(func, args):
                result = _run_on_meta(func, args, kwargs, stand_ins)
            if HOST in devices:
                return result
            if len(_result_cache) >= MAX_CACHED_RESULTS:
                _result_cache.clear()
            _result_cache[key] = _to_op_results(result, stand_ins)
        result = self._make_tensors(_result_cache[key], given)
        if func in _CONVOLUTIONS:
            sides = args[:3] if func is _aten.convolution_backward.default else (*args[:2], result)
            self.convolutions.append(Convolution(len(self.events), 4 * sum(x.numel() for x in sides)))
        return result

    def _make_tensors(self, result: OpResults, inputs: list[DeviceTensor]) -> Any:
        """The tensors of an answer."""
        if result is None:
            return None
        if not isinstance(result, OpResult):
            return type(result)(self._make_tensors(each, inputs) for each in result)
        argument, form, storage_bytes = result
        if form is None:
            assert argument is not None
            return inputs[argument]
        if argument is None:
            self._num_storages += 1
            memory = Storage(self.events, self._num_storages, storage_bytes)
        else:
            memory = inputs[argument].fake_storage
        # While a model reads, a view of its weights is still no tensor of inference_mode.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            made = Tensor._make_wrapper_subclass(
                DeviceTensor, form.shape, form.strides, dtype=form.dtype, device=DEVICE
            )
        made.tensor_meta, made.fake_storage = form, memory
        return made


def _collect_cache_key(
    values: Iterable[Any], key: list[Any], inputs: list[DeviceTensor], devices: list[torch.device]
) -> None:
    """All that an answer depends on; the tensors of the device, and the devices that are named."""
    for value in values:
        kind = type(value)
        if kind is DeviceTensor:
            inputs.append(value)
            key.append(value.form)
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
    """Raise Untraceable for an operator that needs values: to be read on the host, or for a shape."""
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, UntraceableError):
            raise
        if torch.Tag.data_dependent_output in func.tags:
            remedy = "remove .item(), bool(), tolist() and formatting from the step"
            raise UntraceableError(str(func), "reads a value on the host", remedy) from error
        is_dynamic = torch.Tag.dynamic_output_shape in func.tags
        if func is _aten.index.Tensor:  # by integers its shape is known
            is_dynamic = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        if is_dynamic:
            remedy = "use a fixed shape (torch.where, masked_fill, topk)"
            raise UntraceableError(str(func), "has a result whose shape depends on values", remedy) from error
        if isinstance(error, NotImplementedError):
            remedy = "replace it by an operator that has one"
            raise UntraceableError(str(func), "has no implementation for device='meta'", remedy) from error
        raise


def _run_on_meta(func: Any, args: Any, kwargs: Any, stand_ins: list[Tensor]) -> Any:
    """What the kernel for `meta` gives."""
    if torch.Tag.inplace_view in func.tags:
        raise UntraceableError(
            str(func), "changes the form of a tensor in place", "use the variant that returns a new tensor"
        )
    if not func._schema.returns:
        return None  # it writes to what is there; that of fused SGD has no kernel for `meta`
    left = iter(stand_ins)

    def replaced(value: Any) -> Any:
        if isinstance(value, DeviceTensor):
            return next(left)
        if isinstance(value, torch.device):
            return HOST
        if isinstance(value, (list, tuple)):
            return type(value)(map(replaced, value))
        if isinstance(value, Tensor):
            return torch.empty_like(value, device=HOST)  # else one that is sent nowhere comes back itself
        return value

    arguments = replaced(tuple(args))
    if func in _CTC:
        return _ctc_loss_meta(*arguments[:4])
    if func in _CTC_BACKWARD:
        return torch.empty_like(arguments[1])
    result = func(*arguments, **{name: replaced(value) for name, value in kwargs.items()})
    if isinstance(result, Tensor) and result.layout is not torch.strided:
        remedy = "use dense tensors, e.g. nn.Embedding(..., sparse=False)"
        raise UntraceableError(str(func), "returns a sparse tensor", remedy)
    # The kernel for `meta` looks at the input alone.
    sides = arguments[1:3] if func is _aten.convolution_backward.default else arguments[:2]
    if func in _CONVOLUTIONS and any(suggest_memory_format(x) == torch.channels_last for x in sides):
        result = _to_channels_last(result)
    return result


def _ctc_loss_meta(
    log_probs: Tensor, targets: Tensor, _: Any, lengths: Tensor | list[int]
) -> tuple[Tensor, Tensor]:
    """Return the losses (B,) and log_alpha (B, T, 2S + 1) for log_probs (T, B, C) and the longest target S.

    Where lengths are a tensor, S is the most that the form of the targets allows.

    Source: aten/src/ATen/native/LossCTC.cpp, ctc_loss_allocate_outputs.
    """
    longest = targets.shape[-1] if isinstance(lengths, Tensor) else max(lengths, default=0)
    steps, size = log_probs.shape[:2]
    return log_probs.new_empty(size), log_probs.new_empty(size, steps, 2 * longest + 1)


def _to_channels_last(result: Any) -> Any:
    """Return it with the channels last, as a convolution does if its input or its weight has them last."""
    if isinstance(result, tuple):
        return tuple(map(_to_channels_last, result))
    if isinstance(result, Tensor) and result.ndim == 4:
        return result.to(memory_format=torch.channels_last)
    return result


def _to_op_results(result: Any, stand_ins: list[Tensor]) -> OpResults:
    """The same without tensors, to be kept."""
    if result is None:
        return None
    if isinstance(result, (list, tuple)):
        return type(result)(_to_op_results(each, stand_ins) for each in result)
    assert isinstance(result, Tensor)  # numbers are not read
    storage = result.untyped_storage()
    for number, each in enumerate(stand_ins):
        if each is result:
            return OpResult(number, None, 0)
        if each.untyped_storage()._cdata == storage._cdata:
            return OpResult(number, _tensor_meta(result), 0)
    return OpResult(None, _tensor_meta(result), storage.nbytes())


def _tensor_meta(tensor: Tensor) -> TensorMeta:
    return TensorMeta(tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _empty_meta(meta: TensorMeta) -> Tensor:
    return torch.empty_strided(meta.shape, meta.strides, dtype=meta.dtype, device=HOST)
