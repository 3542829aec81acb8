"""Make torch choose, for tensors that only have a shape, the operators that it chooses on a CUDA device.

The device of a trace is called `cpu` (see `trace`), and for some operators torch's CPU code saves other
tensors for the backward pass than its CUDA code:

- dropout saves a mask of the input's dtype on the CPU and a bool mask on CUDA (`native_dropout`)
- scaled_dot_product_attention with dropout, or with a mask, may save the attention matrix on the CPU; the
  fused CUDA kernels save the output and one fp32 number per query
- autocast runs normalizations, softmax and losses in fp32 on CUDA and in 16 bits on the CPU
- an LSTM or GRU is one oneDNN call on the CPU and one cuDNN call on CUDA, whose sizes neither library
  documents. Here it is torch's loop over the time steps (see docs/plan_module.md)

Source: torch 2.13, aten/src/ATen/native/Dropout.cpp, transformers/attention.cpp and cuda/sdp_utils.cpp (which
kernel), aten/src/ATen/autocast_mode.h (which operators in fp32), aten/src/ATen/native/RNN.cpp.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten
_FP32_IN_AUTOCAST = (
    "layer_norm",
    "group_norm",
    "softmax.int",
    "log_softmax.int",
    "exp",
    "log",
    "pow.Tensor_Scalar",
    "softplus",
    "rsqrt",
)


@contextmanager
def cuda_operators() -> Iterator[None]:
    """Apply the choices of the header to tensors of the CPU until the end of the block."""
    # torch has no types for a Library.
    with torch.library._scoped_library("aten", "IMPL") as library, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for key in ("AutogradCPU", "CPU"):
            library.impl("dropout", _dropout, key)
            library.impl("scaled_dot_product_attention", _attention, key)
            for recurrent in ("gru", "rnn_tanh", "rnn_relu"):
                library.impl(f"{recurrent}.input", _batch_second(recurrent), key)
        for name in _FP32_IN_AUTOCAST:
            library.impl(name, _in_fp32(name), "AutocastCPU")
        # Without oneDNN an LSTM is a loop over time steps. torch.backends.mkldnn.flags warns of TF32.
        was_enabled = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            yield
        finally:
            torch._C._set_mkldnn_enabled(was_enabled)


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
    """Return the attention by the fused kernel if a CUDA device has one for these arguments."""
    result: Tensor
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    if not _has_fused_kernel(query, value, attn_mask, enable_gqa):
        result = _aten._scaled_dot_product_attention_math.default(
            query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )[0]
        return result
    result = _aten._scaled_dot_product_flash_attention_for_cpu.default(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return result


def _has_fused_kernel(query: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool) -> bool:
    """Return whether the memory-efficient kernel (or, in 16 bits, the flash kernel) takes these tensors."""
    allowed = torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.mem_efficient_sdp_enabled()  # type: ignore[no-untyped-call]
    aligned = query.shape[-1] % 8 == value.shape[-1] % 8 == 0 or (
        query.dtype == torch.float32 and query.shape[-1] % 4 == value.shape[-1] % 4 == 0
    )
    same_heads = query.ndim == 4 and not enable_gqa
    return bool(allowed and aligned and same_heads and not (mask is not None and mask.requires_grad))


def _batch_second(name: str) -> Callable[..., Any]:
    """Return a recurrent layer that transposes its output out of place: torch's does so in place."""
    operator = getattr(_aten, name).input

    def kernel(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        *rest, batch_first = args
        output, hidden = operator.decompose(x.transpose(0, 1) if batch_first else x, *rest, False)
        return output.transpose(0, 1) if batch_first else output, hidden

    return kernel


def _in_fp32(name: str) -> Callable[..., Any]:
    base, _, overload = name.partition(".")
    operator = getattr(getattr(_aten, base), overload or "default")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return operator(*map(_to_fp32, args), **kwargs)

    return kernel


def _to_fp32(value: Any) -> Any:
    is_half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_half else value
