"""Find the largest batch size that fits in few trials."""

from collections.abc import Callable


def find_max_batch_size(fits: Callable[[int], bool], limit: int, guess: int) -> int:
    """Return a batch size that fits where one more does not, at most `most`; 0 if none fits.

    Verdicts need not be monotonic: the allocator may have room for a batch and not for a smaller one. The
    answer depends on `guess`.
    """
    low, high = 0, limit + 1  # low fits, high does not
    batch = guess
    stride = batch // 32 + 1
    while high - low > 1:
        batch = min(max(batch, low + 1), high - 1)
        low, high = (batch, high) if fits(batch) else (low, batch)
        if low == 0 or high > limit:  # one end is still open
            batch = low + stride if high > limit else high - stride
            stride *= 2
        else:
            batch = (low + high) // 2
    return low
