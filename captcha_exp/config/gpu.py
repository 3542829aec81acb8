"""What is known of a graphics card: figures within bounds, each with its source. Part of the schema."""

from typing import Annotated

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)  # of the whole schema


@dataclass(config=STRICT, frozen=True, kw_only=True)
class Bounds:
    """A figure that is known within bounds, and who says so."""

    min: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """the smallest that it can be"""
    max: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """the largest that it can be"""
    source: Annotated[str, Field(min_length=1)]
    """where the figure comes from"""

    @model_validator(mode="after")
    def _check_order(self) -> "Bounds":
        if self.min > self.max:
            raise ValueError(f"least={self.min:g} is more than most={self.max:g}")
        return self


@dataclass(config=STRICT, frozen=True, kw_only=True)
class GpuSpec:
    """What is known of a graphics card, for plans without it."""

    name: Annotated[str, Field(min_length=1)]
    """as its driver calls it"""
    compute_capability: Annotated[str, Field(pattern=r"^[1-9][0-9]?\.[0-9]$")] | None = None
    """NVIDIA's number of its architecture, as in '8.6'; null: unknown, or several"""
    total_mib: Bounds | None
    """MiB that programs can have of it; null: unknown, unless a run is on one"""
    other_processes_mib: Bounds
    """MiB that other programs hold of it, a desktop say"""
    context_mib: Bounds
    """MiB that the driver takes for a process that computes: its context, kernels, libraries"""
    cublas_workspace_mib: Bounds
    """MiB that matrix products keep from their first one on"""
    cudnn_workspace_mib: Bounds
    """MiB that a convolution takes while it runs, at most"""
    fp16_speedup: Bounds
    """training in fp16, times as fast as in fp32"""
    bf16_speedup: Bounds
    """training in bf16, times as fast as in fp32"""
