"""What is foretold: so many MiB within bounds, and whether that fits."""

from typing import Literal, NamedTuple, TypeAlias

Fits: TypeAlias = Literal["fits", "does not fit", "unsure"]


class Between(NamedTuple):
    """MiB, within bounds."""

    least: float
    most: float

    def __str__(self) -> str:
        """5 to 7, or just 5."""
        least, most = f"{self.least:,.0f}", f"{self.most:,.0f}"
        return least if least == most else f"{least} to {most}"

    def error(self, measured: float) -> float:
        """How far this lies beside what was measured, as a share of it; 0 where it holds it."""
        return (min(max(measured, self.least), self.most) - measured) / measured
