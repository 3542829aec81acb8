"""Find the maximum batch size that fits in few trials."""

from collections.abc import Callable


def find_max_batch_size(fits: Callable[[int], bool], limit: int, guess: int) -> int:
    """Return a batch size up to `limit` that fits while the next larger one does not; 0 if none fits.

    Fitting need not be monotonic: a batch may fit while a smaller one does not, due to fragmentation. The
    result then depends on `guess`.
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
