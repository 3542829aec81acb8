"""The train state and its checkpoint files.

checkpoint/step-N.safetensors in the run directory contains everything that changes during training: all
tensors, and in the metadata the counters and a SHA-256 of both, since safetensors does not detect flipped
bits. Two checkpoints are kept: if the latest is damaged, training resumes from the one before it.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeAlias

import torch
from pydantic import ConfigDict, Field, TypeAdapter, with_config
from safetensors.torch import save as to_safetensors
from torch import Tensor

from captcha_exp.config import Config, TrainConfig
from captcha_exp.errors import UserError, one_line
from captcha_exp.model.networks import Recognizer
from captcha_exp.model.optim import LossScale
from captcha_exp.model.weights import max_file_bytes, read_tensors, with_sha256
from captcha_exp.runs import list_checkpoints
from captcha_exp.runtime.files import write_atomically

KEEP_LAST = 2
MAX_COPIES = 8  # of the weights in a checkpoint: with moments of the optimizer and the best ones, four
METADATA_KEY = "state"
# Attributes of a TrainState.
_COUNTERS = ("step", "epoch", "best_accuracy", "best_loss", "best_epoch", "last_improved_epoch")


@dataclass
class EpochProgress:
    """The running sums of an unfinished epoch."""

    loss: Tensor  # () sum over its images
    num_correct: Tensor  # () images predicted correctly in training mode
    num_batches: int = 0
    num_images: int = 0
    seconds: float = 0.0  # of training
    chunks: list[Sequence[Any]] = field(default_factory=list)  # number of images, and their CpuTimes

    @staticmethod
    def zeros(device: torch.device) -> "EpochProgress":
        """Return the progress of an epoch that starts."""
        return EpochProgress(
            torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device)
        )


@dataclass
class TrainState:
    """Everything that changes during training."""

    model: Recognizer
    optimizer: torch.optim.Optimizer
    loss_scale: LossScale | None  # fp16 only
    step: int = 0
    epoch: int = 0  # the current one, from 1; between epochs the last one
    progress: EpochProgress | None = None  # of the current epoch; None between epochs
    best_accuracy: float = -1.0
    best_loss: float = math.inf  # the lowest among the epochs with the best accuracy
    best_epoch: int = 0
    last_improved_epoch: int = 0  # the first with the best accuracy
    best_weights: Mapping[str, Tensor] | None = None
    # By time.perf_counter; moved back by the seconds before the checkpoint on resume.
    start_time: float = field(default_factory=time.perf_counter)

    def begin_or_continue_epoch(self, device: torch.device) -> EpochProgress:
        """Continue the interrupted epoch, or begin the next one."""
        if self.progress is None:
            self.epoch += 1
            self.progress = EpochProgress.zeros(device)
        return self.progress

    def update_best(self, accuracy: float, loss: float) -> bool:
        """Keep the weights if this epoch is the best on the validation split; return whether it is.

        Equal accuracies are frequent with few validation images; the lower loss is then better.
        """
        if accuracy > self.best_accuracy:
            self.last_improved_epoch = self.epoch
        elif accuracy < self.best_accuracy or not loss < self.best_loss:
            return False
        self.best_accuracy, self.best_loss, self.best_epoch = accuracy, loss, self.epoch
        # On the host: on the device they would take memory in all later steps.
        self.best_weights = {
            name: value.detach().to("cpu", copy=True) for name, value in self.model.state_dict().items()
        }
        return True

    def should_stop_early(self, train: TrainConfig) -> bool:
        """Return whether more than train.patience epochs passed without improvement."""
        return train.patience is not None and self.epoch - self.last_improved_epoch > train.patience

    def is_finished(self, train: TrainConfig) -> bool:
        """Return whether no epoch remains to be trained."""
        return self.progress is None and (self.epoch >= train.epochs or self.should_stop_early(train))

    def restore_best_weights(self) -> None:
        """Load the weights of the best epoch into the model."""
        if self.best_weights is not None:
            self.model.load_state_dict(dict(self.best_weights))

    def elapsed_seconds(self) -> float:
        """Return the seconds that training has taken, including the processes before an interruption."""
        return time.perf_counter() - self.start_time

    # -- as a file -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Return all tensors by unique names, including the best weights and the global RNG state."""
        tensors = self._current_tensors()
        tensors |= {f"best/{name}": value for name, value in (self.best_weights or {}).items()}
        # Not used by this project, which derives every seed; layers of torch such as dropout would use it.
        tensors["rng/cpu"] = torch.get_rng_state()
        if (device := self._device()).type == "cuda":
            tensors["rng/cuda"] = torch.cuda.get_rng_state(device)
        return tensors

    def _current_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that a training step changes."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        for parameter, values in self.optimizer.state.items():
            tensors |= {f"optimizer/{names[parameter]}/{key}": value for key, value in values.items()}
        for part, owner in (("loss_scale", self.loss_scale), ("progress", self.progress)):
            values = vars(owner) if owner is not None else {}
            tensors |= {f"{part}/{key}": value for key, value in values.items() if isinstance(value, Tensor)}
        return tensors

    def counters(self) -> dict[str, Any]:
        """Return everything that is not a tensor, as JSON values."""
        progress = self.progress and {
            k: v for k, v in vars(self.progress).items() if not isinstance(v, Tensor)
        }
        counters = {name: getattr(self, name) for name in _COUNTERS}
        return {**counters, "progress": progress, "seconds": self.elapsed_seconds()}

    @torch.no_grad()
    def load_state_dict(self, checkpoint: "Checkpoint") -> None:
        """Restore everything from a checkpoint.

        Raises:
            UserError: it belongs to another network or optimizer; start a new run with --resume=never.
        """
        counters, device = checkpoint.counters, self._device()
        progress = counters.progress
        self.progress = None
        if progress is not None:
            self.progress = dataclasses.replace(EpochProgress.zeros(device), **asdict(progress))
        best = {name.removeprefix("best/"): name for name in checkpoint.tensors if name.startswith("best/")}
        # A copy: a tensor of a memory-mapped file would keep the file open.
        self.best_weights = {name: checkpoint.tensors[key].clone() for name, key in best.items()} or None
        self.start_time -= counters.seconds
        for name in _COUNTERS:
            setattr(self, name, getattr(counters, name))
        own, saved = self._current_tensors(), checkpoint.tensors
        expected = own | {"rng/cpu": torch.get_rng_state()}
        if best:
            expected |= {f"best/{name}": value for name, value in self.model.state_dict().items()}
        shapes, saved_shapes = (
            {(name, x.shape, x.dtype) for name, x in each.items() if name != "rng/cuda"}
            for each in (expected, saved)
        )
        if different := shapes ^ saved_shapes:
            raise UserError(
                f"{checkpoint.path}: does not match the config of the run ({min(n for n, *_ in different)} "
                "differs); restore its config.yaml, or start a new run with --resume=never"
            )
        for name, value in own.items():
            value.copy_(saved[name])
        torch.set_rng_state(saved["rng/cpu"])
        if device.type == "cuda" and "rng/cuda" in saved:
            torch.cuda.set_rng_state(saved["rng/cuda"], device)

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


_Count: TypeAlias = Annotated[int, Field(ge=0)]
_Seconds: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Unknown: TypeAlias = (
    Annotated[float, Field(allow_inf_nan=False)] | None
)  # a reused thread ID can be negative
_Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Chunk: TypeAlias = tuple[_Count, _Positive, _Seconds, _Unknown, _Unknown, _Unknown, _Unknown]
"""number of images, and their CpuTimes"""


@with_config(ConfigDict(strict=True))
@dataclass(frozen=True)
class ProgressCounters:
    """The values of an `EpochProgress` that are not tensors."""

    num_batches: _Count
    num_images: _Count
    seconds: _Seconds
    chunks: list[_Chunk]


@with_config(ConfigDict(strict=True))
@dataclass(frozen=True)
class Counters:
    """The values of a `TrainState` that are not tensors, and the seconds of training."""

    step: _Count
    epoch: _Count
    best_accuracy: float
    best_loss: float
    best_epoch: _Count
    last_improved_epoch: _Count
    seconds: _Seconds
    progress: ProgressCounters | None

    @property
    def completed_epochs(self) -> range:
        """The epochs that have ended."""
        return range(1, self.epoch + (self.progress is None))


_COUNTERS_ADAPTER = TypeAdapter(Counters)


class Checkpoint(NamedTuple):
    """The content of a checkpoint file."""

    path: Path
    tensors: Mapping[str, Tensor]
    counters: Counters


def save(checkpoint_dir: Path, state: TrainState) -> Path:
    """Write a checkpoint to disk, remove the oldest ones, and return its path."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.state_dict().items()}
    counters = state.counters()
    checkpoint_dir.mkdir(exist_ok=True)
    path = checkpoint_dir / f"step-{state.step}.safetensors"
    # A single metadata entry, as in a weights file.
    write_atomically(
        path, to_safetensors(tensors, {METADATA_KEY: json.dumps(with_sha256(tensors, counters))})
    )
    prune(checkpoint_dir, KEEP_LAST)
    return path


def prune(checkpoint_dir: Path, keep_last: int) -> None:
    """Remove all but the latest checkpoints, and the damaged ones."""
    for old in (*list_checkpoints(checkpoint_dir)[keep_last:], *checkpoint_dir.glob("*.damaged")):
        old.unlink()


def load_latest(
    checkpoint_dir: Path,
    config: Config,
    warn: Callable[[str], None],
    recorded_epochs: Collection[int] | None = None,
) -> Checkpoint | None:
    """Return the latest valid checkpoint of a config, or None; warn of each damaged one and rename it.

    A checkpoint after an epoch that is missing in `recorded_epochs` is treated as damaged: that epoch has to
    be trained again to be recorded.
    """
    for path in list_checkpoints(checkpoint_dir):
        try:
            loaded = _load(path, config)
            epochs = () if recorded_epochs is None else loaded.counters.completed_epochs
            missing = next((epoch for epoch in epochs if epoch not in (recorded_epochs or ())), None)
            if missing is None:
                return loaded
            problem = f"skipped: metrics.jsonl has no valid line for epoch {missing}"
        except (OSError, ValueError) as error:
            problem = f"damaged, skipped ({one_line(error)})"
        warn(f"{path}: {problem}; using the previous checkpoint, if any")
        path.rename(path.with_name(f"{path.name}.damaged"))
    return None


def _load(path: Path, config: Config) -> Checkpoint:
    tensors, values, _ = read_tensors(path, METADATA_KEY, lambda *_: max_file_bytes(config, MAX_COPIES))
    if not values:
        raise ValueError("not a checkpoint")
    return Checkpoint(path, tensors, _COUNTERS_ADAPTER.validate_json(json.dumps(values)))
