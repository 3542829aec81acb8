"""Check the rules of the design, and that each of them can fail.

Rules about imports are contracts of import-linter in pyproject.toml; any other rule is a function from
{module: source} to violations.
"""

import ast
import os
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

SHAPELESS = {"utils", "util", "helpers", "helper", "common", "base", "manager", "misc"}
FORBIDDEN = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "allow_pickle", "_target_"}
FORBIDDEN_CALLS = {"eval", "exec", "__import__", "instantiate", "load_model"}
LINES = 350


# -- the rules -----------------------------------------------------------------------------------------------


def no_module_has_a_shapeless_name(sources: Sources) -> list[str]:
    return [module for module in sources if SHAPELESS & set(module.split("."))]


def no_module_is_longer_than_350_lines(sources: Sources) -> list[str]:
    lengths = {module: len(source.splitlines()) for module, source in sources.items()}
    return [f"{module} has {length} lines" for module, length in lengths.items() if length > LINES]


def nothing_read_back_can_run_code(sources: Sources) -> list[str]:
    return [
        f"{module}:{getattr(node, 'lineno', '?')} {word}"
        for module, source in sources.items()
        for node in ast.walk(ast.parse(source))
        for word in _dangerous(node)
    ]


def _dangerous(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Call():
            function = ast.unparse(node.func)
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            on_a_value = isinstance(node.func, ast.Attribute) and called in ("eval", "exec")  # model.eval()
            if called in FORBIDDEN_CALLS and not on_a_value:
                yield f"{called}()"
            if function == "torch.load" and keywords.get("weights_only") != "True":
                yield "torch.load() without weights_only=True"
            if keywords.get("shell", "False") != "False" or ast.unparse(node.func) in (
                "os.system",
                "os.popen",
            ):
                yield "a shell"
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


RULES: list[Rule] = [
    no_module_has_a_shapeless_name,
    no_module_is_longer_than_350_lines,
    nothing_read_back_can_run_code,
]


# -- the code keeps the rules --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources() -> Sources:
    package = Path(captcha_exp.__file__).parent
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


@pytest.mark.parametrize("rule", RULES)
def test_the_code_keeps_the_rule(rule: Rule, sources: Sources) -> None:
    assert rule(sources) == []


@pytest.mark.parametrize("path", sorted(conf_dir().rglob("*.yaml")), ids=lambda path: path.stem)
def test_no_file_of_conf_names_code(path: Path) -> None:
    scalars = {token.value for token in yaml.scan(path.read_text()) if isinstance(token, yaml.ScalarToken)}
    assert scalars & (FORBIDDEN | {"_args_", "_partial_", "_recursive_"}) == set()
    assert not any(scalar.startswith("hydra.") for scalar in scalars)
    assert not any(isinstance(token, yaml.TagToken) for token in yaml.scan(path.read_text()))


# -- each rule can fail --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "broken"),
    [
        (no_module_has_a_shapeless_name, {"captcha_exp.utils": ""}),
        (no_module_has_a_shapeless_name, {"captcha_exp.runs.common": ""}),
        (no_module_is_longer_than_350_lines, {"captcha_exp.training.train": "x = 1\n" * 351}),
        (nothing_read_back_can_run_code, {"m": "import pickle"}),
        (nothing_read_back_can_run_code, {"m": "from pickle import loads"}),
        (nothing_read_back_can_run_code, {"m": "numpy.load(path, allow_pickle=True)"}),
        (nothing_read_back_can_run_code, {"m": "torch.load(path)"}),
        (nothing_read_back_can_run_code, {"m": "torch.load(path, weights_only=False)"}),
        (nothing_read_back_can_run_code, {"m": "from torch import load"}),
        (nothing_read_back_can_run_code, {"m": "config['_target_']"}),
        (nothing_read_back_can_run_code, {"m": "hydra.utils.instantiate(config)"}),
        (nothing_read_back_can_run_code, {"m": "from hydra.utils import instantiate as make"}),
        (nothing_read_back_can_run_code, {"m": "eval(text)"}),
        (nothing_read_back_can_run_code, {"m": "exec(text)"}),
        (nothing_read_back_can_run_code, {"m": "subprocess.run(line, shell=True)"}),
        (nothing_read_back_can_run_code, {"m": "os.system(line)"}),
        (nothing_read_back_can_run_code, {"m": "mlflow.pytorch.load_model(uri)"}),
    ],
)
def test_a_broken_rule_is_seen(rule: Rule, broken: Sources) -> None:
    assert len(rule({"captcha_exp": "", **broken})) == 1


@pytest.mark.parametrize(
    "kept",
    [
        '"""No pickle, no _target_, no eval(), no torch.load()."""',
        "# pickle, _target_, eval(x), shell=True",
        "model.eval()",
        "torch.load(path, weights_only=True)",
        "subprocess.run(words, shell=False)",
    ],
)
def test_a_kept_rule_is_not_called_broken(kept: str) -> None:
    modules = {"captcha_exp.cli": kept, "captcha_exp.config": ""}
    assert [violation for rule in RULES for violation in rule(modules)] == []


# -- imports -------------------------------------------------------------------------------------------------


def lint_imports(project: Path) -> str:
    """Run import-linter on a project's folder, and return its report in one line per contract."""
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
    """A copy of the package that a test may break, one module after another."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(
        ROOT / "captcha_exp", folder / "captcha_exp", ignore=shutil.ignore_patterns("__pycache__")
    )
    return folder


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
    "Light modules reach no torch": ("data/images.py", "import torch.nn.functional as F\n"),
}


def test_every_contract_has_a_change_that_breaks_it() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert {each["name"] for each in settings["tool"]["importlinter"]["contracts"]} == set(BREAKING)


def test_a_change_that_breaks_a_contract_is_reported(package_copy: Path) -> None:
    for file, code in BREAKING.values():
        path = package_copy / "captcha_exp" / file
        path.write_text(path.read_text(encoding="utf-8") + code, encoding="utf-8")
    new = package_copy / "captcha_exp/novelty.py"
    new.write_text("", encoding="utf-8")

    report = lint_imports(package_copy)

    assert f"0 kept, {len(BREAKING)} broken" in report
    for name in BREAKING:
        assert f"{name} BROKEN" in report
    assert "novelty" in report, "a module that no layer names"
