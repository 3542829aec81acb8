"""Check the architecture rules, and that each of them detects violations.

Import rules are contracts of import-linter in pyproject.toml. Every other rule is a function that maps
{module: source} to a list of violations.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import yaml

import captcha_exp
from captcha_exp.runtime.paths import conf_dir

ROOT = Path(captcha_exp.__file__).parents[1]

Sources = Mapping[str, str]
Rule = Callable[[Sources], list[str]]

VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "base", "manager", "misc"}
FORBIDDEN = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "allow_pickle", "_target_"}
FORBIDDEN_CALLS = {"eval", "exec", "__import__", "instantiate", "load_model"}
MAX_LINES = 350


# -- the rules -----------------------------------------------------------------------------------------------


def no_module_has_a_vague_name(sources: Sources) -> list[str]:
    return [module for module in sources if VAGUE_NAMES & set(module.split("."))]


def no_module_is_longer_than_350_lines(sources: Sources) -> list[str]:
    lengths = {module: len(source.splitlines()) for module, source in sources.items()}
    return [f"{module} has {length} lines" for module, length in lengths.items() if length > MAX_LINES]


def no_code_execution_when_loading(sources: Sources) -> list[str]:
    return [
        f"{module}:{getattr(node, 'lineno', '?')} {violation}"
        for module, source in sources.items()
        for node in ast.walk(ast.parse(source))
        for violation in _dangerous(node)
    ]


def _dangerous(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Call():
            function = ast.unparse(node.func)
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            is_method = isinstance(node.func, ast.Attribute) and called in ("eval", "exec")  # model.eval()
            if called in FORBIDDEN_CALLS and not is_method:
                yield f"{called}()"
            if function == "torch.load" and keywords.get("weights_only") != "True":
                yield "torch.load() without weights_only=True"
            if keywords.get("shell", "False") != "False" or ast.unparse(node.func) in (
                "os.system",
                "os.popen",
            ):
                yield "shell=True"
            yield from FORBIDDEN & keywords.keys()
        case ast.Import():
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in FORBIDDEN)
        case ast.ImportFrom():
            names = {alias.name for alias in node.names}
            if (node.module or "").partition(".")[0] in FORBIDDEN or names & (FORBIDDEN_CALLS | FORBIDDEN):
                yield f"from {node.module} import {', '.join(names)}"
            if node.module == "torch" and "load" in names:
                yield "from torch import load"
        case ast.Constant(value=str(text)) if text in FORBIDDEN:
            yield text


def no_function_is_handed_a_display(sources: Sources) -> list[str]:
    """Modules log, and `runtime.console.progress_bar` finds the console itself."""
    return [
        f"{module}:{node.lineno} {node.arg}"
        for module, source in sources.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.arg) and node.arg in ("display", "console")
    ]


RULES: list[Rule] = [
    no_module_has_a_vague_name,
    no_module_is_longer_than_350_lines,
    no_code_execution_when_loading,
    no_function_is_handed_a_display,
]


# -- the package -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources() -> Sources:
    package = Path(captcha_exp.__file__).parent
    modules = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return modules


@pytest.mark.parametrize("rule", RULES)
def test_the_package_follows_the_rule(rule: Rule, sources: Sources) -> None:
    assert rule(sources) == []


@pytest.mark.parametrize("path", sorted(conf_dir().rglob("*.yaml")), ids=lambda path: path.stem)
def test_config_files_name_no_code(path: Path) -> None:
    scalars = {token.value for token in yaml.scan(path.read_text()) if isinstance(token, yaml.ScalarToken)}
    assert scalars & (FORBIDDEN | {"_args_", "_partial_", "_recursive_"}) == set()
    assert not any(scalar.startswith("hydra.") for scalar in scalars)
    assert not any(isinstance(token, yaml.TagToken) for token in yaml.scan(path.read_text()))


# -- violations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "sources"),
    [
        (no_module_has_a_vague_name, {"captcha_exp.utils": ""}),
        (no_module_has_a_vague_name, {"captcha_exp.runs.common": ""}),
        (no_module_is_longer_than_350_lines, {"captcha_exp.training.train": "x = 1\n" * 351}),
        (no_code_execution_when_loading, {"m": "import pickle"}),
        (no_code_execution_when_loading, {"m": "from pickle import loads"}),
        (no_code_execution_when_loading, {"m": "numpy.load(path, allow_pickle=True)"}),
        (no_code_execution_when_loading, {"m": "torch.load(path)"}),
        (no_code_execution_when_loading, {"m": "torch.load(path, weights_only=False)"}),
        (no_code_execution_when_loading, {"m": "from torch import load"}),
        (no_code_execution_when_loading, {"m": "config['_target_']"}),
        (no_code_execution_when_loading, {"m": "hydra.utils.instantiate(config)"}),
        (no_code_execution_when_loading, {"m": "from hydra.utils import instantiate as make"}),
        (no_code_execution_when_loading, {"m": "eval(text)"}),
        (no_code_execution_when_loading, {"m": "exec(text)"}),
        (no_code_execution_when_loading, {"m": "subprocess.run(line, shell=True)"}),
        (no_code_execution_when_loading, {"m": "os.system(line)"}),
        (no_code_execution_when_loading, {"m": "mlflow.pytorch.load_model(uri)"}),
        (no_function_is_handed_a_display, {"m": "def train(config, *, display=None): pass"}),
        (no_function_is_handed_a_display, {"m": "lambda console: 1"}),
    ],
)
def test_a_violation_is_detected(rule: Rule, sources: Sources) -> None:
    assert len(rule({"captcha_exp": "", **sources})) == 1


@pytest.mark.parametrize(
    "source",
    [
        '"""No pickle, no _target_, no eval(), no torch.load()."""',
        "# pickle, _target_, eval(x), shell=True",
        "model.eval()",
        "torch.load(path, weights_only=True)",
        "subprocess.run(words, shell=False)",
    ],
)
def test_allowed_code_is_not_a_violation(source: str) -> None:
    modules = {"captcha_exp.cli": source, "captcha_exp.config": ""}
    assert [violation for rule in RULES for violation in rule(modules)] == []


# -- imports -------------------------------------------------------------------------------------------------


def lint_imports(project: Path) -> str:
    """Run import-linter on a project and return its report, one line per contract."""
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [program, "--no-cache", "--config", str(ROOT / "pyproject.toml")],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project), "PYTHONSAFEPATH": "1", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
    )
    assert "Contracts" in done.stdout, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def package_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the root of a copy of the package to modify."""
    project = tmp_path_factory.mktemp("project")
    shutil.copytree(
        ROOT / "captcha_exp", project / "captcha_exp", ignore=shutil.ignore_patterns("__pycache__")
    )
    return project


def test_the_package_keeps_every_import_contract() -> None:
    assert " broken" in (report := lint_imports(ROOT))
    assert " 0 broken" in report, report


BREAKING = {
    "Layers": ("config/loading.py", "def f():\n    from captcha_exp.training.train import train\n"),
    "No cycles": ("model/optim.py", "def f():\n    import captcha_exp.model.step\n"),
    "Hydra has one home": ("config/loading.py", "def f():\n    import hydra\n"),
    "Mlflow has one home": ("cli/main.py", "from mlflow import MlflowClient\n"),
    "Omegaconf has one home": ("runs/run.py", "import omegaconf\n"),
    "The generators have one home": ("data/dataset.py", "import captcha.image\n"),
    "Onnx has one home": ("runs/run.py", "import onnxruntime\n"),
    "Light modules reach no torch": ("data/images.py", "import torch.nn.functional as F\n"),
}


def test_every_contract_has_a_breaking_change() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert {each["name"] for each in settings["tool"]["importlinter"]["contracts"]} == set(BREAKING)


def test_breaking_changes_are_reported(package_copy: Path) -> None:
    for file, code in BREAKING.values():
        path = package_copy / "captcha_exp" / file
        path.write_text(path.read_text(encoding="utf-8") + code, encoding="utf-8")
    new = package_copy / "captcha_exp/unlisted.py"
    new.write_text("", encoding="utf-8")

    report = lint_imports(package_copy)

    assert f"0 kept, {len(BREAKING)} broken" in report
    for name in BREAKING:
        assert f"{name} BROKEN" in report
    assert "unlisted" in report, "a module that belongs to no layer"


def test_the_list_of_modules_in_memory_is_complete() -> None:
    """Each module is named in the docstring of the package; `module_*` stands for several."""
    package = ROOT / "captcha_exp" / "memory"
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8"))) or ""
    listed = docstring.partition("\nModules:\n")[2].partition("\n\nSources:")[0]
    named = set(re.findall(r"`([a-z_]+)`", listed))
    modules = {path.stem for path in package.glob("*.py")} - {"__init__"}
    assert named == {name for name in modules if not name.startswith("module_")}
