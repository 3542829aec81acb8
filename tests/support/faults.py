"""Fault injection for the processes of a sweep's jobs.

`inject_faults` makes an environment in which PYTHONPATH has a sitecustomize.py that imports this module. In
the processes of jobs it waits until captcha_exp.training.train is imported and then injects the faults of the
variable FAULTS, a mapping from batch size to fault.
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
SLOW_STEP_SECONDS = 16.0


def inject_faults(folder: Path, faults: Mapping[int, str]) -> dict[str, str]:
    """Return the environment in which jobs of these batch sizes have these faults."""
    (folder / "sitecustomize.py").write_text("import faults\nfaults.wait_for_train_import()\n")
    path = os.pathsep.join([str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": path, "FAULTS": json.dumps({str(size): fault for size, fault in faults.items()})}


class _Finder:
    """An import finder that injects the faults after captcha_exp.training.train is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "captcha_exp.training.train":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        exec_module = spec.loader.exec_module

        def exec_and_inject(module: ModuleType) -> None:
            exec_module(module)
            _inject(json.loads(os.environ["FAULTS"]))

        spec.loader.exec_module = exec_and_inject  # type: ignore[method-assign]  # in this process only
        return spec


def wait_for_train_import() -> None:
    """Inject the faults once training is imported, if this is the process of a job."""
    if "captcha_exp.sweep" in sys.orig_argv:
        sys.meta_path.insert(0, _Finder())


def _inject(faults: Mapping[str, str]) -> None:
    import torch
    from torch._subclasses import FakeTensor

    from captcha_exp.model import evaluate, optim, step

    forward_and_backward, optim_step = step.forward_and_backward, optim.step
    predict_split = evaluate.predict_split
    due: list[str] = []  # the fault of the next optimizer step

    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate too much (a test)")

    def faulty_forward_and_backward(state: Any, batch: Any, config: Any) -> Any:
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
        result = forward_and_backward(state, batch, config)
        if fault == "backward" and config.train.micro_batch_size is None:
            out_of_memory()
        return result

    def faulty_optim_step(optimizer: Any, finite: Any, factor: Any) -> None:
        if due:  # a foreach step that fails has updated a part of its state
            optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"].add_(1)
            out_of_memory()
        optim_step(optimizer, finite, factor)

    def faulty_predict_split(model: Any, split: Any, config: Any, *after_batch: Any) -> Any:
        is_fake = isinstance(next(model.parameters()), FakeTensor)
        is_unsplit = config.train.eval_batch_size == 512
        if faults.get(str(config.train.batch_size)) == "evaluation" and is_unsplit and not is_fake:
            model.eval()
            out_of_memory()
        return predict_split(model, split, config, *after_batch)

    for module, name, new in (
        (step, "forward_and_backward", faulty_forward_and_backward),
        (optim, "step", faulty_optim_step),
        (evaluate, "predict_split", faulty_predict_split),
    ):
        setattr(module, name, new)


def _break(fault: str | None, state: Any) -> None:
    match fault:
        case "raise":
            raise ValueError("an injected error, with [brackets]")
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "nan":
            next(state.model.parameters()).data.fill_(float("nan"))
        case "slow":
            time.sleep(SLOW_STEP_SECONDS)
        case "wait":
            Path(os.environ["WAITING"]).touch()
            time.sleep(600)
