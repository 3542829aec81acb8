"""Find images that are the same: equal bytes, equal pixels, or nearly equal pixels, as after recompression.

Nearly equal pixels are found by a hash: signs of random projections of the details of each image, after
subtracting the mean of all. Images that agree in all bits of a band are compared directly. Like the pixels,
the hash is that of the resized images.

Source: Charikar, Similarity estimation techniques from rounding algorithms, STOC 2002; bands as in Leskovec,
Rajaraman and Ullman, Mining of massive datasets, section 3.4.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from captcha_exp.data import images
from captcha_exp.data.filters import box_mean

KINDS = {"bytes": "equal files", "pixels": "equal pixels", "similar": "nearly equal images"}
SMALL_SIZE = (32, 96)  # height and width of the small version
NEIGHBORHOOD = 7  # pixels of its side whose mean is subtracted
MAX_DETAIL = 10.0  # gray levels: a thick stroke that all images have weighs no more than a thin one
NUM_BANDS, BITS_PER_BAND = 24, 12
MIN_CORRELATION = 0.93  # on three collected sets, distinct images have at most 0.90, recompressed ones 0.95
MAX_BUCKET = 200  # images in a bucket that are compared pair by pair; more are no evidence of equality
BLOCK = 256  # images, or pairs, at a time: what they take fits into the cache of a core

Floats: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class DuplicateGroup:
    """Images that are the same in one way."""

    kind: str  # a key of KINDS
    indices: tuple[int, ...]  # of the images, in order


def find_duplicates(
    file_hashes: Sequence[str], pixel_hashes: Sequence[Hashable], arrays: npt.NDArray[np.uint8]
) -> list[DuplicateGroup]:
    """Return the groups of equal images (N, H, W, C): of equal bytes, of equal pixels, of similar pixels.

    A group of a later kind has one member, the first, of each group of an earlier kind.
    """
    found: list[DuplicateGroup] = []
    representatives = list(range(len(arrays)))
    for kind, hashes in (("bytes", file_hashes), ("pixels", pixel_hashes)):
        groups: dict[Hashable, list[int]] = defaultdict(list)
        for index in representatives:
            groups[hashes[index]].append(index)
        found += [DuplicateGroup(kind, tuple(each)) for each in groups.values() if len(each) > 1]
        representatives = [each[0] for each in groups.values()]
    similar = _find_similar(arrays[representatives])
    found += [DuplicateGroup("similar", tuple(representatives[n] for n in each)) for each in similar]
    return found


def split_keys(labels: Sequence[str], groups: Iterable[DuplicateGroup]) -> list[str]:
    """Return for each image the label that decides its split: that of the first label of all its equals.

    Images with equal labels, and equal images, have equal keys.
    """
    names = sorted(set(labels))
    number_of = {label: number for number, label in enumerate(names)}
    pairs = [
        (number_of[labels[one]], number_of[labels[other]])
        for group in groups
        for one, other in pairwise(group.indices)
    ]
    if not pairs:
        return list(labels)
    smallest = _smallest_connected(len(names), np.array(pairs))
    return [names[smallest[number_of[label]]] for label in labels]


def _smallest_connected(count: int, pairs: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return for each of `count` numbers the smallest that pairs (P, 2) connect it with."""
    smallest = np.arange(count)
    while True:
        roots = smallest[pairs]
        low, high = roots.min(axis=1), roots.max(axis=1)
        if (low == high).all():
            return smallest
        np.minimum.at(smallest, high, low)
        while (smallest != (next_smallest := smallest[smallest])).any():
            smallest = next_smallest


def _find_similar(arrays: npt.NDArray[np.uint8]) -> list[tuple[int, ...]]:
    """Return groups of images whose small versions correlate."""
    if len(arrays) < 2:
        return []
    vectors = _small_versions(arrays)
    similar = [np.empty((0, 2), np.int64)]
    for pairs in _candidate_pairs(vectors):
        correlation = np.einsum("ij,ij->i", vectors[pairs[:, 0]], vectors[pairs[:, 1]])
        similar.append(pairs[correlation >= MIN_CORRELATION])
    members: dict[int, list[int]] = defaultdict(list)
    for index, smallest in enumerate(_smallest_connected(len(arrays), np.concatenate(similar)).tolist()):
        members[smallest].append(index)
    return [tuple(each) for each in members.values() if len(each) > 1]


def _small_versions(arrays: npt.NDArray[np.uint8]) -> Floats:
    """Return (N, D) vectors of length 1: the details of small gray versions, minus their mean."""
    parts = []
    for start in range(0, len(arrays), BLOCK):
        small = images.resize(_to_gray(arrays[start : start + BLOCK]), *SMALL_SIZE)[..., 0].astype(np.float32)
        # Brightness and gradients of the background are no evidence of equality.
        parts.append((small - box_mean(small, NEIGHBORHOOD)).clip(-MAX_DETAIL, MAX_DETAIL))
    vectors = np.concatenate(parts).reshape(len(arrays), -1)
    if len(vectors) > 10:  # the mean of few images is the images themselves
        vectors -= vectors.mean(axis=0)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Floats = vectors / np.maximum(norms, 1e-6)
    return unit


def _to_gray(arrays: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return (N, H, W, 1): the mean of the channels, rounded down."""
    total = sum(
        (arrays[..., n].astype(np.uint16) for n in range(1, arrays.shape[3])), arrays[..., :1][..., 0]
    )
    gray: npt.NDArray[np.uint8] = (total // arrays.shape[3]).astype(np.uint8)[..., None]
    return gray


def _candidate_pairs(vectors: Floats) -> Iterator[npt.NDArray[np.int64]]:
    """Yield arrays (P, 2) of pairs of images with equal bits in a band."""
    rng = np.random.default_rng(0)
    projections = rng.standard_normal((vectors.shape[1], NUM_BANDS * BITS_PER_BAND)).astype(np.float32)
    weights = 1 << np.arange(BITS_PER_BAND)
    bits = (vectors @ projections > 0).reshape(len(vectors), NUM_BANDS, BITS_PER_BAND)
    codes = bits @ weights  # (N, bands)
    for band in range(NUM_BANDS):
        order = np.argsort(codes[:, band], kind="stable")
        changes = np.flatnonzero(np.diff(codes[order, band])) + 1
        starts = np.concatenate([[0], changes])
        sizes = np.diff(starts, append=len(order))
        pairs: list[npt.NDArray[np.int64]] = []
        for size in np.unique(sizes[(sizes > 1) & (sizes <= MAX_BUCKET)]).tolist():
            buckets = order[starts[sizes == size][:, None] + np.arange(size)]  # (buckets, size)
            one, other = np.triu_indices(size, 1)
            pairs.append(np.stack([buckets[:, one].ravel(), buckets[:, other].ravel()], axis=1))
        if pairs:
            joined = np.concatenate(pairs)
            yield from (joined[start : start + BLOCK] for start in range(0, len(joined), BLOCK))
