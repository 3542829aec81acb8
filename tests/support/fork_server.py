"""A fork server that runs the command `captcha-exp` quickly and interrupts it at a chosen point. Linux only.

The server imports all modules of a training once, which takes four seconds, and forks a child for each
command. It has a single thread and has run nothing else, so a child is equivalent to a new process. Tests and
`kill_resume.py` import this module; run as a program it is the server.
"""

import contextlib
import functools
import importlib
import json
import mmap
import os
import pkgutil
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

HEAVY = (
    "PIL.features",
    "alembic.command",
    "captcha.image",
    "hydra._internal.core_plugins.basic_launcher",
    "hydra_plugins",
    "matplotlib.backends.backend_agg",
    "mlflow.store.tracking.sqlalchemy_workspace_store",
    "sqlalchemy.dialects.sqlite",
    "torch._dynamo",
    "torch.profiler._cupti_monitor",
)
"""modules that a training imports late, in addition to those of captcha_exp"""

PROJECT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 120.0
_PROGRESS = struct.Struct("=32sqqq")


class Place(NamedTuple):
    """A function, "module:name", whose arguments contain a word, if one is given."""

    target: str
    word: str = ""


PHASES = {
    "beginning": Place("captcha_exp.runs.create:create_run"),
    "store": Place("captcha_exp.tracking.tracker:MlflowTracker.start"),
    "drawing": Place("captcha_exp.data.sources.rendering:render_images"),
    "caching": Place("captcha_exp.runtime.files:write_atomically", "/cache/"),
    "training": Place("captcha_exp.training.train:train_epoch"),
    "checkpointing": Place("captcha_exp.model.state:save"),
    "evaluation": Place("captcha_exp.model.evaluate:evaluate"),
    "logging": Place("captcha_exp.tracking.tracker:MlflowTracker.log_metrics"),
    "best": Place("captcha_exp.runs.run:Run.write", "model.safetensors"),
    "report": Place("captcha_exp.training.recorder:record_test_results"),
    "closing": Place("captcha_exp.runs.run:Run.close"),
    "sending": Place("captcha_exp.tracking.tracker:MlflowTracker.finish"),
}
"""the phases of a training, in the order of their first occurrence; "between" elsewhere"""

AFTER_STEP = Place("captcha_exp.training.sanity:SanityChecker.observe")


@dataclass(frozen=True)
class Interruption:
    """Where and how a child is interrupted."""

    place: Place | None = None
    """None: relative to the start of the child"""
    call: int = 1
    """the number of the call at which to interrupt, from 1"""
    when: str = "before"
    """before or after the call; within: after write_atomically has written half of its content"""
    after_seconds: float | None = None
    """delay after the call; None: exactly at the call, by the child itself"""
    signals: tuple[int, ...] = (signal.SIGKILL,)
    pause_seconds: float = 0.0
    """pause between two signals"""


@dataclass(frozen=True)
class Ended:
    """How a child exited."""

    code: int  # negative: killed by this signal
    output: str
    phase: str  # at the first signal, or at the end
    signalled: bool
    late: bool  # it did not exit within the limit after the last signal, and was killed
    steps_done: int  # of the training, including earlier processes
    steps_here: int  # in this process


class ForkServer:
    """Runs commands in forked children, one at a time."""

    def __init__(self, without: Sequence[str] = ()) -> None:
        """Start the server; the functions in `without`, as in `Place`, do nothing in the children."""
        self._without = list(without)
        path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],  # -P: a child must not import from benchmarks/
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": path},
            text=True,
        )

    def run(
        self,
        root: Path,
        words: Sequence[str],
        interruption: Interruption | None = None,
        limit_seconds: float = LIMIT_SECONDS,
        **environment: str,
    ) -> Ended:
        """Run `captcha-exp WORDS` to its end, with outputs/ in this directory."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        output = root / "output.txt"
        request = {
            "words": list(words),
            "environment": os.environ | {"CAPTCHA_EXP_ROOT": str(root)} | environment,
            "output": str(output),
            "interruption": interruption and asdict(interruption),
            "limit_seconds": limit_seconds,
            "without": self._without,
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        reply = self._process.stdout.readline()
        if not reply:
            raise RuntimeError(f"the fork server exited with code {self._process.wait()}")
        return Ended(output=output.read_text(errors="replace"), **json.loads(reply))

    def close(self) -> None:
        self._process.communicate()

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# -- the server ----------------------------------------------------------------------------------------------


def serve() -> Callable[[], object] | None:
    """Fork a child for each line of standard input; in a child, return the function to run."""
    import captcha_exp

    for module in pkgutil.walk_packages(captcha_exp.__path__, "captcha_exp."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in HEAVY:
        importlib.import_module(name)
    # Its threads do not exist in a child, which would abort at its end.
    assert "onnxruntime" not in sys.modules
    threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("[0-9]*/comm")}
    # Only the forking thread exists in a child. The background thread of jemalloc handles forks itself.
    assert len(threads - {"jemalloc_bg_thd"}) == 1, f"unexpected threads: {threads}"
    for line in sys.stdin:
        request = json.loads(line)
        values = request["interruption"]
        interruption = values and Interruption(
            **{**values, "place": values["place"] and Place(*values["place"])}
        )
        progress = SharedProgress()
        reader, writer = os.pipe()
        if not (pid := os.fork()):
            os.close(reader)
            return functools.partial(_run_child, request, interruption, progress, writer)
        os.close(writer)
        print(json.dumps(_watch(pid, interruption, progress, reader, request["limit_seconds"])), flush=True)
        os.close(reader)
    return None


class SharedProgress:
    """The phase and the steps of a child, in memory shared with the server."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _PROGRESS.size)

    def write(self, phase: str, steps_done: int, steps_here: int) -> None:
        _PROGRESS.pack_into(self._memory, 0, phase.encode(), steps_done, steps_here, 0)

    def read(self) -> tuple[str, int, int]:
        phase, steps_done, steps_here, _ = _PROGRESS.unpack_from(self._memory, 0)
        return phase.rstrip(b"\0").decode(), steps_done, steps_here


def _watch(
    pid: int,
    interruption: Interruption | None,
    progress: SharedProgress,
    reader: int,
    limit_seconds: float,
) -> dict[str, Any]:
    """Send the signals of the interruption to the child; return how it exited."""
    child = os.pidfd_open(pid)
    signalled, phase = False, None
    if interruption is not None and interruption.after_seconds is not None:
        if interruption.place is not None:
            select.select([reader, child], [], [], limit_seconds)
        pause = interruption.after_seconds
        for number in interruption.signals:
            if select.select([child], [], [], pause)[0]:
                break
            phase = progress.read()[0] if phase is None else phase
            os.kill(pid, number)  # only this process reaps it, so the PID is not reused
            signalled, pause = True, interruption.pause_seconds
    late = not select.select([child], [], [], limit_seconds)[0]
    if late:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(child)
    last, steps_done, steps_here = progress.read()
    if interruption is not None and interruption.after_seconds is None:
        signalled = bool(select.select([reader], [], [], 0)[0] and os.read(reader, 1))
    return {
        "code": code,
        "phase": last if phase is None else phase,
        "signalled": signalled,
        "late": late,
        "steps_done": steps_done,
        "steps_here": steps_here,
    }


# -- the child -----------------------------------------------------------------------------------------------


def _run_child(
    request: Mapping[str, Any], interruption: Interruption | None, progress: SharedProgress, writer: int
) -> None:
    """Run the command as in a new process."""
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
        os.dup2(descriptor, number)
    os.environ.clear()
    os.environ.update(request["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs of a shell
    for target in request["without"]:
        _replace(target, lambda _: lambda *_, **__: None)
    recorder = _PhaseRecorder(progress)
    for name, place in PHASES.items():
        _around(place, functools.partial(recorder.within, name))
    _around(AFTER_STEP, recorder.step)
    if interruption is not None and interruption.place is not None:
        _install(interruption, interruption.place, writer)

    from captcha_exp.cli.main import main

    sys.argv = ["captcha-exp", *request["words"]]
    main()


class _PhaseRecorder:
    """Records the current phase and the steps of a child."""

    def __init__(self, progress: SharedProgress) -> None:
        self._progress, self._phase, self._done, self._here = progress, "between", 0, 0
        self._write(self._phase)

    def _write(self, phase: str) -> None:
        self._phase = phase
        self._progress.write(phase, self._done, self._here)

    @contextlib.contextmanager
    def within(self, phase: str, _: Sequence[Any]) -> Iterator[None]:
        outer = self._phase
        self._write(phase)
        try:
            yield
        finally:
            self._write(outer)

    @contextlib.contextmanager
    def step(self, arguments: Sequence[Any]) -> Iterator[None]:
        """Count a step at SanityChecker.observe(step, ...), which follows each training step."""
        self._done, self._here = int(arguments[1]) + 1, self._here + 1
        self._write(self._phase)
        yield


def _around(place: Place, context: Callable[[Sequence[Any]], Any]) -> None:
    """Wrap each call of this function in a context."""

    def around(old: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(old)
        def new(*arguments: Any, **named: Any) -> Any:
            if place.word and not any(place.word in str(each) for each in arguments if _is_name(each)):
                return old(*arguments, **named)
            with context(arguments):
                return old(*arguments, **named)

        return new

    _replace(place.target, around)


def _replace(target: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a function in all modules of captcha_exp that refer to it."""
    module_name, _, path = target.partition(":")
    *outer, name = path.split(".")
    owner = functools.reduce(getattr, outer, importlib.import_module(module_name))
    old = getattr(owner, name)
    new = make(old)
    if outer:
        setattr(owner, name, new)
        return
    for module in [each for each in sys.modules if each.partition(".")[0] == "captcha_exp"]:
        for key, value in list(vars(sys.modules[module]).items()):
            if value is old:
                setattr(sys.modules[module], key, new)


def _is_name(argument: Any) -> bool:
    return isinstance(argument, str | Path)


def _install(interruption: Interruption, place: Place, writer: int) -> None:
    """Notify the server when the function is called, or send the signals to this process then."""
    calls = 0

    def interrupt() -> None:
        os.write(writer, b"!")
        if interruption.after_seconds is None:
            for number in interruption.signals:
                os.kill(os.getpid(), number)

    @contextlib.contextmanager
    def context(arguments: Sequence[Any]) -> Iterator[None]:
        nonlocal calls
        calls += 1
        is_due = calls == interruption.call
        if is_due and interruption.when == "within":
            path, content = arguments
            path.with_name(f".{path.name}.{os.getpid()}.part").write_bytes(content[: len(content) // 2])
        if is_due and interruption.when != "after":
            interrupt()
        yield
        if is_due and interruption.when == "after":
            interrupt()

    _around(place, context)


if __name__ == "__main__":
    child = serve()
    if child is not None:
        child()
