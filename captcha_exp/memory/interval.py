"""What is foretold: so many MiB within bounds, and whether that fits."""

from typing import Literal, NamedTuple, TypeAlias

Fits: TypeAlias = Literal["fits", "does not fit", "unsure"]


class MiBRange(NamedTuple):
    """MiB, within bounds."""

    min: float
    max: float

    def __str__(self) -> str:
        """5 to 7, or just 5."""
        least, most = f"{self.min:,.0f}", f"{self.max:,.0f}"
        return least if least == most else f"{least} to {most}"

    def relative_error(self, measured: float) -> float:
        """How far this lies beside what was measured, as a share of it; 0 where it holds it."""
        return (min(max(measured, self.min), self.max) - measured) / measured
