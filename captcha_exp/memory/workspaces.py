"""What no trace shows of a play: workspaces of cuBLAS and cuDNN, and where the driver places segments.

Workspaces are intervals of the card's file. Libraries ask torch's allocator for them, so they count among its
events.
"""

from typing import NamedTuple

from captcha_exp.config import Bounds, GpuSpec
from captcha_exp.memory.allocator import MIB
from captcha_exp.memory.fake_device import Convolution
from captcha_exp.memory.trace import Trace

CONV_WORKSPACE_FACTOR = (
    4  # the tensors of a convolution: more than Winograd's transforms of them take, an estimate
)
WORKSPACE_FRACTIONS = (0.0, 0.25, 0.5, 1.0)  # of the way from their least to their most, each played downward


class Workspaces(NamedTuple):
    """Bytes that libraries request from torch's allocator, and the order of its segments."""

    cublas_bytes: int  # from the first step on
    cudnn_bytes: int  # while a convolution runs, at most
    downward: bool = True  # as in CachingAllocator

    def conv_workspace_bytes(self, convolution: Convolution) -> int:
        """Return the bytes for this convolution."""
        return min(self.cudnn_bytes, CONV_WORKSPACE_FACTOR * convolution.fp32_bytes)

    def max_mib(self, trace: Trace) -> float:
        """Return the MiB in use at one time, at most."""
        return (self.cublas_bytes + max(map(self.conv_workspace_bytes, trace.convolutions), default=0)) / MIB


def workspace_scenarios(gpu: GpuSpec) -> list[Workspaces]:
    """Return those to play, from the least to the most; these two also with segments upward.

    More workspace may leave more use of the reserved memory, or less, and so may either order.
    """

    def of(each: Bounds, share: float) -> int:
        return int((each.min + share * (each.max - each.min)) * MIB)

    cublas, cudnn = gpu.cublas_workspace_mib, gpu.cudnn_workspace_mib
    found = [Workspaces(of(cublas, share), of(cudnn, share)) for share in WORKSPACE_FRACTIONS]
    least, most = (each._replace(downward=False) for each in (found[0], found[-1]))
    return [least, *found[:-1], most, found[-1]]
