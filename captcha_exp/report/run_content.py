"""The content of a run's page: the figures of its files, and the predictions on its test split.

A file that is missing or damaged, as in a run of an earlier version, is named on the page.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from captcha_exp.config import flatten_mapping
from captcha_exp.config.documents import parse_yaml, read_document
from captcha_exp.data.alphabet import END
from captcha_exp.data.dataset import Dataset
from captcha_exp.errors import UserError, one_line
from captcha_exp.model.evaluate import Evaluation
from captcha_exp.runs import MetricsRow, SavedRun, training_speed
from captcha_exp.runs.content import Text
from captcha_exp.runs.fields import short_name, to_short_text

CREDENTIALS = re.compile(r"://[^/\s@]*@")  # user:password in a URL
MAX_ENVIRONMENT_ROWS = 200

_Fraction = Annotated[float, Field(ge=0, le=1)]
_Count = Annotated[int, Field(ge=0)]


class _Values(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class PartResult(_Values):
    """Accuracy of some of the images."""

    images: Annotated[int, Field(ge=1)]
    accuracy: _Fraction


class Confusion(_Values):
    """How often a character is read as another; an empty text is no character."""

    label: Text
    predicted: Text
    count: _Count


class RecordedMisread(_Values):
    """A misread image."""

    image: Text
    label: Text
    predicted: Text
    confidence: _Fraction | None = None


class TestResult(_Values):
    """The values of test.json on the page; earlier versions did not write each key."""

    __test__ = False  # not a test of pytest

    images: Annotated[int, Field(ge=1)]
    correct: _Count
    accuracy: _Fraction
    accuracy_low: _Fraction
    accuracy_high: _Fraction
    char_accuracy: _Fraction
    char_accuracy_at_chance: _Fraction | None = None
    by_position: list[_Fraction] = []
    by_position_from_end: list[_Fraction] = []
    by_length: dict[str, PartResult] = {}
    by_folder: dict[Text, PartResult] = {}
    by_character: dict[Text, _Fraction | None] = {}
    confusions: list[Confusion] = []
    misreads: list[RecordedMisread] = []


@dataclass
class RunContent:
    """The files of a run, as far as they can be read."""

    run: SavedRun
    evaluation: Evaluation | None = None
    data: Dataset | None = None
    missing: list[str] = field(default_factory=list)
    """parts that the page lacks, a line each"""

    @property
    def name(self) -> str:
        """The name of the run, as commands accept it."""
        return short_name(self.run.run_dir)

    @cached_property
    def test(self) -> TestResult | None:
        """The content of test.json; None if the run was not tested."""
        values = None if self.run.info.result is None else self._read("test.json")
        if values is None:
            return None
        try:
            return TestResult.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            self.missing.append(f"test.json: {'.'.join(map(str, first['loc']))}: {first['msg']}")
            return None

    @cached_property
    def dataset(self) -> dict[str, Any]:
        """The content of dataset.json, or nothing."""
        return self._read("dataset.json") or {}

    @cached_property
    def memory(self) -> dict[str, Any]:
        """The content of memory.json, or nothing."""
        return self._read("memory.json") or {}

    @cached_property
    def environment(self) -> dict[str, Any]:
        """The content of environment.json, or nothing."""
        return self._read("environment.json") or {}

    @cached_property
    def flat_config(self) -> dict[str, Any]:
        """The resolved config, `group.key` -> value, or nothing."""
        try:
            return self.run.flat_config()
        except UserError as error:
            self._miss("config.yaml", error)
            return {}

    @cached_property
    def configs(self) -> dict[str, str]:
        """File -> text of the resolved and of the requested config."""
        texts = {}
        for name in ("config.yaml", "requested.yaml"):
            try:
                texts[name] = hide_credentials(read_document(self.run.path(name)).decode("utf-8", "replace"))
            except (UserError, OSError, ValueError) as error:
                self._miss(name, error)
        return texts

    @cached_property
    def rows(self) -> list[MetricsRow]:
        """The rows of metrics.jsonl."""
        try:
            return self.run.metrics_rows()
        except UserError as error:
            self._miss("metrics.jsonl", error)
            return []

    @cached_property
    def epochs(self) -> list[tuple[int, Mapping[str, float]]]:
        """Number and metrics of each epoch."""
        return [(row.step, row.metrics) for row in self.rows if "val/accuracy" in row.metrics]

    @cached_property
    def test_metrics(self) -> Mapping[str, float]:
        """The metrics that were logged once, after the test."""
        found: dict[str, float] = {}
        for row in self.rows:
            if "val/accuracy" not in row.metrics:
                found |= row.metrics
        return found

    @property
    def best_epoch(self) -> int:
        """The epoch of the weights; 0 if no epoch has ended."""
        if self.run.info.result is not None:
            return self.run.info.result.best_epoch
        known = [(m["val/accuracy"], -step) for step, m in self.epochs if math.isfinite(m["val/accuracy"])]
        return -max(known)[1] if known else 0

    @property
    def is_disturbed(self) -> bool:
        """Whether the speed of each epoch was disturbed."""
        speed = training_speed(self.rows)
        return speed is not None and speed.is_disturbed

    @property
    def images_per_second(self) -> float | None:
        """Median training speed after the first epoch."""
        speed = training_speed(self.rows)
        return None if speed is None else speed.images_per_second

    def position_counts(self) -> list[int]:
        """Return how many labels have a character at each position; empty if that is not known."""
        if self.evaluation is not None:
            counts = (self.evaluation.targets != END).sum(axis=0).tolist()
            return [count for count in counts if count]
        known = {} if self.test is None else self.test.by_length
        lengths = {int(key): part.images for key, part in known.items() if key.isdecimal() and len(key) < 4}
        return [
            sum(count for length, count in lengths.items() if length > position)
            for position in range(max(lengths, default=0))
        ]

    def environment_rows(self) -> list[tuple[str, str]]:
        """Return key and value of environment.json, the command aside, which has a place of its own."""
        values = {key: value for key, value in self.environment.items() if key != "command"}
        rows = [(key, to_short_text(value)) for key, value in flatten_mapping(values).items()]
        return [(key, hide_credentials(text)) for key, text in rows[:MAX_ENVIRONMENT_ROWS]]

    def changed_settings(self) -> list[tuple[str, str, str]]:
        """Return key, requested and resolved value of each setting that was `auto`."""
        requested = self.configs.get("requested.yaml")
        if requested is None:
            return []
        try:
            flat = flatten_mapping(parse_yaml(requested))
        except ValueError:
            return []
        return [
            (key, "auto", hide_credentials(to_short_text(self.flat_config[key])))
            for key, value in flat.items()
            if value == "auto" and key in self.flat_config and self.flat_config[key] != "auto"
        ]

    def differences(self) -> list[str]:
        """Return how the predictions made now differ from the recorded result, if they do."""
        lines: list[str] = []
        if self.evaluation is None or self.data is None or self.test is None:
            return lines
        recorded = self.dataset.get("images_sha256")
        if recorded and self.data.manifest["images_sha256"] != recorded:
            lines.append("the images have changed since the training")
        now, then = self.evaluation, self.test
        if (now.num_correct, len(now.indices)) != (then.correct, then.images):
            lines.append(
                f"evaluated again, {now.num_correct:,} of {len(now.indices):,} images are correct, and not "
                f"{then.correct:,} of {then.images:,} as recorded"
            )
        return lines

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            return self.run.read_json(name)
        except UserError as error:
            self._miss(name, error)
            return None

    def _miss(self, name: str, error: Exception) -> None:
        self.missing.append(f"{name}: {one_line(error).removeprefix(f'{self.run.run_dir / name}: ')}")


def hide_credentials(text: str) -> str:
    """Return the text without the user and password of a URL."""
    return CREDENTIALS.sub("://***@", text)
