"""The unknowns of a replay: workspaces of cuBLAS and cuDNN, and the addresses of new segments.

The GPU's file has bounds for the workspaces. Libraries request them from torch's allocator, so they are
events like tensors.
"""

from typing import NamedTuple

from captcha_exp.config import Bounds, GpuSpec
from captcha_exp.memory.allocator import MIB
from captcha_exp.memory.fake_device import Convolution
from captcha_exp.memory.trace import Trace

CONV_WORKSPACE_FACTOR = 4  # times the tensors of a convolution: above Winograd's transforms, an estimate
WORKSPACE_FRACTIONS = (0.0, 0.25, 0.5, 1.0)  # between minimum and maximum, each replayed downward


class Workspaces(NamedTuple):
    """Workspaces that libraries request from torch's allocator, and the order of its segments."""

    cublas_bytes: int  # from the first step on
    cudnn_bytes: int  # at most, while a convolution runs
    downward: bool = True  # as in CachingAllocator

    def conv_workspace_bytes(self, convolution: Convolution) -> int:
        """Return the workspace of this convolution."""
        return min(self.cudnn_bytes, CONV_WORKSPACE_FACTOR * convolution.fp32_bytes)

    def max_mib(self, trace: Trace) -> float:
        """Return the maximum MiB in use at one time."""
        return (self.cublas_bytes + max(map(self.conv_workspace_bytes, trace.convolutions), default=0)) / MIB


def workspace_scenarios(gpu: GpuSpec) -> list[Workspaces]:
    """Return the scenarios to replay, from the smallest to the largest; these two also with segments upward.

    The reserved memory is not monotonic in the workspace, and depends on the order of the segments.
    """

    def interpolate(bounds: Bounds, fraction: float) -> int:
        return int((bounds.min + fraction * (bounds.max - bounds.min)) * MIB)

    cublas, cudnn = gpu.cublas_workspace_mib, gpu.cudnn_workspace_mib
    scenarios = [Workspaces(interpolate(cublas, f), interpolate(cudnn, f)) for f in WORKSPACE_FRACTIONS]
    smallest, largest = (each._replace(downward=False) for each in (scenarios[0], scenarios[-1]))
    return [smallest, *scenarios[:-1], largest, scenarios[-1]]
