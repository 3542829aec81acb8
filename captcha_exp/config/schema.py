"""What can be set: one dataclass per group of conf/, each field with its unit, meaning and limits.

Numbers are written in conf/, never here: a field has a default only when it was added after a release, and
then the default is the old behaviour. The text under a field is part of the answer to whoever writes
something else there.
"""

import re
from typing import Annotated, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from captcha_exp.config.gpu import STRICT, GpuSpec
from captcha_exp.config.gpu import Bounds as Bounds  # found here by its name, as all of the schema
from captcha_exp.config.train import AugmentConfig, Auto, Fraction, TrainConfig
from captcha_exp.config.validators import alphabet_error

Seed: TypeAlias = Annotated[int, Field(ge=0, lt=2**63)]
Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class CaptchaConfig:
    """What a picture looks like to the network, and what can stand in it."""

    width: Annotated[int, Field(ge=16, le=2048)]
    """pixels, after the resize"""
    height: Annotated[int, Field(ge=16, le=2048)]
    """pixels, after the resize"""
    channels: Literal[1, 3]
    """1 for grey, 3 for RGB"""
    alphabet: str
    """the characters, in class order, each once"""
    length: Annotated[int, Field(ge=1, le=32)]
    """characters in a label"""
    case: Literal["fold", "keep"]
    """fold: a letter of a label that the alphabet has in the other case alone is taken for that one; keep: no
    letter is taken for another"""

    @field_validator("alphabet")
    @classmethod
    def _check_alphabet(cls, value: str) -> str:
        if mistake := alphabet_error(value):
            raise ValueError(mistake)
        return value


@dataclass(config=STRICT, frozen=True, kw_only=True)
class BaseDataConfig:
    """What every source of pictures has."""

    source: str
    """which source it is"""
    validation_fraction: Fraction
    """share of the labels whose pictures choose the best epoch"""
    test_fraction: Fraction
    """share of the labels whose pictures are looked at once, at the end"""
    split_seed: Seed
    """another number is another split"""
    cache: str
    """folder of the prepared pictures; a relative one stands beside outputs/"""

    @model_validator(mode="after")
    def _check_fractions(self) -> "BaseDataConfig":
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} and test_fraction={self.test_fraction} "
                "leave nothing to train on: their sum must be below 1"
            )
        return self


@dataclass(config=STRICT, frozen=True, kw_only=True)
class BaseGeneratorConfig(BaseDataConfig):
    """Pictures that a generator draws."""

    count: Annotated[int, Field(ge=1, le=100_000_000)]
    """images"""
    seed: Seed
    """another number is another set of pictures"""
    width: Annotated[int, Field(ge=16, le=4096)]
    """pixels, as drawn"""
    height: Annotated[int, Field(ge=16, le=4096)]
    """pixels, as drawn"""
    fonts: tuple[str, ...]
    """font files: a path, or the name of a free font that matplotlib brings; none for the generator's own"""
    workers: Annotated[int, Field(ge=1, le=1024)] | Auto
    """drawing processes; the pictures do not depend on it"""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class CaptchaLibraryConfig(BaseGeneratorConfig):
    """Pictures of the PyPI package `captcha`."""

    source: Literal["captcha"]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class WheezyLibraryConfig(BaseGeneratorConfig):
    """Pictures of the PyPI package `wheezy.captcha`."""

    source: Literal["wheezy"]
    font_sizes: Annotated[tuple[Annotated[int, Field(ge=8, le=512)], ...], Field(min_length=1)]
    """pixels; each character takes one of them"""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ArticleConfig(BaseGeneratorConfig):
    """Pictures after the recipe of those that the article reads."""

    source: Literal["article"]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class FolderConfig(BaseDataConfig):
    """A folder of labelled pictures, and those in the folders inside it."""

    source: Literal["run_dir"]
    path: Annotated[str, Field(min_length=1)]
    """the folder; a relative one is looked for in the working directory"""
    labels: str | None
    """names: in the file names; or a file in the folder, .csv, .tsv or .jsonl; null: labels.csv, .tsv or
    .jsonl if one is there, else the names"""
    filename_pattern: str
    """regular expression of a whole file name without its ending; its group (?P<label>...) is the label"""
    on_invalid: Literal["error", "skip"]
    """what pictures that cannot be used do: refuse the run, or stay out of it"""

    @field_validator("pattern")
    @classmethod
    def _check_filename_pattern(cls, value: str) -> str:
        try:
            groups = re.compile(value).groupindex
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"is no regular expression: {error}") from None
        if "label" not in groups:
            raise ValueError("must have a group named label, as in (?P<label>.+)")
        return value

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, value: str | None) -> str | None:
        if value not in (None, "names") and not value.lower().endswith((".csv", ".tsv", ".jsonl")):
            raise ValueError("must be null, names, or a file in the folder that ends in .csv, .tsv or .jsonl")
        return value


GeneratorConfig: TypeAlias = CaptchaLibraryConfig | WheezyLibraryConfig | ArticleConfig
DataConfig: TypeAlias = Annotated[GeneratorConfig | FolderConfig, Field(discriminator="source")]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class BaseModelConfig:
    """What every network has."""

    name: str
    """which network it is"""
    head: Literal["position", "grouped_softmax"]
    """how features become characters: cross entropy per position, or the article's grouped softmax with
    BCE"""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class CompactConfig(BaseModelConfig):
    """The small network of this project."""

    name: Literal["compact"]
    channels: Annotated[tuple[Annotated[int, Field(ge=1, le=4096)], ...], Field(min_length=2, max_length=4)]
    """channels of the stem and of each stage"""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ResNet18Config(BaseModelConfig):
    """The article's network."""

    name: Literal["resnet18"]


ModelConfig: TypeAlias = Annotated[CompactConfig | ResNet18Config, Field(discriminator="name")]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class DeviceConfig:
    """The machine that trains."""

    name: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d{1,3})?)$")]
    """auto, cpu, mps, cuda, cuda:1 ...; auto takes a CUDA card, else mps, else the CPU"""
    precision: Precision | Auto
    """numbers inside the network; weights and loss are always fp32; auto takes the fastest whose numbers one
    checked step shows to be right on the device"""
    threads: Annotated[int, Field(ge=1, le=1024)] | Auto
    """threads of the CPU's arithmetic; auto takes every core that the process may use"""
    preload_limit_mib: Annotated[int, Field(ge=0)]
    """MiB; a split up to this size lives on the device, a larger one is sent batch by batch"""
    vram_budget_mib: Annotated[int, Field(ge=1)] | None
    """MiB of a graphics card that the whole process may take: a CUDA card refuses more, and a plan is held
    against it; null is all that the card has"""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SweepConfig:
    """What `train -m` does with its points."""

    run_over_budget: bool
    """without a CUDA card: train what does not fit device.vram_budget_mib too, rather than only record it"""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class MlflowConfig:
    """A record in MLflow, beside the one in the run's folder."""

    backend: Literal["mlflow"]
    uri: str
    """the tracking store; auto is SQLite in mlruns/ beside outputs/"""
    experiment: Annotated[str, Field(min_length=1)]
    """name of the MLflow experiment"""

    @field_validator("uri")
    @classmethod
    def _check_uri(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            secret = parts.password is not None or re.search(
                r"(?i)(passw(or)?d|pwd|token|secret|(api|access)_?key)=", parts.query
            )
        except ValueError as error:
            raise ValueError(f"not a URI: {error}") from None
        if secret:
            raise PydanticCustomError(
                "secret",
                "a secret must not get into the record of a run; give it by the environment "
                "(MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD, MLFLOW_TRACKING_TOKEN)",
            )
        if parts.scheme == "file" or (value != "auto" and "://" not in value):
            raise ValueError(
                "MLflow keeps no runs in plain folders any more; write auto, sqlite:///PATH or http://HOST"
            )
        return value


@dataclass(config=STRICT, frozen=True, kw_only=True)
class NoTrackingConfig:
    """The run's folder is the only record."""

    backend: Literal["none"]


TrackingConfig: TypeAlias = Annotated[MlflowConfig | NoTrackingConfig, Field(discriminator="backend")]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class Config:
    """Everything that a run is."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    """letters, digits and _.- ; part of the run's folder name"""
    seed: Seed
    """of the weights and of the order of the batches"""
    captcha: CaptchaConfig
    data: DataConfig
    model: ModelConfig
    augment: AugmentConfig
    train: TrainConfig
    device: DeviceConfig
    sweep: SweepConfig
    gpu: GpuSpec
    tracking: TrackingConfig
