"""Alignment of a label with its prediction, to count wrong, missing and added characters."""

from collections.abc import Sequence

import numpy as np

from captcha_exp.data.alphabet import END


def align(label: Sequence[int], predicted: Sequence[int]) -> list[tuple[int, int]]:
    """Return pairs (class id of the label, predicted class id), END for a missing or an added character.

    Texts of equal length are compared position by position, others with the smallest edit distance; of
    several such alignments, one that substitutes where the others insert and delete.

    Source: Wagner and Fischer, The string-to-string correction problem, JACM 21 (1974).
    """
    if len(label) == len(predicted):
        return list(zip(label, predicted, strict=True))
    distance = np.zeros((len(label) + 1, len(predicted) + 1), np.int64)
    distance[:, 0] = np.arange(len(label) + 1)
    distance[0] = np.arange(len(predicted) + 1)
    for i, expected in enumerate(label, 1):
        for j, found in enumerate(predicted, 1):
            substituted = distance[i - 1, j - 1] + (expected != found)
            distance[i, j] = min(substituted, distance[i - 1, j] + 1, distance[i, j - 1] + 1)
    pairs, i, j = [], len(label), len(predicted)
    while i or j:
        if i and j and distance[i, j] == distance[i - 1, j - 1] + (label[i - 1] != predicted[j - 1]):
            i, j = i - 1, j - 1
            pairs.append((label[i], predicted[j]))
        elif i and distance[i, j] == distance[i - 1, j] + 1:
            i -= 1
            pairs.append((label[i], END))
        else:
            j -= 1
            pairs.append((END, predicted[j]))
    return pairs[::-1]
