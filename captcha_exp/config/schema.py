"""The config schema: one dataclass per group of conf/, each field with its unit, meaning and limits.

Values are set in conf/, not here: a field has a default only if it was added after a release, and then the
default keeps the old behavior. The text below a field is its description, which error messages show.
"""

import re
from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import AfterValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from captcha_exp.config.gpu import STRICT, GpuSpec
from captcha_exp.config.gpu import Bounds as Bounds  # imported from here by name, like all of the schema
from captcha_exp.config.tracking import MlflowConfig as MlflowConfig
from captcha_exp.config.tracking import NoTrackingConfig as NoTrackingConfig
from captcha_exp.config.tracking import TrackingConfig
from captcha_exp.config.train import AugmentConfig, Auto, Fraction, TrainConfig
from captcha_exp.config.validators import OrInferred, check_alphabet, check_arithmetic, expand_user

Seed: TypeAlias = Annotated[int, Field(ge=0, lt=2**63)]
FilePath: TypeAlias = Annotated[str, Field(min_length=1), AfterValidator(expand_user)]
TextKind: TypeAlias = Literal["characters", "arithmetic"]
Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]
HeadName: TypeAlias = Literal["position", "end_class", "ctc", "grouped_softmax"]


def _check_filename_pattern(value: str) -> str:
    try:
        groups = re.compile(value).groupindex
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"invalid regular expression: {error}") from None
    if "label" not in groups:
        raise ValueError("must have a group named label, as in (?P<label>.+)")
    return value


def _check_labels(value: str | None) -> str | None:
    if value not in (None, "names", "folders") and not value.lower().endswith((".csv", ".tsv", ".jsonl")):
        raise ValueError(
            "must be null, names, folders, or a file in the folder that ends in .csv, .tsv or .jsonl"
        )
    return None if value is None else expand_user(value)


@dataclass(config=STRICT, frozen=True, kw_only=True)
class CaptchaConfig:
    """Size of the images that the network receives, and the labels in them."""

    width: Annotated[int, Field(ge=16, le=2048), OrInferred()]
    """pixels, after the resize"""
    height: Annotated[int, Field(ge=16, le=2048), OrInferred()]
    """pixels, after the resize"""
    channels: Annotated[Literal[1, 3], OrInferred()]
    """1 for grayscale, 3 for RGB"""
    alphabet: Annotated[str, AfterValidator(check_alphabet)]
    """the characters in class order, each once; auto: those of the labels"""
    length: Annotated[int, Field(ge=1, le=32), OrInferred()]
    """characters in a label, in the longest ones if they differ"""
    min_length: Annotated[Annotated[int, Field(ge=1, le=32)] | None, OrInferred()]
    """characters in the shortest labels; null: all have captcha.length characters"""
    case: Annotated[Literal["fold", "keep"], OrInferred()]
    """fold: convert letters of labels to the other case if the alphabet has only that one; keep: labels are
    case-sensitive"""

    @property
    def inferred_keys(self) -> list[str]:
        """The keys that are still `auto`."""
        return [f"captcha.{key}" for key, value in vars(self).items() if value == "auto"]

    def is_auto(self, *keys: str) -> bool:
        """Return whether one of these keys is still `auto`."""
        return any(getattr(self, key) == "auto" for key in keys)

    @property
    def shortest_length(self) -> int:
        """Number of characters in the shortest labels."""
        return self.length if self.min_length is None else self.min_length

    @model_validator(mode="after")
    def _check_min_length(self) -> "CaptchaConfig":
        if not self.is_auto("min_length", "length") and self.shortest_length > self.length:
            raise ValueError(
                f"min_length={self.min_length} is greater than length={self.length}; it must be at most that"
            )
        return self


@dataclass(config=STRICT, frozen=True, kw_only=True)
class BaseDataConfig:
    """Options of every data source."""

    source: str
    """data source"""
    validation_fraction: Fraction
    """fraction of the labels in the validation split, which selects the best epoch"""
    test_fraction: Fraction
    """fraction of the labels in the test split, which is evaluated once, at the end; with data.folds, that of
    a fold counts"""
    folds: Annotated[int, Field(ge=2, le=100)] | None
    """number of equal parts of the labels, one of which is the test split; null: data.test_fraction"""
    fold: Annotated[int, Field(ge=0, le=99)]
    """the part of data.folds that is the test split, from 0"""
    split_seed: Seed
    """seed of the split"""
    cache: FilePath
    """directory of the cached images; a relative path is relative to the directory of outputs/"""

    @model_validator(mode="after")
    def _check_fractions(self) -> "BaseDataConfig":
        if self.folds is not None and self.fold >= self.folds:
            raise ValueError(f"fold={self.fold}: must be less than folds={self.folds}; the first is 0")
        if self.folds is not None and self.validation_fraction + 1 / self.folds >= 1:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} and folds={self.folds} leave no training set"
            )
        if self.folds is None and self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} and test_fraction={self.test_fraction} "
                "leave no training split: their sum must be below 1"
            )
        return self


@dataclass(config=STRICT, frozen=True, kw_only=True)
class BaseGeneratorConfig(BaseDataConfig):
    """Options of every captcha generator."""

    count: Annotated[int, Field(ge=1, le=100_000_000)]
    """number of images"""
    text: TextKind
    """what is rendered: random characters of the alphabet, or sums such as 3+15="""
    seed: Seed
    """seed of the generated images"""
    width: Annotated[int, Field(ge=16, le=4096)]
    """pixels, as rendered"""
    height: Annotated[int, Field(ge=16, le=4096)]
    """pixels, as rendered"""
    fonts: tuple[FilePath, ...]
    """font files: a path or the name of a font shipped with matplotlib; [] for the generator's own fonts"""
    workers: Annotated[int, Field(ge=1, le=1024)] | Auto
    """number of rendering processes; does not affect the images"""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class CaptchaLibraryConfig(BaseGeneratorConfig):
    """The generator of the PyPI package `captcha`."""

    source: Literal["captcha"]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class WheezyLibraryConfig(BaseGeneratorConfig):
    """The generator of the PyPI package `wheezy.captcha`."""

    source: Literal["wheezy"]
    font_sizes: Annotated[tuple[Annotated[int, Field(ge=8, le=512)], ...], Field(min_length=1)]
    """pixels; one is chosen per character"""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ArticleConfig(BaseGeneratorConfig):
    """A generator of images like those of the article."""

    source: Literal["article"]
    text: Literal["characters"]
    """what is rendered: random characters of the alphabet"""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class FolderConfig(BaseDataConfig):
    """Folders of labeled images, including their subfolders, or archives."""

    source: Literal["folder"]
    path: FilePath | Annotated[tuple[FilePath, ...], Field(min_length=1)]
    """path of the folder, or of a .zip or .tar archive, from the working directory; a list for several"""
    shares: tuple[Annotated[float, Field(ge=0.001, le=1000)], ...] | None
    """relative share of each of several folders in the training images of an epoch, which are as many as
    without; null: every image once per epoch"""
    labels: Annotated[str | None, AfterValidator(_check_labels)]
    """names: labels are in the file names; folders: in the names of the subfolders; or a .csv, .tsv or .jsonl
    file in the folder; null: labels or metadata.csv, .tsv or .jsonl if it exists, else the file names"""
    match_by: Literal["path", "name"]
    """how a row of a table names its file: path in the folder; name: file name alone, which must be unique"""
    filename_pattern: Annotated[str, AfterValidator(_check_filename_pattern)]
    """regular expression that matches a whole file name without its suffix; the group (?P<label>...) is the
    label"""
    split_by: Literal["given", "label"]
    """given: the splits that the column split of a table gives, or subfolders named train, validation, test;
    without these, and with label, a hash of the label"""
    apply_corrections: bool
    """apply corrections.csv in the folder, or NAME.zip.corrections.csv next to an archive, if it exists"""
    on_invalid: Literal["error", "skip"]
    """what to do about images that cannot be used: report them as an error, or skip them with a warning"""
    on_conflict: Literal["error", "skip"]
    """what to do about images with equal pixels and different labels: report or skip them all"""
    on_duplicate: Literal["error", "skip", "keep"]
    """what to do about images with equal pixels and labels: report all but the first, skip these, or keep
    them, in the same split"""

    @property
    def paths(self) -> tuple[str, ...]:
        """The folders and archives."""
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def path_text(self) -> str:
        """How a message names data.path."""
        return f"data.path={self.path if isinstance(self.path, str) else '[' + ','.join(self.path) + ']'}"

    @model_validator(mode="after")
    def _check_shares(self) -> "FolderConfig":
        if self.shares is None:
            return self
        if len(self.paths) == 1:
            raise ValueError("shares: is for several folders in path, and there is one; leave it null")
        if len(self.shares) != len(self.paths):
            raise ValueError(
                f"shares={list(self.shares)}: must have a number for each folder in path, {len(self.paths)}"
            )
        return self


GeneratorConfig: TypeAlias = CaptchaLibraryConfig | WheezyLibraryConfig | ArticleConfig
DataConfig: TypeAlias = Annotated[GeneratorConfig | FolderConfig, Field(discriminator="source")]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class BaseModelConfig:
    """Options of every network."""

    name: str
    """network"""
    head: HeadName | Auto
    """classification head and loss. position: a classifier per position with cross entropy; end_class: the
    same with a class for the end, for labels of different lengths; ctc: connectionist temporal
    classification, for these, too; grouped_softmax: the article's, with binary cross entropy; auto: position
    if all labels have one length, else ctc, or end_class if the images are too narrow for ctc"""
    column_pixels: ClassVar[int]
    """pixels of the width of an image for each column of the features"""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class CompactConfig(BaseModelConfig):
    """A small residual network."""

    name: Literal["compact"]
    column_pixels = 4
    channels: Annotated[tuple[Annotated[int, Field(ge=1, le=4096)], ...], Field(min_length=2, max_length=4)]
    """channels of the stem and of each stage"""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ResNet18Config(BaseModelConfig):
    """ResNet-18, the network of the article."""

    name: Literal["resnet18"]
    column_pixels = 8


ModelConfig: TypeAlias = Annotated[CompactConfig | ResNet18Config, Field(discriminator="name")]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class DeviceConfig:
    """Device, precision and memory limits."""

    name: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d{1,3})?)$")]
    """auto, cpu, mps, cuda, cuda:1 ...; auto: cuda if available, else mps, else cpu"""
    precision: Precision | Auto
    """precision of autocast inside the network; weights and loss are always fp32; auto: 16 bits
    where the device computes faster with them, and its results in a test step are right"""
    threads: Annotated[int, Field(ge=1, le=1024)] | Auto
    """number of CPU threads of torch; auto: every physical core that the process may use, or its share of
    them for jobs of a sweep in parallel"""
    preload_limit_mib: Annotated[int, Field(ge=0)]
    """MiB; a split up to this size is kept on the device, a larger one is copied batch by batch"""
    vram_budget_mib: Annotated[int, Field(ge=1)] | None
    """MiB of GPU memory that the process may use: enforced on CUDA, and the budget of memory plans; null: all
    of the GPU's memory"""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SweepConfig:
    """Options of `train -m`."""

    run_over_budget: bool
    """without a CUDA GPU: train jobs predicted to exceed device.vram_budget_mib instead of skipping them"""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class Config:
    """The complete config of a run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    """letters, digits and _.- ; part of the name of the run directory"""
    seed: Seed
    """seed of weight initialization, data order and augmentation"""
    captcha: CaptchaConfig
    data: DataConfig
    model: ModelConfig
    augment: AugmentConfig
    train: TrainConfig
    device: DeviceConfig
    sweep: SweepConfig
    gpu: GpuSpec
    tracking: TrackingConfig

    @model_validator(mode="after")
    def _check_inferred(self) -> "Config":
        if (keys := self.captcha.inferred_keys) and not isinstance(self.data, FolderConfig):
            raise ValueError(
                f"{keys[0]}=auto: is inferred from the images of a folder; write a value for "
                f"data={self.data.source}"
            )
        return self

    @model_validator(mode="after")
    def _check_text(self) -> "Config":
        if getattr(self.data, "text", None) == "arithmetic":
            check_arithmetic(self.captcha.alphabet, self.captcha.shortest_length, self.captcha.length)
        return self

    @model_validator(mode="after")
    def _check_head(self) -> "Config":
        if self.captcha.is_auto("length", "min_length"):
            return self  # checked again when they are inferred
        head, shortest, longest = self.model.head, self.captcha.shortest_length, self.captcha.length
        if head in ("position", "grouped_softmax") and shortest < longest:
            raise ValueError(
                f"model.head={head}: is for labels of one length, but captcha.min_length={shortest} and "
                f"captcha.length={longest}; use model.head=auto, end_class or ctc"
            )
        return self
