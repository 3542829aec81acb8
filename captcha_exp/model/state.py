"""What a training has reached, and the file from which an interrupted one goes on.

checkpoint/step-N.safetensors in the run's folder holds all that changes while a training runs: every tensor,
and as text the counters and a SHA-256 over both, since safetensors itself sees no flipped bit. Two
generations are kept, so that a damaged one costs the steps since the one before it, and not the training.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from captcha_exp.config import CHECKPOINT_EVERY_PATTERN, TrainConfig
from captcha_exp.errors import UserError
from captcha_exp.model.networks import Recognizer
from captcha_exp.model.optim import LossScale
from captcha_exp.model.weights import tensors_sha256
from captcha_exp.runs import list_checkpoints
from captcha_exp.runtime.files import write_atomically

KEEP_LAST = 2
_COUNTERS = (
    "step",
    "epoch",
    "best_accuracy",
    "best_loss",
    "best_epoch",
    "last_improved_epoch",
)  # of a TrainState


@dataclass
class EpochProgress:
    """How far an epoch has come."""

    loss: Tensor  # () sum over its pictures
    num_correct: Tensor  # () pictures read right in training mode
    num_batches: int = 0
    num_images: int = 0  # pictures
    seconds: float = 0.0  # of training

    @staticmethod
    def zeros(device: torch.device) -> "EpochProgress":
        """An epoch that begins."""
        return EpochProgress(
            torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device)
        )


@dataclass
class TrainState:
    """Everything that changes while a training runs."""

    model: Recognizer
    optimizer: torch.optim.Optimizer
    loss_scale: LossScale | None  # for fp16 alone
    step: int = 0
    epoch: int = 0  # the one under way, from 1; between epochs the last one
    progress: EpochProgress | None = None  # of the epoch under way; None between epochs
    best_accuracy: float = -1.0
    best_loss: float = math.inf  # the least of those with the best accuracy
    best_epoch: int = 0
    last_improved_epoch: int = 0  # the first one with the best accuracy
    best_weights: Mapping[str, Tensor] | None = None
    start_time: float = field(
        default_factory=time.perf_counter
    )  # earlier, by what it took before a checkpoint

    def begin_or_continue_epoch(self, device: torch.device) -> EpochProgress:
        """The epoch that was interrupted, or else the next one."""
        if self.progress is None:
            self.epoch += 1
            self.progress = EpochProgress.zeros(device)
        return self.progress

    def update_best(self, accuracy: float, loss: float) -> bool:
        """Whether this epoch is better on the validation split than any before; then its weights are kept.

        Of equal accuracies, which are frequent where few pictures validate, the lesser loss is better.
        """
        if accuracy > self.best_accuracy:
            self.last_improved_epoch = self.epoch
        elif accuracy < self.best_accuracy or not loss < self.best_loss:
            return False
        self.best_accuracy, self.best_loss, self.best_epoch = accuracy, loss, self.epoch
        # On the host, where memory is plenty; on the device they would stand beside all later steps.
        self.best_weights = {
            name: value.detach().to("cpu", copy=True) for name, value in self.model.state_dict().items()
        }
        return True

    def epochs_since_improvement(self) -> int:
        """Epochs since the last one that was more accurate than all before it."""
        return self.epoch - self.last_improved_epoch

    def should_stop_early(self, train: TrainConfig) -> bool:
        """Whether more epochs than train.patience have brought no gain."""
        return train.patience is not None and self.epochs_since_improvement() > train.patience

    def is_finished(self, train: TrainConfig) -> bool:
        """Whether there is no epoch more to train."""
        return self.progress is None and (self.epoch >= train.epochs or self.should_stop_early(train))

    def restore_best_weights(self) -> None:
        """The weights of the best epoch, in the model."""
        if self.best_weights is not None:
            self.model.load_state_dict(dict(self.best_weights))

    def elapsed_seconds(self) -> float:
        """Seconds that the training has taken, in all processes that had a part in it."""
        return time.perf_counter() - self.start_time

    # -- as a file -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor by a name of its own, as it is, best weights and global chance among them."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        found = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        for parameter, values in self.optimizer.state.items():
            found |= {f"optimizer/{names[parameter]}/{key}": value for key, value in values.items()}
        if self.loss_scale is not None:
            found["loss_scale/factor"] = self.loss_scale.factor
            found["loss_scale/good_steps"] = self.loss_scale.good_steps
        if self.progress is not None:
            found |= {"progress/loss": self.progress.loss, "progress/num_correct": self.progress.num_correct}
        found |= {f"best/{name}": value for name, value in (self.best_weights or {}).items()}
        # Every draw of ours has a key and needs none of it; a layer of torch's own, dropout say, would.
        found["rng/cpu"] = torch.get_rng_state()
        if (device := self._device()).type == "cuda":
            found["rng/cuda"] = torch.cuda.get_rng_state(device)
        return found

    def counters(self) -> dict[str, Any]:
        """All that is no tensor."""
        done = self.progress
        return {
            **{name: getattr(self, name) for name in _COUNTERS},
            "progress": done
            and {"batches": done.num_batches, "seen": done.num_images, "seconds": done.seconds},
            "seconds": self.elapsed_seconds(),
        }

    @torch.no_grad()
    def load_state_dict(self, checkpoint: "Checkpoint") -> None:
        """All of it as it was when it was saved.

        Raises:
            UserError: it is the checkpoint of another network or optimiser.
        """
        counters, device = checkpoint.counters, self._device()
        done = counters["progress"]
        self.progress = done and dataclasses.replace(EpochProgress.zeros(device), **done)
        best = {name.removeprefix("best/"): name for name in checkpoint.tensors if name.startswith("best/")}
        # A copy: a tensor that stands in a mapped file would keep the file.
        self.best_weights = {name: checkpoint.tensors[key].clone() for name, key in best.items()} or None
        self.start_time -= counters["seconds"]
        for name in _COUNTERS:
            setattr(self, name, counters[name])
        apart = ("best/", "chance/")
        own = {name: value for name, value in self.state_dict().items() if not name.startswith(apart)}
        others = {name for name in checkpoint.tensors if not name.startswith(apart)} ^ own.keys()
        others |= {name for name in own.keys() - others if own[name].shape != checkpoint.tensors[name].shape}
        if others:
            raise UserError(
                f"{checkpoint.path}: does not fit the run's config: {min(others)} is not the "
                "same; the config was "
                "changed, or the file is another run's. captcha-exp train --resume=never starts anew"
            )
        for name, value in own.items():
            value.copy_(checkpoint.tensors[name])
        torch.set_rng_state(checkpoint.tensors["rng/cpu"])
        if device.type == "cuda" and "rng/cuda" in checkpoint.tensors:
            torch.cuda.set_rng_state(checkpoint.tensors["rng/cuda"], device)

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


class Checkpoint(NamedTuple):
    """A state as it was saved."""

    path: Path
    tensors: Mapping[str, Tensor]
    counters: Mapping[str, Any]

    def completed_epochs(self) -> set[int]:
        """Those that had ended."""
        under_way = self.counters["progress"] is not None
        return set(range(1, self.counters["epoch"] + (not under_way)))


def save(checkpoint_dir: Path, state: TrainState) -> Path:
    """The file of the state, on the disk when this returns; then files before the last generations go."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.state_dict().items()}
    counters = json.dumps(state.counters())
    values = {**json.loads(counters), "sha256": _digest(tensors, counters)}
    checkpoint_dir.mkdir(exist_ok=True)
    path = checkpoint_dir / f"step-{state.step}.safetensors"
    # One key alone, as in a file of weights.
    write_atomically(path, to_safetensors(tensors, {"state": json.dumps(values)}))
    prune(checkpoint_dir, KEEP_LAST)
    return path


def prune(checkpoint_dir: Path, keep_last: int) -> None:
    """No file but the newest ones; damaged ones go, too."""
    for old in (*list_checkpoints(checkpoint_dir)[keep_last:], *checkpoint_dir.glob("*.damaged")):
        old.unlink()


def load_latest(
    checkpoint_dir: Path, warn: Callable[[str], None], recorded_epochs: Collection[int] | None = None
) -> Checkpoint | None:
    """The newest whole checkpoint; None where there is none. A damaged one is told of and set aside.

    One that comes after an epoch that is not recorded is told of and set aside, too: that epoch is to be
    trained again.
    """
    for path in list_checkpoints(checkpoint_dir):
        try:
            found = _load(path)
            lost = set() if recorded_epochs is None else found.completed_epochs().difference(recorded_epochs)
            if not lost:
                return found
            trouble = f"is not used, since metrics.jsonl has no whole line of epoch {min(lost)}"
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            trouble = f"is damaged and not used ({reason})"
        warn(f"{path}: {trouble}; the checkpoint before it is, if there is one")
        path.rename(path.with_name(f"{path.name}.damaged"))
    return None


def _load(path: Path) -> Checkpoint:
    with safetensors.safe_open(path, "pt") as file:
        counters = json.loads(file.metadata()["state"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    expected = counters.pop("sha256")
    if _digest(tensors, json.dumps(counters)) != expected:
        raise ValueError("its SHA-256 is another")
    return Checkpoint(path, tensors, counters)


def _digest(tensors: Mapping[str, Tensor], counters: str) -> str:
    return hashlib.sha256(f"{tensors_sha256(tensors)} {counters}".encode()).hexdigest()


class CheckpointInterval:
    """Says when it is time for a checkpoint, by train.checkpoint_every."""

    def __init__(self, every: str | None, clock: Callable[[], float] = time.monotonic) -> None:
        parts = CHECKPOINT_EVERY_PATTERN.fullmatch(every or "")
        self._every, self._unit = (int(parts[1]), parts[2]) if parts else (0, "")
        self._clock, self._last_saved = clock, clock()

    def is_due(self, state: TrainState) -> bool:
        """After a step, or an epoch."""
        match self._unit:
            case "step":
                return state.progress is not None and state.step % self._every == 0
            case "epoch":
                return state.progress is None and state.epoch % self._every == 0
            case "minute":
                return self._clock() - self._last_saved >= 60 * self._every
        return False

    def reset(self) -> None:
        """Minutes are counted from here."""
        self._last_saved = self._clock()
