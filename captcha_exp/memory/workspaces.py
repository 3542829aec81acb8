"""Workspaces of cuBLAS and cuDNN, which no tensor shows: intervals of the card's file.

Libraries ask torch's allocator for them, so they count among its events.
"""

from typing import NamedTuple

from captcha_exp.config import Card
from captcha_exp.memory.allocator import MIB
from captcha_exp.memory.fake_device import Convolution
from captcha_exp.memory.trace import Trace

WORKSPACE_TIMES = 4  # the tensors of a convolution: more than Winograd's transforms of them take, an estimate
WORKSPACE_SHARES = (0.0, 0.25, 0.5, 1.0)  # of the way from their least to their most, each played


class Workspaces(NamedTuple):
    """Bytes that libraries request from torch's allocator."""

    cublas_bytes: int  # from the first step on
    cudnn_bytes: int  # while a convolution runs, at most

    def of(self, convolution: Convolution) -> int:
        """Return the bytes for this convolution."""
        return min(self.cudnn_bytes, WORKSPACE_TIMES * convolution.fp32_bytes)

    def most_mib(self, traced: Trace) -> float:
        """Return the MiB in use at one time, at most."""
        return (self.cublas_bytes + max(map(self.of, traced.convolutions), default=0)) / MIB


def workspaces_of(card: Card) -> list[Workspaces]:
    """Return those to play, from the least to the most.

    More workspace may leave more use of the reserved memory, or less.
    """
    cublas, cudnn = card.cublas_workspace_mib, card.cudnn_workspace_mib
    return [
        Workspaces(*(int((each.least + share * (each.most - each.least)) * MIB) for each in (cublas, cudnn)))
        for share in WORKSPACE_SHARES
    ]
