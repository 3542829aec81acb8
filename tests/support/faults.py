"""Faults for the process of a point: what the product has no switch for.

A folder with a sitecustomize.py that imports this module stands on PYTHONPATH (`planted` makes the
environment). Python reads it at the start of each process; it waits until captcha_exp.training.train has been
imported and then plants, in processes of points alone, what FAULTS says: batch size -> fault.
"""

import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

AT_STEP = 2  # counted from 0, of the first epoch
SECONDS_OF_A_SLOW_STEP = 16.0


def planted(folder: Path, faults: Mapping[int, str]) -> dict[str, str]:
    """The environment in which points of these batch sizes have these faults."""
    (folder / "sitecustomize.py").write_text("import faults\nfaults.wait_for_the_training()\n")
    path = os.pathsep.join([str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": path, "FAULTS": json.dumps({str(size): fault for size, fault in faults.items()})}


class _Finder:
    """Find captcha_exp.training.train as Python does, and plant the faults once it has been imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "captcha_exp.training.train":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        read = spec.loader.exec_module

        def read_and_plant(module: ModuleType) -> None:
            read(module)
            _plant(json.loads(os.environ["FAULTS"]))

        spec.loader.exec_module = read_and_plant  # type: ignore[method-assign]  # in this process alone
        return spec


def wait_for_the_training() -> None:
    if "captcha_exp.sweep" in sys.orig_argv:
        sys.meta_path.insert(0, _Finder())


def _plant(faults: Mapping[str, str]) -> None:
    import torch
    from torch._subclasses import FakeTensor

    from captcha_exp.model import evaluate, optim, step

    forward_and_backward, optimise, read = step.forward_and_backward, optim.step, evaluate.predict_split
    due: list[str] = []  # what the optimiser's step is to do

    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is (a test)")

    def new_step(state: Any, batch: Any, config: Any) -> Any:
        fault = faults.get(str(config.train.batch_size))
        due.clear()
        if isinstance(batch.images, FakeTensor) or state.step != AT_STEP:
            return forward_and_backward(state, batch, config)
        if config.train.micro_batch_size is None:
            if fault == "forward":
                out_of_memory()
            if fault == "optimizer":
                due.append(fault)
        _break(fault, state)
        found = forward_and_backward(state, batch, config)
        if fault == "backward" and config.train.micro_batch_size is None:
            out_of_memory()
        return found

    def new_optimise(optimizer: Any, finite: Any, factor: Any) -> None:
        if due:  # half-way: a foreach step that fails has moved a part of its state
            optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"].add_(1)
            out_of_memory()
        optimise(optimizer, finite, factor)

    def new_read(model: Any, split: Any, config: Any, *between: Any) -> Any:
        fake = isinstance(next(model.parameters()), FakeTensor)
        whole = config.train.eval_batch_size == 512
        if faults.get(str(config.train.batch_size)) == "evaluation" and whole and not fake:
            model.eval()
            out_of_memory()
        return read(model, split, config, *between)

    for module, name, new in (
        (step, "forward_and_backward", new_step),
        (optim, "step", new_optimise),
        (evaluate, "read", new_read),
    ):
        setattr(module, name, new)


def _break(fault: str | None, state: Any) -> None:
    match fault:
        case "raise":
            raise ValueError("a mistake of a test, with [brackets]")
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "nan":
            next(state.model.parameters()).data.fill_(float("nan"))
        case "slow":
            time.sleep(SECONDS_OF_A_SLOW_STEP)
        case "wait":
            Path(os.environ["WAITING"]).touch()
            time.sleep(600)
