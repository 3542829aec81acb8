"""The types of a prediction: a range in MiB, and whether it fits."""

from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from pydantic import Field

Fits: TypeAlias = Literal["fits", "does not fit", "unsure"]
MiB = Annotated[float, Field(ge=0)]


class MiBRange(NamedTuple):
    """A range in MiB."""

    min: float
    max: float

    def __str__(self) -> str:
        """Return the range in whole MiB, as 5 to 7 or just 5."""
        low, high = f"{self.min:,.0f}", f"{self.max:,.0f}"
        return low if low == high else f"{low} to {high}"

    def relative_error(self, measured: float) -> float:
        """Return the relative distance from a measured value: positive if the range is above it, 0 inside."""
        return (min(max(measured, self.min), self.max) - measured) / measured


def described(text: str) -> Any:
    """Return the metadata of a field with this description in a JSON Schema; subclasses inherit it."""
    return Field(description=text)
