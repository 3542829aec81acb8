"""Make torch dispatch tensors without values to the operators that it uses on a CUDA device.

The device of a trace has the type `cpu` (see `trace`), and for some operators torch's CPU code saves other
tensors for the backward pass than its CUDA code:

- dropout saves a mask of the input's dtype on the CPU and a bool mask on CUDA (`native_dropout`)
- scaled_dot_product_attention with dropout, or with a mask, may save the attention matrix on the CPU; the
  fused CUDA kernels save the output and one fp32 number per query
- autocast runs normalizations, softmax and losses in fp32 on CUDA and in 16 bits on the CPU
- an LSTM or GRU is one oneDNN call on the CPU and one cuDNN call on CUDA, whose sizes are documented in
  neither library. Here it is torch's loop over the time steps (see docs/plan_module.md)
- ctc_loss reads the lengths, which a trace may not know
- torch.autocast("cuda") does nothing without CUDA

Source: torch 2.13, aten/src/ATen/native/Dropout.cpp, transformers/attention.cpp and cuda/sdp_utils.cpp (which
kernel), aten/src/ATen/autocast_mode.h (which operators in fp32), aten/src/ATen/native/RNN.cpp,
LossCTC.cpp.
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from captcha_exp.memory.torch_patches import replace_attributes

_aten = torch.ops.aten
# The operators that autocast runs in fp32 on CUDA only.
_FP32_NORMALIZATIONS = ("layer_norm", "group_norm", "softmax.int", "log_softmax.int")
_FP32_FUNCTIONS = ("exp", "log", "pow.Tensor_Scalar", "softplus", "rsqrt")


@contextmanager
def emulate_cuda_operators() -> Iterator[None]:
    """Replace the operators listed in the module docstring for CPU tensors inside the block."""
    with (
        torch.library._scoped_library("aten", "IMPL") as library,
        warnings.catch_warnings(),
        _emulate_cuda_autocast(),
    ):
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for key in ("AutogradCPU", "CPU"):
            library.impl("dropout", _dropout, key)
            library.impl("scaled_dot_product_attention", _attention, key)
            library.impl("ctc_loss.IntList", _ctc_loss, key)
            library.impl("ctc_loss.Tensor", _ctc_loss, key)
            for recurrent in ("gru", "rnn_tanh", "rnn_relu"):
                library.impl(f"{recurrent}.input", _recurrent_kernel(recurrent), key)
        for name in (*_FP32_NORMALIZATIONS, *_FP32_FUNCTIONS):
            library.impl(name, _fp32_kernel(name), "AutocastCPU")
        # Without oneDNN an LSTM is a loop over time steps. torch.backends.mkldnn.flags warns of TF32.
        was_enabled = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            yield
        finally:
            torch._C._set_mkldnn_enabled(was_enabled)


def _emulate_cuda_autocast() -> AbstractContextManager[None]:
    """Apply torch.autocast("cuda") in this thread to the traced device, with the default dtype of CUDA."""
    plain, thread = torch.autocast.__init__, threading.get_ident()

    def init(self: torch.autocast, device_type: str, dtype: Any = None, *args: Any, **kwargs: Any) -> None:
        if device_type == "cuda" and threading.get_ident() == thread:
            device_type, dtype = "cpu", dtype or torch.float16
        plain(self, device_type, dtype, *args, **kwargs)

    return replace_attributes([(torch.autocast, "__init__", init)])


def _ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: int = 1,
    zero_infinity: bool = False,
) -> Tensor:
    """Return the CTC loss, computed by torch's operators without reading the lengths."""
    is_batched = log_probs.ndim == 3
    if not is_batched:
        log_probs, targets = log_probs.unsqueeze(1), targets.unsqueeze(0)
        if isinstance(target_lengths, Tensor):
            input_lengths, target_lengths = input_lengths.reshape(1), target_lengths.reshape(1)
    result: Tensor
    operator = _aten._ctc_loss.Tensor if isinstance(target_lengths, Tensor) else _aten._ctc_loss.default
    result = operator(log_probs, targets, input_lengths, target_lengths, blank, zero_infinity)[0]
    if zero_infinity:
        result = torch.where(result == float("inf"), torch.zeros((), device=result.device), result)
    if reduction == 1:
        lengths = torch.as_tensor(target_lengths, device=result.device).clamp_min(1).to(result.dtype)
        return (result / lengths).mean()
    if reduction == 2:
        return result.sum()
    return result if is_batched else result.squeeze(0)


def _dropout(x: Tensor, p: float, train: bool) -> Tensor:
    if not train or p == 0 or x.numel() == 0:
        return x
    if p == 1:
        return x * torch.zeros((), dtype=x.dtype, device=x.device)
    result: Tensor = _aten.native_dropout.default(x, p, train)[0]
    return result


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return the attention of the fused kernel if CUDA has one for these arguments."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    if _has_fused_kernel(query, value, attn_mask, enable_gqa):
        outputs = _aten._scaled_dot_product_flash_attention_for_cpu.default(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )
    else:
        outputs = _aten._scaled_dot_product_attention_math.default(
            query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )
    result: Tensor = outputs[0]
    return result


def _has_fused_kernel(query: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool) -> bool:
    """Return whether the memory-efficient kernel (or, in 16 bits, the flash kernel) supports these."""
    allowed = torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.mem_efficient_sdp_enabled()  # type: ignore[no-untyped-call]
    aligned = query.shape[-1] % 8 == value.shape[-1] % 8 == 0 or (
        query.dtype == torch.float32 and query.shape[-1] % 4 == value.shape[-1] % 4 == 0
    )
    same_heads = query.ndim == 4 and not enable_gqa
    return bool(allowed and aligned and same_heads and not (mask is not None and mask.requires_grad))


def _recurrent_kernel(name: str) -> Callable[..., Any]:
    """Return a recurrent layer that transposes its output out of place, as torch does in place."""
    operator = getattr(_aten, name).input

    def kernel(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        *rest, batch_first = args
        output, hidden = operator.decompose(x.transpose(0, 1) if batch_first else x, *rest, False)
        return output.transpose(0, 1) if batch_first else output, hidden

    return kernel


def _fp32_kernel(name: str) -> Callable[..., Any]:
    base, _, overload = name.partition(".")
    operator = getattr(getattr(_aten, base), overload or "default")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return operator(*map(_to_fp32, args), **kwargs)

    return kernel


def _to_fp32(value: Any) -> Any:
    is_half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_half else value
