"""The JSON files of a run, as types that are checked when they are read.

They have the keys that are read; other ones are kept and not checked.
"""

import functools
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, InstanceOf, TypeAdapter, ValidationError

Text: TypeAlias = InstanceOf[str]
"""may have lone surrogates, of a file name that is not valid UTF-8; pydantic's own strings reject them"""

_Count = Annotated[int, Field(ge=0)]
_Range = Annotated[tuple[float, float], Field(strict=False)]  # JSON has lists


class _Values(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="allow")


class PlannedMemory(_Values):
    """memory.json, and the plan of a job in sweep.json."""

    process_mib: _Range
    budget_mib: _Range | None
    fits: Literal["fits", "does not fit", "unsure"] | None


class _Image(_Values):
    file: Text
    sha256: str
    label: Text


class _RejectedImage(_Values):
    file: Text
    reason: Text


class _Provenance(_Values):
    captcha: dict[str, Any]
    source: dict[str, Any]
    dependencies: dict[str, Any]


class _Dataset(_Values):
    key: str
    provenance: _Provenance
    images_sha256: str
    labels_sha256: str
    images: _Count
    distinct_labels: _Count
    splits: dict[Literal["train", "validation", "test"], Annotated[int, Field(ge=1)]]
    files: list[_Image]
    rejected: list[_RejectedImage]


class _Misread(_Values):
    image: Text
    label: Text
    predicted: Text


class _TestResult(_Values):
    images: Annotated[int, Field(ge=1)]
    misreads: list[_Misread]


class _Git(_Values):
    commit: str | None = None
    branch: str | None = None
    dirty: bool | None = None


class _Environment(_Values):
    captcha_exp: str | None
    git: _Git | None
    code_sha256: str
    packages: dict[str, str | None]
    variables: dict[str, str]
    device: dict[str, Any]


_TYPES: dict[str, Any] = {
    "code.json": dict[Text, str],
    "dataset.json": _Dataset,
    "environment.json": _Environment,
    "memory.json": PlannedMemory,
    "test.json": _TestResult,
}


def check_content(name: str, values: dict[str, Any]) -> None:
    """Check the values of a JSON file of a run.

    Raises:
        ValueError: A key is missing, or has a value of another type.
    """
    try:
        _adapter(name).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}") from None


@functools.cache
def _adapter(name: str) -> TypeAdapter[Any]:
    return TypeAdapter(_TYPES[name])
