"""Test the scripts for a GPU machine without network, with a fake pip and a fake session."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[2]
BENCHMARKS = PROJECT / "benchmarks"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts need bash")

# A fake gpu_session.py that records its arguments; tests append its behavior.
SESSION = """
import json, os, signal, sys, time
from pathlib import Path

arguments = sys.argv[1:]
out = Path(arguments[arguments.index("--out") + 1])
received = {"arguments": arguments, "path": os.environ["PYTHONPATH"]}
received["telemetry"] = os.environ["MLFLOW_DISABLE_TELEMETRY"]
Path("received.json").write_text(json.dumps(received))
part = {"figures": {"mib": 1}, "wall_seconds": 1.5}
session = {"machine": {"gpu": "Some GPU", "torch": "2.11.0"}, "parts": {"plan-one": part}}
print("plan-one: done", flush=True)
"""
WRITES = SESSION + "out.write_text(json.dumps(session))\n"
WAITS = """
def end(number, frame):
    session["parts"]["plan-two"] = {"error": "was stopped", "wall_seconds": 0.1}
    out.write_text(json.dumps(session))
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
Path("ready").touch()
while True:
    time.sleep(0.01)
"""


class FakeProject:
    """A project folder with gpu_run.sh and a fake gpu_session.py."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "benchmarks").mkdir(parents=True)
        shutil.copy(BENCHMARKS / "gpu_run.sh", folder / "benchmarks")
        self.out = folder / "results" / "session.json"

    def command(self, session: str, *arguments: str) -> list[str]:
        (self.folder / "benchmarks" / "gpu_session.py").write_text(session)
        return ["bash", str(self.folder / "benchmarks" / "gpu_run.sh"), *arguments]

    def run(self, session: str, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        command = self.command(session, *arguments)
        return subprocess.run(command, env=self.environment(**variables), capture_output=True, text=True)

    @staticmethod
    def environment(**variables: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return kept | {"PYTHON": sys.executable} | variables

    def failure(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(Path(f"{self.out}.failed.json").read_text())
        return content


@pytest.fixture
def project(tmp_path: Path) -> FakeProject:
    return FakeProject(tmp_path / "a project")


def make_wheel(
    folder: Path, name: str, version: str, *requires: str, tag: str = "py3-none-any", python: str = ">=3.8"
) -> Path:
    """Write a wheel with one module, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name}-{version}"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Python: {python}"]
    metadata += [f"Requires-Dist: {one}" for one in requires]
    path = folder / f"{stem}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", f"VERSION = {version!r}\n")
        archive.writestr(f"{stem}.dist-info/METADATA", "\n".join(metadata) + "\n")
        archive.writestr(
            f"{stem}.dist-info/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n"
        )
        archive.writestr(f"{stem}.dist-info/RECORD", "")
    return path


@pytest.mark.parametrize("script", ["gpu_run.sh", "collect_wheels.sh", "rehearse.sh"])
def test_scripts_are_valid_bash(script: str) -> None:
    subprocess.run(["bash", "-n", str(BENCHMARKS / script)], check=True)


@pytest.mark.parametrize("script", ["gpu_run.sh", "collect_wheels.sh", "rehearse.sh"])
def test_missing_arguments_are_an_error(script: str) -> None:
    done = subprocess.run(["bash", str(BENCHMARKS / script)], capture_output=True, text=True)

    assert done.returncode == 2
    assert script in done.stdout + done.stderr


def test_a_call_gets_arguments_and_environment_and_prints_a_table(project: FakeProject) -> None:
    arguments = ["--call", "2", "--seconds", "150", "--predictions", "p.json", "--out", str(project.out)]

    done = project.run(WRITES, *arguments, PYTHONPATH="/elsewhere")

    assert done.returncode == 0, done.stderr
    received = json.loads((project.folder / "received.json").read_text())
    arguments[5] = str(Path.cwd() / "p.json")  # relative to the caller's folder
    assert received["arguments"] == arguments
    assert received["path"].split(":") == [
        str(project.folder),
        str(project.folder / "benchmarks/.site"),
        "/elsewhere",
    ]
    assert received["telemetry"] == "true"
    assert json.loads(project.out.read_text())["parts"]["plan-one"]["figures"] == {"mib": 1}
    assert done.stdout.splitlines()[-2].split() == ["plan-one", "1.5", "done"]
    assert done.stdout.splitlines()[-1] == "1 of 1 parts have figures; Some GPU, torch 2.11.0"
    assert "plan-one: done" in Path(f"{project.out}.log").read_text()
    assert not Path(f"{project.out}.failed.json").exists()


@pytest.mark.parametrize("code", [1, 2, 7])
def test_a_failed_call_keeps_its_file_and_exit_code(project: FakeProject, code: int) -> None:
    done = project.run(WRITES + f"sys.exit({code})", "--call", "1", "--out", str(project.out))

    assert done.returncode == code
    assert list(json.loads(project.out.read_text())["parts"]) == ["plan-one"]
    assert not Path(f"{project.out}.failed.json").exists()


def test_a_call_that_fails_before_writing_leaves_the_reason(project: FakeProject) -> None:
    done = project.run(SESSION + "raise RuntimeError('no driver')", "--call", "1", "--out", str(project.out))

    assert done.returncode == 1
    assert not project.out.exists()
    assert project.failure()["exit_code"] == 1
    assert project.failure()["log"][-1] == "RuntimeError: no driver"
    assert "exit code 1" in done.stderr.splitlines()[-1]


def test_the_session_of_an_earlier_call_is_unchanged(project: FakeProject) -> None:
    project.run(WRITES, "--call", "1", "--out", str(project.out))
    before = project.out.read_bytes()

    done = project.run(
        SESSION + "os.kill(os.getpid(), signal.SIGKILL)", "--call", "2", "--out", str(project.out)
    )

    assert done.returncode == 137
    assert project.out.read_bytes() == before


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_call_which_saves_its_parts(
    project: FakeProject, signum: signal.Signals
) -> None:
    command = project.command(SESSION + WAITS, "--call", "1", "--seconds", "500", "--out", str(project.out))
    process = subprocess.Popen(command, env=project.environment(), stdout=subprocess.PIPE, text=True)
    while not (project.folder / "ready").exists():
        assert process.poll() is None
        time.sleep(0.01)

    process.send_signal(signum)
    printed, _ = process.communicate()

    assert process.returncode == 128 + signum
    assert "was stopped" in printed
    assert list(json.loads(project.out.read_text())["parts"]) == ["plan-one", "plan-two"]


@pytest.mark.long
def test_a_call_is_stopped_after_its_time_limit(project: FakeProject) -> None:
    done = project.run(SESSION + WAITS, "--call", "1", "--seconds=0.5", "--out", str(project.out), GRACE="2")

    assert done.returncode == 124
    assert "plan-two" in json.loads(project.out.read_text())["parts"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--call", "1"], "--out FILE is missing"),
        (["--call", "1", "--seconds", "soon", "--out", "x.json"], "--seconds soon: must be a number"),
    ],
)
def test_invalid_arguments_are_rejected(project: FakeProject, arguments: list[str], message: str) -> None:
    done = project.run(WRITES, *arguments)

    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (project.folder / "received.json").exists()


@pytest.mark.long
@pytest.mark.long
def test_wheels_are_installed_once(project: FakeProject) -> None:
    wheels = project.folder / "benchmarks" / "wheels"
    make_wheel(wheels, "carried", "1.5")
    uses = (
        SESSION
        + "import carried; session['parts'][carried.VERSION] = part\nout.write_text(json.dumps(session))\n"
    )

    first = project.run(uses, "--call", "1", "--out", str(project.out))
    installed = project.folder / "benchmarks" / ".site"
    (installed / "mark").touch()
    second = project.run(uses, "--call", "2", "--out", str(project.out))

    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert list(json.loads(project.out.read_text())["parts"]) == ["plan-one", "1.5"]
    assert (installed / "mark").exists()

    (wheels / "carried-1.5-py3-none-any.whl").unlink()
    make_wheel(wheels, "carried", "1.6")
    project.run(uses, "--call", "2", "--out", str(project.out))

    assert list(json.loads(project.out.read_text())["parts"]) == ["plan-one", "1.6"]
    assert not (installed / "mark").exists()


def test_wheels_that_cannot_be_installed_are_reported(project: FakeProject) -> None:
    make_wheel(project.folder / "benchmarks" / "wheels", "carried", "1.5", tag="cp27-cp27m-any")

    done = project.run(WRITES, "--call", "1", "--out", str(project.out))

    assert done.returncode == 3
    assert project.failure()["error"] == "the wheels cannot be installed"
    assert any("carried" in line for line in project.failure()["log"])


def test_a_folder_not_made_by_the_script_is_never_replaced(project: FakeProject, tmp_path: Path) -> None:
    make_wheel(project.folder / "benchmarks" / "wheels", "carried", "1.5")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("text")

    done = project.run(WRITES, "--call", "1", "--out", str(project.out), SITE=str(mine))

    assert done.returncode == 3
    assert (mine / "thesis.txt").read_text() == "text"


@pytest.mark.long
def test_pytest_runs_with_the_wheels_and_its_exit_code(project: FakeProject) -> None:
    make_wheel(project.folder / "benchmarks" / "wheels", "carried", "1.5")
    (project.folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    test = "import carried, pytest\n@pytest.mark.gpu\ndef test_it():\n    assert carried.VERSION == {!r}\n"

    (project.folder / "test_it.py").write_text(test.format("1.5"))
    passed = project.run(WRITES, "pytest", "-m", "gpu", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    (project.folder / "test_it.py").write_text(test.format("9.99"))
    failed = project.run(WRITES, "pytest", "-m", "gpu", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")

    assert passed.returncode == 0, passed.stdout + passed.stderr
    assert failed.returncode == 1


class WheelSet:
    """A folder of fake wheels, for a machine that has the requirements of pyproject.toml."""

    def __init__(self, folder: Path) -> None:
        self.wheels = folder / "wheels"
        self.wheels.mkdir()
        self.list = folder / "have.txt"
        self.have = [
            *("torch==2.11.0+cu130", "hydra-core", "omegaconf", "mlflow", "pyyaml", "sqlalchemy", "pydantic"),
            *(
                "pillow",
                "numpy",
                "captcha",
                "wheezy.captcha",
                "safetensors",
                "filelock",
                "rich",
                "matplotlib",
            ),
            *("scipy", "psutil", "nvidia-ml-py", "packaging", "jinja2", "onnx", "onnxscript", "onnxruntime"),
        ]

    def check(self, *arguments: str) -> tuple[int, Sequence[str]]:
        """Return the exit code of check_wheels.py and its problems."""
        self.list.write_text("# of some machine\n" + "\n".join(self.have) + "\n")
        command = [
            sys.executable,
            str(BENCHMARKS / "check_wheels.py"),
            str(self.wheels),
            "--have",
            str(self.list),
        ]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        return done.returncode, done.stderr.splitlines()


@pytest.fixture
def wheel_set(tmp_path: Path) -> WheelSet:
    return WheelSet(tmp_path)


def test_a_complete_set_passes(wheel_set: WheelSet) -> None:
    make_wheel(wheel_set.wheels, "one", "1.0", "two>=2", "Safe.Tensors-ish ; extra == 'more'", "pillow")
    make_wheel(wheel_set.wheels, "two", "2.5", tag="cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64")

    assert wheel_set.check() == (0, [])


def break_missing(wheel_set: WheelSet) -> str:
    make_wheel(wheel_set.wheels, "one", "1.0", "two>=2")
    return "two: missing; one-1.0-py3-none-any.whl requires two>=2"


def break_project_requirement(wheel_set: WheelSet) -> str:
    wheel_set.have.remove("captcha")
    return "captcha: missing; pyproject.toml requires captcha"


def break_version(wheel_set: WheelSet) -> str:
    make_wheel(wheel_set.wheels, "one", "1.0", "two<2")
    make_wheel(wheel_set.wheels, "two", "2.5")
    return "two: wrong version; one-1.0-py3-none-any.whl requires two<2, and the folder has two-2.5"


def break_version_of_the_machine(wheel_set: WheelSet) -> str:
    wheel_set.have[0] = "torch==2.9.1+cu130"
    return "torch: wrong version; pyproject.toml requires torch<2.14,>=2.10, and the machine has 2.9.1+cu130"


def break_twice(wheel_set: WheelSet) -> str:
    make_wheel(wheel_set.wheels, "one", "1.0")
    make_wheel(wheel_set.wheels, "One", "1.1")
    return "one: two wheels, "


def break_python(wheel_set: WheelSet) -> str:
    make_wheel(wheel_set.wheels, "one", "1.0", tag="cp311-cp311-manylinux_2_28_x86_64")
    return "one-1.0-cp311-cp311-manylinux_2_28_x86_64.whl: does not install on Python 3.12"


def break_platform(wheel_set: WheelSet) -> str:
    make_wheel(wheel_set.wheels, "one", "1.0", tag="cp312-cp312-macosx_11_0_arm64")
    return "one-1.0-cp312-cp312-macosx_11_0_arm64.whl: does not install on Python 3.12"


def break_requires_python(wheel_set: WheelSet) -> str:
    make_wheel(wheel_set.wheels, "one", "1.0", python=">=3.13")
    return "one-1.0-py3-none-any.whl: requires Python >=3.13; the target has 3.12"


@pytest.mark.parametrize(
    "damage",
    [
        break_missing,
        break_project_requirement,
        break_version,
        break_version_of_the_machine,
        break_twice,
        break_python,
        break_platform,
        break_requires_python,
    ],
)
def test_problems_of_a_set_are_named(wheel_set: WheelSet, damage: Callable[[WheelSet], str]) -> None:
    message = damage(wheel_set)

    code, problems = wheel_set.check()

    assert code == 1
    assert len(problems) == 1
    assert problems[0].startswith(message)


def test_markers_are_evaluated_for_the_target(wheel_set: WheelSet) -> None:
    requires = (
        'new; python_version >= "3.13"',
        'elsewhere; sys_platform == "win32"',
        'other; platform_machine != "x86_64"',
    )
    make_wheel(wheel_set.wheels, "one", "1.0", *requires)

    assert wheel_set.check("--python", "3.12") == (0, [])
    code, problems = wheel_set.check("--python", "3.13")
    assert code == 1
    assert [line.split(":")[0] for line in problems] == ["new"]


def test_a_stable_abi_wheel_needs_an_older_python(wheel_set: WheelSet) -> None:
    make_wheel(wheel_set.wheels, "one", "1.0", tag="cp39-abi3-manylinux_2_28_x86_64")
    assert wheel_set.check() == (0, [])

    make_wheel(wheel_set.wheels, "two", "1.0", tag="cp313-abi3-manylinux_2_28_x86_64")
    assert wheel_set.check()[0] == 1


def test_further_requirements_are_checked_too(wheel_set: WheelSet) -> None:
    code, problems = wheel_set.check("--also", "pytest>=8")

    assert code == 1
    assert problems[0].startswith("pytest: missing")


def test_a_damaged_wheel_is_named(wheel_set: WheelSet) -> None:
    (wheel_set.wheels / "one-1.0-py3-none-any.whl").write_bytes(b"no archive")

    code, problems = wheel_set.check()

    assert code == 2
    assert problems[0].startswith("one-1.0-py3-none-any.whl: cannot be read as a wheel")
    assert len(problems) == 1


# A fake Python whose pip writes empty wheels; other commands go to the real Python.
PIP = """#!{python}
import os, subprocess, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_gpu_run import make_wheel
if sys.argv[1:3] != ["-m", "pip"]:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
arguments = sys.argv[3:]
with open({log!r}, "a") as log:
    print(*arguments, file=log)
pins = [one for one in arguments if "==" in one]
folder = Path(arguments[arguments.index("-d" if arguments[0] == "download" else "-w") + 1])
if "-r" in arguments:
    pins = Path(arguments[arguments.index("-r") + 1]).read_text().split()
sources = ("pure", "compiled")
if arguments[0] == "download" and any(pin.split("==")[0] in sources for pin in pins):
    sys.exit(1)
for pin in pins:
    name, version = pin.split("==")
    tag = "cp312-cp312-linux_x86_64" if name == "compiled" else "py3-none-any"
    make_wheel(folder, name, version, tag=tag)
"""


class Collection:
    """Runs collect_wheels.sh with a fake pip."""

    def __init__(self, folder: Path) -> None:
        self.wheels, self.log, self.python = folder / "wheels", folder / "log", folder / "python"
        tests = str(Path(__file__).parent)
        self.python.write_text(PIP.format(python=sys.executable, tests=tests, log=str(self.log)))
        self.python.chmod(0o755)
        self.set = WheelSet(folder / "set")
        self.have, self.lock = folder / "have", folder / "lock"

    def run(self, *pins: str) -> "subprocess.CompletedProcess[str]":
        self.lock.write_text("\n".join(pins) + "\n")
        self.have.write_text("\n".join([*self.set.have, "pytest==9", "hypothesis"]) + "\n")
        variables = {"PYTHON": str(self.python), "LOCK": str(self.lock), "TARGET": "3.12"}
        command = ["bash", str(BENCHMARKS / "collect_wheels.sh"), str(self.have), str(self.wheels)]
        return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)

    def files(self) -> list[str]:
        return sorted(path.name for path in self.wheels.iterdir())


@pytest.fixture
def collection(tmp_path: Path) -> Collection:
    (tmp_path / "set").mkdir()
    return Collection(tmp_path)


def test_only_missing_packages_are_collected_and_never_torch(collection: Collection) -> None:
    pins = (
        "Wanted_One==1.0",
        "Pillow==13.0",
        "pytest==8.0",
        "ruff==1",
        "torch==2.13.0",
        "triton==3",
        "nvidia-cublas==1",
    )

    done = collection.run(*pins)

    assert done.returncode == 0, done.stderr
    assert collection.files() == ["Wanted_One-1.0-py3-none-any.whl"]
    assert json.loads(done.stdout.splitlines()[-1])["wheels"] == 1
    command = collection.log.read_text()
    assert "--python-version 3.12" in command
    assert "--no-deps" in command


def test_old_wheels_are_replaced(collection: Collection) -> None:
    assert collection.run("one==1.0").returncode == 0
    assert collection.run("one==2.0").returncode == 0
    assert collection.files() == ["one-2.0-py3-none-any.whl"]


def test_a_folder_with_other_files_is_rejected(collection: Collection) -> None:
    collection.wheels.mkdir()
    (collection.wheels / "thesis.txt").write_text("text")

    done = collection.run("one==1.0")

    assert done.returncode == 2
    assert "not a wheel" in done.stderr
    assert collection.files() == ["thesis.txt"]


@pytest.mark.long
def test_pure_python_is_built_and_failures_are_named(collection: Collection) -> None:
    done = collection.run("one==1.0", "pure==1.0", "compiled==1.0")

    assert done.returncode == 1
    assert collection.files() == ["one-1.0-py3-none-any.whl", "pure-1.0-py3-none-any.whl"]
    assert "compiled==1.0: no wheel for Python 3.12" in done.stderr
    assert "pure==1.0: no wheel for Python 3.12; built" in done.stderr


def test_an_incomplete_collection_has_exit_code_1(collection: Collection) -> None:
    collection.set.have.remove("mlflow")

    done = collection.run("one==1.0")

    assert done.returncode == 1
    assert "mlflow: missing" in done.stderr


def test_torch_is_never_collected_even_if_missing(collection: Collection) -> None:
    collection.set.have.remove("torch==2.11.0+cu130")

    done = collection.run("one==1.0", "torch==2.13.0", "nvidia-cublas==1.0", "nvidia-ml-py==13.0")

    assert done.returncode == 1
    assert "torch: missing" in done.stderr
    assert collection.files() == ["one-1.0-py3-none-any.whl"]
