"""The command `captcha-exp` at the price of a fork, interrupted where one wants it to be. Linux alone.

A server imports what a training takes once (four seconds), and forks a child for each command that it is
asked for. It has one thread and no work behind it, so that a child is what a fresh process is. Imported by
`kill_resume.py` and by tests; run as a program it is the server.
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
"""What a training imports late, beside all modules of captcha_exp"""

PROJECT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 120.0
_NOTE = struct.Struct("=32sqqq")


class Place(NamedTuple):
    """A place in the code: a function, "module:name", and a word that one of its arguments has in it."""

    target: str
    word: str = ""


PHASES = {
    "beginning": Place("captcha_exp.runs.create:create"),
    "store": Place("captcha_exp.tracking.tracker:MlflowTracker.start"),
    "drawing": Place("captcha_exp.data.sources.rendering:draw"),
    "caching": Place("captcha_exp.runtime.files:write_atomically", "/cache/"),
    "training": Place("captcha_exp.training.train:train_epoch"),
    "checkpointing": Place("captcha_exp.model.state:save"),
    "evaluation": Place("captcha_exp.model.evaluate:evaluate"),
    "logging": Place("captcha_exp.tracking.tracker:MlflowTracker.log"),
    "best": Place("captcha_exp.runs.run:Run.write", "model.safetensors"),
    "report": Place("captcha_exp.training.recorder:record_test"),
    "closing": Place("captcha_exp.runs.run:Run.close"),
    "sending": Place("captcha_exp.tracking.tracker:MlflowTracker.finish"),
}
"""What a training does, in the order in which it first does it; what lies between has no name"""

AFTER_STEP = Place("captcha_exp.training.sanity:Guard.note")


@dataclass(frozen=True)
class Interruption:
    """Where a child is interrupted, and how."""

    place: Place | None = None
    """None: counted from the start of the child"""
    call: int = 1
    """of that place, from 1"""
    when: str = "before"
    """before or after the call; within: half of what write_atomically is to write has been written"""
    after_seconds: float | None = None
    """None: at the place itself, exactly; else so long after it was reached"""
    signals: tuple[int, ...] = (signal.SIGKILL,)
    pause_seconds: float = 0.0
    """between two signals"""


@dataclass(frozen=True)
class Ended:
    """How a child ended."""

    code: int  # below 0: by this signal
    output: str
    phase: str  # what it was at when the first signal was sent, or at its end
    signalled: bool
    late: bool  # it did not end within the limit after the last signal, and was killed
    steps_done: int  # of the training, as the child counted them: before this call and in it
    steps_here: int


class ForkServer:
    """Runs commands in forked children, one at a time."""

    def __init__(self, without: Sequence[str] = ()) -> None:
        """`without` are functions, as in `Place`, that do nothing in the children."""
        self._without = list(without)
        path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],  # -P: benchmarks/ is no place for a child to import from
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
        """`captcha-exp WORDS` with its outputs/ in this folder, to its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        output = root / "output.txt"
        order = {
            "words": list(words),
            "environment": os.environ | {"CAPTCHA_EXP_ROOT": str(root)} | environment,
            "output": str(output),
            "interruption": interruption and asdict(interruption),
            "limit_seconds": limit_seconds,
            "without": self._without,
        }
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the fork server ended with exit code {self._process.wait()}")
        return Ended(output=output.read_text(errors="replace"), **json.loads(answer))

    def close(self) -> None:
        self._process.communicate()

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# -- the server ----------------------------------------------------------------------------------------------


def serve() -> Callable[[], object] | None:
    """Forks a child for each line of standard input; in a child, what it is to do."""
    import captcha_exp

    for module in pkgutil.walk_packages(captcha_exp.__path__, "captcha_exp."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in HEAVY:
        importlib.import_module(name)
    threads = {path.read_text().strip() for path in Path("/proc/self/task").glob("[0-9]*/comm")}
    # A fork takes one thread along. The other one that is there is an allocator's, which knows of forks.
    assert len(threads - {"jemalloc_bg_thd"}) == 1, f"threads besides: {threads}"
    for line in sys.stdin:
        order = json.loads(line)
        asked = order["interruption"]
        interruption = asked and Interruption(**{**asked, "place": asked["place"] and Place(*asked["place"])})
        note = Note()
        heard, told = os.pipe()
        if not (pid := os.fork()):
            os.close(heard)
            return functools.partial(_become, order, interruption, note, told)
        os.close(told)
        print(json.dumps(_watch(pid, interruption, note, heard, order["limit_seconds"])), flush=True)
        os.close(heard)
    return None


class Note:
    """What a child writes down for the server, in memory that both have."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _NOTE.size)

    def write(self, phase: str, steps_done: int, steps_here: int) -> None:
        _NOTE.pack_into(self._memory, 0, phase.encode(), steps_done, steps_here, 0)

    def read(self) -> tuple[str, int, int]:
        phase, steps_done, steps_here, _ = _NOTE.unpack_from(self._memory, 0)
        return phase.rstrip(b"\0").decode(), steps_done, steps_here


def _watch(
    pid: int, interruption: Interruption | None, note: Note, heard: int, limit_seconds: float
) -> dict[str, Any]:
    """How the child ended, with the signals that it was to get sent to it in time."""
    ended = os.pidfd_open(pid)
    signalled, phase = False, None
    if interruption is not None and interruption.after_seconds is not None:
        if interruption.place is not None:
            select.select([heard, ended], [], [], limit_seconds)
        pause = interruption.after_seconds
        for number in interruption.signals:
            if select.select([ended], [], [], pause)[0]:
                break
            phase = note.read()[0] if phase is None else phase
            os.kill(pid, number)  # nobody but this process reaps it: the number is still its own
            signalled, pause = True, interruption.pause_seconds
    late = not select.select([ended], [], [], limit_seconds)[0]
    if late:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(ended)
    last, steps_done, steps_here = note.read()
    if interruption is not None and interruption.after_seconds is None:
        signalled = bool(select.select([heard], [], [], 0)[0] and os.read(heard, 1))
    return {
        "code": code,
        "phase": last if phase is None else phase,
        "signalled": signalled,
        "late": late,
        "steps_done": steps_done,
        "steps_here": steps_here,
    }


# -- the child -----------------------------------------------------------------------------------------------


def _become(order: Mapping[str, Any], interruption: Interruption | None, note: Note, told: int) -> None:
    """The command, as in a process of its own."""
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
        os.dup2(descriptor, number)
    os.environ.clear()
    os.environ.update(order["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    for target in order["without"]:
        _replace(target, lambda _: lambda *_, **__: None)
    phases = _Phases(note)
    for name, place in PHASES.items():
        _around(place, functools.partial(phases.within, name))
    _around(AFTER_STEP, phases.step)
    if interruption is not None and interruption.place is not None:
        _plant(interruption, interruption.place, told)

    from captcha_exp.cli.main import main

    sys.argv = ["captcha-exp", *order["words"]]
    main()


class _Phases:
    """Writes down which phase a child is in, and its steps."""

    def __init__(self, note: Note) -> None:
        self._note, self._phase, self._done, self._here = note, "between", 0, 0
        self._write(self._phase)

    def _write(self, phase: str) -> None:
        self._phase = phase
        self._note.write(phase, self._done, self._here)

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
        """Of Guard.note(step, ...), which follows each training step; a plan calls it for none."""
        self._done, self._here = int(arguments[1]) + 1, self._here + 1
        self._write(self._phase)
        yield


def _around(place: Place, context: Callable[[Sequence[Any]], Any]) -> None:
    """A context around each call of this place."""

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
    """A function by one that is made of it, by whatever name a module of captcha_exp knows it."""
    module_name, _, path = target.partition(":")
    *outer, name = path.split(".")
    holder = functools.reduce(getattr, outer, importlib.import_module(module_name))
    old = getattr(holder, name)
    new = make(old)
    if outer:
        setattr(holder, name, new)
        return
    for module in [each for each in sys.modules if each.partition(".")[0] == "captcha_exp"]:
        for key, value in list(vars(sys.modules[module]).items()):
            if value is old:
                setattr(sys.modules[module], key, new)


def _is_name(argument: Any) -> bool:
    return isinstance(argument, str | Path)


def _plant(interruption: Interruption, place: Place, told: int) -> None:
    """Tells the server when the place has been reached, or sends the signals to this process at it."""
    calls = 0

    def reached() -> None:
        os.write(told, b"!")
        if interruption.after_seconds is None:
            for number in interruption.signals:
                os.kill(os.getpid(), number)

    @contextlib.contextmanager
    def context(arguments: Sequence[Any]) -> Iterator[None]:
        nonlocal calls
        calls += 1
        due = calls == interruption.call
        if due and interruption.when == "within":
            path, content = arguments
            path.with_name(f".{path.name}.{os.getpid()}.part").write_bytes(content[: len(content) // 2])
        if due and interruption.when != "after":
            reached()
        yield
        if due and interruption.when == "after":
            reached()

    _around(place, context)


if __name__ == "__main__":
    child = serve()
    if child is not None:
        child()
