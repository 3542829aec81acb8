"""The rules of the design, read from the code; and for each rule, that it can fail.

A rule is a function from {module: source} to violations.
"""

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import yaml

import captcha_exp
from captcha_exp.runtime.paths import conf

Sources = Mapping[str, str]
Rule = Callable[[Sources], list[str]]

LAYERS = (
    {"errors", "places", "chance", "alphabet", "config", "display", "leaving"},
    {"record", "pixels", "sources", "splits", "dataset", "models", "optim", "device"},
    {
        "augment",
        "checkpoint",
        "evaluate",
        "step",
        "probe",
        "watch",
        "predict",
        "report",
        "weights",
        "recording",
        "progress",
        "memory",
        "oom",
        "train",
    },
    {"tracking"},
    {"sweep"},
    {"doctor", "reproduce"},
    {"cli"},
    {"", "__main__"},  # the package itself, which looks its names up at first use
)
HOMES = {
    "hydra": {"cli"},
    "mlflow": {"tracking"},
    "omegaconf": {"config", "cli"},
    "captcha": {"sources"},
    "wheezy": {"sources"},
}
WITHOUT_TORCH = {"errors", "places", "chance", "alphabet", "config", "display", "leaving", "pixels", "splits"}
# Modules of a part that has torch elsewhere.
WITHOUT_TORCH |= {"memory.allocator", "memory.blocks", "memory.judging"}
SHAPELESS = {"utils", "util", "helpers", "helper", "common", "base", "manager", "misc"}
FORBIDDEN = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "allow_pickle", "_target_"}
FORBIDDEN_CALLS = {"eval", "exec", "__import__", "instantiate", "load_model"}
LINES = 350


@dataclass(frozen=True)
class Import:
    """One name that a module imports, wherever in the module it does so."""

    name: str
    typing_only: bool
    """for the type checker, never at run time"""
    printing: bool
    """inside a function that prints"""


def imports(source: str) -> Iterator[Import]:
    def walk(node: ast.AST, typing_only: bool, printing: bool) -> Iterator[Import]:
        match node:
            case ast.Import():
                for alias in node.names:
                    yield Import(alias.name, typing_only, printing)
            case ast.ImportFrom():
                for alias in node.names:
                    yield Import(
                        "." * node.level + f"{node.module or ''}.{alias.name}", typing_only, printing
                    )
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                for inner in node.body:
                    yield from walk(inner, True, printing)
                for inner in node.orelse:
                    yield from walk(inner, typing_only, printing)
                return
            case ast.FunctionDef():
                printing = any(
                    isinstance(inner, ast.Call) and getattr(inner.func, "id", "") == "print"
                    for inner in ast.walk(node)
                )
        for child in ast.iter_child_nodes(node):
            yield from walk(child, typing_only, printing)

    yield from walk(ast.parse(source), False, False)


def part(module: str) -> str:
    """The part of the package that a module or name belongs to: captcha_exp.config.loading -> config."""
    return [*module.split("."), ""][1]


def own_imports(sources: Sources, module: str) -> set[str]:
    """The modules of the package that a module imports."""
    found = set()
    for name in (item.name for item in imports(sources[module])):
        if name == "captcha_exp" or name.startswith("captcha_exp."):
            while name not in sources and name.count("."):
                name = name.rpartition(".")[0]  # a name inside a module
            found.add(name)
    return found


# -- the rules -----------------------------------------------------------------------------------------------


def imports_go_one_way(sources: Sources) -> list[str]:
    height = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    violations = []
    for module in sources:
        if part(module) not in height:
            violations.append(f"{module} has no layer; give it one in LAYERS")
            continue
        violations += [
            f"{module} imports {other} from above"
            for other in own_imports(sources, module)
            if height.get(part(other), 0) > height[part(module)]
        ]
        violations += [
            f"{module}: write {item.name} absolute"
            for item in imports(sources[module])
            if item.name[0] == "."
        ]
    return violations


def there_are_no_cycles(sources: Sources) -> list[str]:
    parts: dict[str, set[str]] = {}
    for module in sources:
        others = parts.setdefault(part(module), set())
        others |= {part(other) for other in own_imports(sources, module)} - {part(module)}
    for graph in (parts, {module: own_imports(sources, module) for module in sources}):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            return [" -> ".join(error.args[1])]
    return []


def each_framework_has_one_home(sources: Sources) -> list[str]:
    violations = []
    for module, source in sources.items():
        for item in imports(source):
            framework = item.name.partition(".")[0]
            at_home = part(module) in HOMES.get(framework, {part(module)})
            guest = framework == "omegaconf" and part(module) == "cli"
            if not at_home or (guest and not item.typing_only and not item.printing):
                violations.append(f"{module} imports {item.name}")
    return violations


def light_modules_import_no_torch(sources: Sources) -> list[str]:
    def reach(module: str, seen: set[str]) -> set[str]:
        if module not in seen:
            seen.add(module)
            for other in own_imports(sources, module):
                reach(other, seen)
        return seen

    return [
        f"{module} imports torch through {other}"
        for module in sources
        if {part(module), module.removeprefix("captcha_exp.")} & WITHOUT_TORCH
        for other in reach(module, set())
        if any(item.name.partition(".")[0] == "torch" for item in imports(sources[other]))
    ]


def train_knows_neither_mlflow_nor_hydra(sources: Sources) -> list[str]:
    outside = {"mlflow", "hydra", "captcha_exp.tracking", "captcha_exp.cli"}
    return [
        f"{module} imports {item.name}"
        for module, source in sources.items()
        if part(module) == "train"
        for item in imports(source)
        if any(item.name == name or item.name.startswith(f"{name}.") for name in outside)
    ]


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
    imports_go_one_way,
    there_are_no_cycles,
    each_framework_has_one_home,
    light_modules_import_no_torch,
    train_knows_neither_mlflow_nor_hydra,
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


def test_every_layer_is_there(sources: Sources) -> None:
    assert {part(module) for module in sources} == set().union(*LAYERS)


@pytest.mark.parametrize("path", sorted(conf().rglob("*.yaml")), ids=lambda path: path.stem)
def test_no_file_of_conf_names_code(path: Path) -> None:
    scalars = {token.value for token in yaml.scan(path.read_text()) if isinstance(token, yaml.ScalarToken)}
    assert scalars & (FORBIDDEN | {"_args_", "_partial_", "_recursive_"}) == set()
    assert not any(scalar.startswith("hydra.") for scalar in scalars)
    assert not any(isinstance(token, yaml.TagToken) for token in yaml.scan(path.read_text()))


# -- each rule can fail --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "broken"),
    [
        (imports_go_one_way, {"captcha_exp.config": "from captcha_exp.training.train import train"}),
        (
            imports_go_one_way,
            {"captcha_exp.training.train": "def f():\n    from captcha_exp import tracking"},
        ),
        (imports_go_one_way, {"captcha_exp.runs.run": "import captcha_exp.model.evaluate as e"}),
        (imports_go_one_way, {"captcha_exp.model.networks": "from captcha_exp import load"}),
        (imports_go_one_way, {"captcha_exp.model.networks": "from . import train"}),
        (imports_go_one_way, {"captcha_exp.novelty": ""}),
        (
            there_are_no_cycles,
            {
                "captcha_exp.model.networks": "from captcha_exp import optim",
                "captcha_exp.model.optim": "def f():\n    import captcha_exp.model.networks",
            },
        ),
        (
            there_are_no_cycles,
            {
                "captcha_exp.runs.run": "from captcha_exp.runtime.files import a",
                "captcha_exp.runtime.files": "from captcha_exp.runs import run",
            },
        ),
        (
            there_are_no_cycles,  # between parts, though no two modules import each other
            {
                "captcha_exp.runs.run": "import captcha_exp.model.networks",
                "captcha_exp.runtime.files": "",
                "captcha_exp.model.networks": "import captcha_exp.runtime.files",
            },
        ),
        (each_framework_has_one_home, {"captcha_exp.config": "def f():\n    import hydra"}),
        (each_framework_has_one_home, {"captcha_exp.cli": "from mlflow import MlflowClient"}),
        (each_framework_has_one_home, {"captcha_exp.runs.run": "import omegaconf"}),
        (each_framework_has_one_home, {"captcha_exp.cli": "from omegaconf import OmegaConf"}),
        (each_framework_has_one_home, {"captcha_exp.data.dataset": "import captcha.image"}),
        (each_framework_has_one_home, {"captcha_exp.data.images": "from wheezy.captcha import image"}),
        (light_modules_import_no_torch, {"captcha_exp.data.images": "import torch.nn.functional as F"}),
        (light_modules_import_no_torch, {"captcha_exp.memory.blocks": "import torch"}),
        (
            light_modules_import_no_torch,
            {"captcha_exp.config": "import captcha_exp.runs", "captcha_exp.runs": "import torch"},
        ),
        (train_knows_neither_mlflow_nor_hydra, {"captcha_exp.training.train": "def f():\n    import mlflow"}),
        (
            train_knows_neither_mlflow_nor_hydra,
            {"captcha_exp.training.train.loop": "import captcha_exp.tracking"},
        ),
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
    there = {f"captcha_exp.{name}": "" for layer in LAYERS for name in layer - {""}} | {"captcha_exp": ""}
    assert len(rule({**there, **broken})) == 1


@pytest.mark.parametrize(
    "kept",
    [
        '"""No pickle, no _target_, no eval(), no torch.load()."""',
        "# pickle, _target_, eval(x), shell=True",
        "model.eval()",
        "torch.load(path, weights_only=True)",
        "subprocess.run(words, shell=False)",
        "from captcha_exp.config import load",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from omegaconf import DictConfig",
        "def f(x):\n    from omegaconf import OmegaConf\n    print(OmegaConf.to_yaml(x))",
    ],
)
def test_a_kept_rule_is_not_called_broken(kept: str) -> None:
    modules = {"captcha_exp.cli": kept, "captcha_exp.config": ""}
    assert [violation for rule in RULES for violation in rule(modules)] == []
