"""Memory and speed figures of a GPU, each as bounds with a source. Part of the config schema."""

from typing import Annotated

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)  # used by the whole schema


@dataclass(config=STRICT, frozen=True, kw_only=True)
class Bounds:
    """Lower and upper bound of a figure, with its source."""

    min: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """lower bound"""
    max: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """upper bound"""
    source: Annotated[str, Field(min_length=1)]
    """where the figure comes from"""

    @model_validator(mode="after")
    def _check_order(self) -> "Bounds":
        if self.min > self.max:
            raise ValueError(f"min={self.min:g} is greater than max={self.max:g}")
        return self


@dataclass(config=STRICT, frozen=True, kw_only=True)
class GpuSpec:
    """The specification of a GPU model, used to plan memory without that GPU."""

    name: Annotated[str, Field(min_length=1)]
    """name reported by the driver"""
    compute_capability: Annotated[str, Field(pattern=r"^[1-9][0-9]?\.[0-9]$")] | None = None
    """CUDA compute capability, as in '8.6'; null: unknown, or several"""
    total_mib: Bounds | None
    """MiB of memory available to programs; null: unknown until a run is on the device"""
    other_processes_mib: Bounds
    """MiB used by other processes, for example a desktop"""
    context_mib: Bounds
    """MiB of the CUDA context of a process: context, kernels, libraries"""
    cublas_workspace_mib: Bounds
    """MiB that cuBLAS keeps from the first matrix product on"""
    cudnn_workspace_mib: Bounds
    """MiB of the largest workspace of a convolution"""
    fp16_speedup: Bounds
    """training speed in fp16 relative to fp32"""
    bf16_speedup: Bounds
    """training speed in bf16 relative to fp32"""
