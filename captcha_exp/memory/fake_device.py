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

from captcha_exp.memory.allocator import Event

HOST, DEVICE = torch.device("meta"), torch.device("cpu")
# The answer where an optimizer reads a number. Not 1: NAdam divides by 1 - product of its momenta, and RAdam
# needs less memory in the first five steps.
LATE_STEP = 100
KNOWN = 50_000  # answers that are kept, of 800 bytes each; each batch size has a hundred of its own

_aten = torch.ops.aten
_CTC = {_aten._ctc_loss.default, _aten._ctc_loss.Tensor}
_CTC_BACKWARD = {_aten._ctc_loss_backward.default, _aten._ctc_loss_backward.Tensor}
_CONVOLUTIONS = {_aten.convolution.default, _aten.convolution_backward.default, _aten.conv2d.default}


class Form(NamedTuple):
    """A tensor but for its numbers."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Memory:
    """Where tensors that look at the same numbers lie. It goes with the last of them."""

    __slots__ = ("_events", "_number")

    def __init__(self, events: list[Event], number: int, requested_bytes: int) -> None:
        self._events, self._number = events, number
        events.append(Event(number, requested_bytes))

    def __del__(self) -> None:
        self._events.append(Event(self._number, None))


class DeviceTensor(Tensor):
    """A tensor of the device."""

    form: Form
    memory: Memory

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
        raise _reads_values("numpy.asarray")

    def numpy(self, *_: Any, **__: Any) -> Any:
        """Raise Untraceable: there are no values."""
        raise _reads_values("Tensor.numpy")

    def tolist(self) -> Any:
        """Raise Untraceable: there are no values."""
        raise _reads_values("Tensor.tolist")


class Convolution(NamedTuple):
    """A convolution, forward or backward, which may want a workspace while it runs."""

    place: int  # its results have come with the events before this one
    fp32_bytes: int  # of the pictures that go in, those that come out, and the weights


class Answer(NamedTuple):
    """A tensor that an operator gives."""

    argument: int | None  # of the device's tensors among the arguments, whose memory it has; None: its own
    form: Form | None  # None: it is that argument
    storage_bytes: int  # of its own memory


Answers = Answer | list["Answers"] | tuple["Answers", ...] | None
_known: dict[tuple[Any, ...], Answers] = {}


class Untraceable(NotImplementedError):
    """An operator whose result depends on values, which a trace does not have."""

    def __init__(self, operator: str, reason: str, remedy: str) -> None:
        super().__init__(f"{operator} {reason}; {remedy}")
        self.operator, self.reason, self.remedy = operator, reason, remedy
        self.module_path: str | None = None  # of the submodule that called it, where a tracer knows it


def _reads_values(name: str) -> Untraceable:
    """Return the error for a method that reads values."""
    return Untraceable(name, "reads values on the host", f"remove {name.rpartition('.')[2]}() from the step")


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Sees memory of the device come and go."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types for it
        self.events: list[Event] = []
        self.marks: list[tuple[str, int]] = []  # where phases begin
        self.convolutions: list[Convolution] = []
        self.locate: Callable[[], str | None] = lambda: None  # returns the path of the submodule at work
        self._count = 0
        self._reads_answered = False

    def begin(self, phase: str) -> None:
        """A phase begins, and the one before it ends."""
        self.marks.append((phase, len(self.events)))

    @contextmanager
    def reads_answered(self) -> Iterator[None]:
        """Answer a read of a number with LATE_STEP. An optimizer reads how many steps it has taken."""
        self._reads_answered = True
        try:
            yield
        finally:
            self._reads_answered = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return self._dispatched(func, args, kwargs or {})
        except Untraceable as error:
            error.module_path = error.module_path or self.locate()
            raise

    def _dispatched(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return what the operator gives."""
        given: list[DeviceTensor] = []
        devices: list[torch.device] = []
        question = [func, torch.is_inference_mode_enabled(), torch.get_default_dtype(), *kwargs]
        _describe(args, question, given, devices)
        _describe(kwargs.values(), question, given, devices)
        if func is _aten.lift_fresh.default:  # of torch.tensor, which has just made it somewhere
            devices.append(args[0].device)
        if func is _aten._local_scalar_dense.default and self._reads_answered:
            return True if args[0].dtype == torch.bool else LATE_STEP
        if not given and DEVICE not in devices:
            with _values_needed(func, args):
                return func(*args, **kwargs)
        if (key := tuple(question)) not in _known:
            stand_ins = [_empty(each.form) for each in given]
            with _values_needed(func, args):
                result = _asked(func, args, kwargs, stand_ins)
            if HOST in devices:
                return result
            if len(_known) >= KNOWN:
                _known.clear()
            _known[key] = _answers(result, stand_ins)
        result = self._made(_known[key], given)
        if func in _CONVOLUTIONS:
            sides = args[:3] if func is _aten.convolution_backward.default else (*args[:2], result)
            self.convolutions.append(Convolution(len(self.events), 4 * sum(x.numel() for x in sides)))
        return result

    def _made(self, answer: Answers, given: list[DeviceTensor]) -> Any:
        """The tensors of an answer."""
        if answer is None:
            return None
        if not isinstance(answer, Answer):
            return type(answer)(self._made(each, given) for each in answer)
        argument, form, storage_bytes = answer
        if form is None:
            assert argument is not None
            return given[argument]
        if argument is None:
            self._count += 1
            memory = Memory(self.events, self._count, storage_bytes)
        else:
            memory = given[argument].memory
        # While a model reads, a view of its weights is still no tensor of inference_mode.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            made = Tensor._make_wrapper_subclass(
                DeviceTensor, form.shape, form.strides, dtype=form.dtype, device=DEVICE
            )
        made.form, made.memory = form, memory
        return made


def _describe(
    values: Iterable[Any], into: list[Any], given: list[DeviceTensor], devices: list[torch.device]
) -> None:
    """All that an answer depends on; the tensors of the device, and the devices that are named."""
    for value in values:
        kind = type(value)
        if kind is DeviceTensor:
            given.append(value)
            into.append(value.form)
        elif kind is list or kind is tuple:
            into.append(len(value))
            _describe(value, into, given, devices)
        elif isinstance(value, Tensor):
            into += (_form(value), value.device)
        else:
            if kind is torch.device:
                devices.append(value)
            into += (kind, value)  # 1 is not True, though they are equal


@contextmanager
def _values_needed(func: Any, args: Any) -> Iterator[None]:
    """Raise Untraceable for an operator that needs values: to be read on the host, or for a shape."""
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, Untraceable):
            raise
        if torch.Tag.data_dependent_output in func.tags:
            remedy = "remove .item(), bool(), tolist() and formatting from the step"
            raise Untraceable(str(func), "reads a value on the host", remedy) from error
        is_dynamic = torch.Tag.dynamic_output_shape in func.tags
        if func is _aten.index.Tensor:  # by integers its shape is known
            is_dynamic = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        if is_dynamic:
            remedy = "use a fixed shape (torch.where, masked_fill, topk)"
            raise Untraceable(str(func), "has a result whose shape depends on values", remedy) from error
        if isinstance(error, NotImplementedError):
            remedy = "replace it by an operator that has one"
            raise Untraceable(str(func), "has no implementation for device='meta'", remedy) from error
        raise


def _asked(func: Any, args: Any, kwargs: Any, stand_ins: list[Tensor]) -> Any:
    """What the kernel for `meta` gives."""
    if torch.Tag.inplace_view in func.tags:
        raise Untraceable(
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
        return _ctc_loss(*arguments[:4])
    if func in _CTC_BACKWARD:
        return torch.empty_like(arguments[1])
    result = func(*arguments, **{name: replaced(value) for name, value in kwargs.items()})
    if isinstance(result, Tensor) and result.layout is not torch.strided:
        remedy = "use dense tensors, e.g. nn.Embedding(..., sparse=False)"
        raise Untraceable(str(func), "returns a sparse tensor", remedy)
    # The kernel for `meta` looks at the input alone.
    sides = arguments[1:3] if func is _aten.convolution_backward.default else arguments[:2]
    if func in _CONVOLUTIONS and any(suggest_memory_format(x) == torch.channels_last for x in sides):
        result = _colours_last(result)
    return result


def _ctc_loss(
    log_probs: Tensor, targets: Tensor, _: Any, lengths: Tensor | list[int]
) -> tuple[Tensor, Tensor]:
    """Return the losses (B,) and log_alpha (B, T, 2S + 1) for log_probs (T, B, C) and the longest target S.

    Where lengths are a tensor, S is the most that the form of the targets allows.

    Source: aten/src/ATen/native/LossCTC.cpp, ctc_loss_allocate_outputs.
    """
    longest = targets.shape[-1] if isinstance(lengths, Tensor) else max(lengths, default=0)
    steps, size = log_probs.shape[:2]
    return log_probs.new_empty(size), log_probs.new_empty(size, steps, 2 * longest + 1)


def _colours_last(result: Any) -> Any:
    """Return it with the channels last, as a convolution does if its input or its weight has them last."""
    if isinstance(result, tuple):
        return tuple(map(_colours_last, result))
    if isinstance(result, Tensor) and result.ndim == 4:
        return result.to(memory_format=torch.channels_last)
    return result


def _answers(result: Any, stand_ins: list[Tensor]) -> Answers:
    """The same without tensors, to be kept."""
    if result is None:
        return None
    if isinstance(result, (list, tuple)):
        return type(result)(_answers(each, stand_ins) for each in result)
    assert isinstance(result, Tensor)  # numbers are not read
    storage = result.untyped_storage()
    for number, each in enumerate(stand_ins):
        if each is result:
            return Answer(number, None, 0)
        if each.untyped_storage()._cdata == storage._cdata:
            return Answer(number, _form(result), 0)
    return Answer(None, _form(result), storage.nbytes())


def _form(tensor: Tensor) -> Form:
    return Form(tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _empty(form: Form) -> Tensor:
    return torch.empty_strided(form.shape, form.strides, dtype=form.dtype, device=HOST)
