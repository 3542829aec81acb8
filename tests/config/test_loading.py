"""Test that configs are loaded without conversion, and that each error is reported in one line."""

import copy
import dataclasses
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from captcha_exp import compose, load
from captcha_exp.cli.hydra_config import try_compose
from captcha_exp.config import (
    BaseGeneratorConfig,
    FolderConfig,
    GpuSpec,
    Machine,
    MlflowConfig,
    flatten,
    load_gpu,
    resolve,
    to_dict,
    to_yaml,
)
from captcha_exp.config.messages import RENAMED_KEYS
from captcha_exp.errors import ConfigError, UserError
from captcha_exp.runtime.paths import conf_dir

CPU_ONLY = Machine(
    devices=("cpu",),
    num_cores=3,
    root=Path("/somewhere"),
    unavailable_reason={"cuda": "no GPU", "mps": "no Mac"},
)
TWO_GPUS = Machine(
    devices=("cuda", "cuda:0", "cuda:1", "cpu"), num_cores=8, root=Path("/somewhere"), unavailable_reason={}
)

# Every file of every group, as an override.
CHOICES = sorted(f"{file.parent.name}={file.stem}" for file in conf_dir().glob("*/*.yaml"))


def with_required(choice: str) -> tuple[str, ...]:
    """Return a choice with the overrides that it requires."""
    if choice == "captcha=auto":
        return choice, "data=folder", "data.path=/images"
    return (choice, "data.path=/images") if choice == "data=folder" else (choice,)


@cache
def composed(*overrides: str) -> DictConfig:
    return compose(*overrides)


def plain(*overrides: str) -> dict[str, Any]:
    """Return a composed config as plain values that a test may change."""
    values: dict[str, Any] = json.loads(json.dumps(OmegaConf.to_container(composed(*overrides))))
    return values


def errors(*overrides: str, config_dir: Path | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        try_compose(overrides, str(config_dir) if config_dir else None).to_config(CPU_ONLY)
    return caught.value.lines


def leaf_keys(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaf_keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def replaced(values: dict[str, Any], key: str, *value: Any) -> dict[str, Any]:
    """Return a copy with another value at a key, or without the key."""
    changed = copy.deepcopy(values)
    *groups, last = key.split(".")
    group = changed
    for name in groups:
        group = group[name]
    if value:
        group[last] = value[0]
    else:
        del group[last]
    return changed


KEYS = sorted(set(leaf_keys(plain("data=wheezy"))) - {"gpu.total_mib"})  # null, or a group of keys


# -- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("captcha.widht=56", "did you mean captcha.width?"),
        ("captcha.width=15", "at least 16, at most 2048 (pixels, after the resize)"),
        ("captcha.channels=2", "must be auto or one of 1, 3"),
        ("captcha.alphabet=aab", "'a' occurs more than once"),
        ("captcha.alphabet='1e55'", "'5' occurs more than once"),
        ("captcha.alphabet=1e5", "must be text"),
        ("captcha.alphabet=true", "must be text"),
        ("captcha.alphabet=1_000", "must be text"),
        ("captcha.alphabet=null", "must be text"),
        ("captcha.alphabet='a b'", "' ' is not a visible character"),
        ("data.count=0", "must be a whole number, at least 1"),
        ("data.workers=0", "must be a whole number, at least 1, at most 1024 or auto"),
        ("data.fonts=[1]", "must be a list, each text"),
        ("data.validation_fraction=1", "must be a number, at least 0, below 1"),
        ("data.source=folders", "must be one of article, captcha, folder, wheezy"),
        ("device.name=cuda", "no GPU; available here: auto, cpu"),
        ("device.name=cuda:1", "no GPU; available here: auto, cpu"),
        ("device.name=mps", "no Mac; available here: auto, cpu"),
        ("device.name=gpu", "auto, cpu, mps, cuda, cuda:1"),
        ("device.name=cuda:x", "auto, cpu, mps, cuda, cuda:1"),
        ("device.threads=true", "at least 1, at most 1024 or auto"),
        ("model.channels=[4,x]", "must be a list, each a whole number, at least 1"),
        ("model.channels=[4,0]", "must be a list, each a whole number, at least 1"),
        ("model.channels=[4]", "minimum length 2"),
        ("model.channels=4", "must be a list"),
        ("name=a/b", "letters, digits and _.-"),
        ("seed=null", "must be a whole number, at least 0"),
        ("seed=-1", "must be a whole number, at least 0"),
        ("seed=true", "must be a whole number, at least 0"),
        ("train.batch_size=abc", "must be a whole number, at least 1"),
        ("train.batch_size=0", "must be a whole number, at least 1"),
        ("train.batch_size=64.0", "must be a whole number, at least 1"),
        ("train.epochs=1.5", "must be a whole number, at least 1"),
        ("train.deterministic=1", "must be true or false"),
        ("train.learning_rate=0", "must be a number, above 0"),
        ("train.learning_rate=nan", "must be a number, above 0"),
        ("train.optimizer=adan", "must be one of adam, adamw, sgd"),
        ("train.foo=1", "unknown key; valid keys: train.activation_checkpointing, "),
        ("width=100", "did you mean "),
        ("experiment=typo", "one of alnum, article, quickstart"),
        ("experiment=quickstrat", "did you mean quickstart?"),
        ("train=null", "one of constant_lr, onecycle, small_data"),
        ("model=", "one of compact, resnet18"),
        ("hydra.run.dir=x", "has no effect, Hydra only composes the config"),
        ("train.batch_size=25,50", "is a sweep"),
        ("seed=range(1,4)", "is a sweep"),
    ],
)
def test_an_error_is_one_line_with_key_value_and_valid_values(override: str, allowed: str) -> None:
    (line,) = errors(override)
    assert line.startswith(f"{override}: ")
    assert allowed in line
    assert "\n" not in line


@pytest.mark.parametrize("override", ["foo", "", "=1", "a b=1"])
def test_an_invalid_override_is_quoted_in_one_line(override: str) -> None:
    assert errors(override) == (f"{override!r}: invalid override; write key=value, as in train.epochs=3",)


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("device=cuda", "device=cuda: is a group of keys; did you mean device.name=cuda?"),
        ("sweep=true", "sweep=true: is a group of keys; did you mean sweep.run_over_budget=true?"),
        (
            "gpu.total_mib=3",
            "gpu.total_mib=3: is a group of keys; did you mean gpu.total_mib.min=3 or gpu.total_mib.max=3?",
        ),
        ("sweep=foo", "sweep=foo: is a group of keys; set one of sweep.run_over_budget"),
    ],
)
def test_a_value_for_a_group_is_an_error_with_the_keys_that_allow_it(override: str, hint: str) -> None:
    assert errors(override) == (hint,)


def test_a_rejected_key_is_not_missing() -> None:
    (line,) = errors("data=folder", "data.path=a,b")
    assert "is a sweep" in line


def test_a_plus_does_not_add_an_unknown_key() -> None:
    (line,) = errors("+train.foo=1")
    assert line.startswith("train.foo=1: unknown key")


@pytest.mark.parametrize("override", ["~captcha.width", "~train", "~seed", "data.cache=???"])
def test_a_key_without_a_value_is_missing(override: str) -> None:
    (line,) = errors(override)
    assert line.startswith(f"{override.strip('~=?')}: is missing; write ")


def test_all_errors_are_reported_at_once() -> None:
    lines = errors("captcha=typo", "captcha.widht=56", "train.batch_size=abc", "seed=null", "device.name=mps")
    assert sorted(line.split("=")[0] for line in lines) == [
        "captcha",
        "captcha.widht",
        "device.name",
        "seed",
        "train.batch_size",
    ]


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.9, 0.3), (0.0, 0.999), (0.25, 0.25)])
def test_validation_and_test_fractions_must_leave_a_training_split(fractions: tuple[float, float]) -> None:
    overrides = f"data.validation_fraction={fractions[0]}", f"data.test_fraction={fractions[1]}"
    if sum(fractions) < 1:
        load(compose(*overrides))
    else:
        (line,) = errors(*overrides)
        assert line.startswith("data")
        assert f"validation_fraction={fractions[0]} and test_fraction={fractions[1]}" in line
        assert "their sum must be below 1" in line


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (("model=resnet18", "model.channels=[4,8]"), "model.channels"),
        (("model.name=resnet18",), "model.channels"),
        (("tracking=none", "tracking.uri=auto"), "tracking.uri"),
        (("data.font_sizes=[40]",), "data.font_sizes"),
    ],
)
def test_a_key_of_another_choice_is_not_suggested(overrides: tuple[str, ...], key: str) -> None:
    (line,) = errors(*overrides)
    assert line.startswith(f"{key}=")
    assert "unknown key" in line
    assert f"did you mean {key}?" not in line


@pytest.mark.parametrize(
    ("override", "new_name"),
    [
        ("card=rtx3050", "gpu"),
        ("card.others_mib.least=5", "gpu.other_processes_mib.min"),
        ("gpu.context_mib.most=900", "gpu.context_mib.max"),
        ("train.stop_after_minutes=5", "train.max_minutes"),
        ("+augment.shift=0.1", "augment.translate"),
        ("train.optimizer_kernel=loop", "train.optimizer_impl=for_loop"),
        ("train.optimizer_impl=loop", "train.optimizer_impl=for_loop"),
        ("data.on_bad=skip", "data.on_invalid"),
        ("data.on_bad=refuse", "data.on_invalid=error"),
        ("train=few", "train=small_data"),
        ("train=constant", "train=constant_lr"),
    ],
)
def test_a_renamed_key_is_an_error_with_its_new_name(override: str, new_name: str) -> None:
    assert errors(override) == (f"{override}: was renamed to {new_name}",)


def test_every_new_name_is_a_key_of_the_config() -> None:
    config = {**plain("data=wheezy"), "data": plain("data=folder", "data.path=/images")["data"]}
    valid = {"gpu", *leaf_keys(config), *(f"gpu.{name}" for name in config["gpu"])}
    assert set(RENAMED_KEYS.values()) <= valid
    assert not set(RENAMED_KEYS) & valid


def test_a_saved_config_of_an_earlier_version_is_an_error_with_the_new_names(tmp_path: Path) -> None:
    values = plain()
    values["card"] = values.pop("gpu")
    values["train"]["stop_after_minutes"] = values["train"].pop("max_minutes")
    values["train"]["optimizer_impl"] = "loop"
    path = tmp_path / "config.yaml"
    path.write_text(OmegaConf.to_yaml(values))
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert set(caught.value.lines) == {
        f"{path}: card: was renamed to gpu",
        f"{path}: train.stop_after_minutes=null: was renamed to train.max_minutes",
        f'{path}: train.optimizer_impl="loop": was renamed to train.optimizer_impl=for_loop',
    }


def test_a_gpu_file_of_an_earlier_version_is_an_error_with_the_new_names(tmp_path: Path) -> None:
    values = plain("gpu=t4")["gpu"]
    values["others_mib"] = values.pop("other_processes_mib")
    values["context_mib"] = {"least": 1, "most": 2, "source": "measured"}
    path = tmp_path / "mine.yaml"
    path.write_text(OmegaConf.to_yaml(values))
    with pytest.raises(ConfigError) as caught:
        load_gpu(path)
    assert set(caught.value.lines) == {
        f"{path}: others_mib: was renamed to other_processes_mib",
        f"{path}: context_mib.least=1: was renamed to context_mib.min",
        f"{path}: context_mib.most=2: was renamed to context_mib.max",
    }


SECRETS = [
    "http://me:hunter2@host",
    "postgresql://me:hunter2@host/db",
    "'http://host/?token=hunter2'",
    "'http://host/?a=1&access_token=hunter2'",
    "'postgresql://host/db?password=hunter2'",
    "'mysql://host/db?passwd=hunter2'",
    "'http://host/?api_key=hunter2'",
]


@pytest.mark.parametrize("uri", SECRETS)
def test_a_secret_in_the_tracking_uri_is_an_error(uri: str) -> None:
    (line,) = errors(f"tracking.uri={uri}")
    assert line.startswith("tracking.uri")
    assert "secret" in line
    assert "MLFLOW_TRACKING_PASSWORD" in line


def test_a_secret_is_not_repeated_in_the_error() -> None:
    assert "hunter2" not in str(errors(f"tracking.uri={SECRETS[0]}"))


@pytest.mark.parametrize("uri", ["file:/tmp/mlruns", "file:///tmp/mlruns", "mlruns", "./mlruns", "''"])
def test_a_tracking_uri_that_is_a_directory_is_an_error(uri: str) -> None:
    (line,) = errors(f"tracking.uri={uri}")
    assert line.startswith(f"tracking.uri={uri}: ")
    assert "sqlite:///PATH" in line


@pytest.mark.parametrize("uri", ["auto", "sqlite:////tmp/a.db", "http://127.0.0.1:5000", "https://me@host"])
def test_a_tracking_uri_without_a_secret_is_accepted(uri: str) -> None:
    tracking = load(compose(f"tracking.uri={uri}")).tracking
    assert isinstance(tracking, MlflowConfig)
    assert tracking.uri == uri


@pytest.mark.parametrize("alphabet", ["0123456789", "01234567", "'1e5'", "'true'", "'0.1'", "'äöü'"])
def test_a_text_alphabet_is_not_converted(alphabet: str) -> None:
    assert load(compose(f"captcha.alphabet={alphabet}")).captcha.alphabet == alphabet.strip("'")


# -- files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alphabet", "message"),
    [
        ("01234567", "must be text"),  # octal in YAML
        ("12:30:45", "must be text"),  # base 60 in YAML
        ("1e5", "must be text"),
        ("yes", "must be text"),
        ("0x12", "must be text"),
        ("aab", "'a' occurs more than once"),
    ],
)
def test_values_converted_by_yaml_are_an_error(tmp_path: Path, alphabet: str, message: str) -> None:
    (tmp_path / "captcha").mkdir()
    (tmp_path / "captcha/mine.yaml").write_text(f"defaults: [digits]\nalphabet: {alphabet}\n")
    (line,) = errors("captcha=mine", config_dir=tmp_path)
    assert line.startswith("captcha.alphabet=")
    assert message in line


def test_a_file_of_config_dir_can_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "captcha").mkdir()
    (tmp_path / "captcha/mine.yaml").write_text("defaults: [digits]\nalphabet: '01234567'\n")
    config = load(compose("captcha=mine", config_dir=str(tmp_path)))
    assert config.captcha.alphabet == "01234567"
    assert config.captcha.width == load(composed()).captcha.width


def test_an_invalid_yaml_file_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "captcha").mkdir()
    (tmp_path / "captcha/mine.yaml").write_text("alphabet: [a\n")
    (line,) = errors("captcha=mine", config_dir=tmp_path)
    assert "mine" in line
    assert "no such file" not in line


def test_a_missing_config_dir_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--config-dir=.*/nowhere: no such directory$"):
        compose(config_dir=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "content",
    [
        b"5\n",
        b"- 1\n",
        b"a: [1\n",
        b"a:\n\t- b\n",
        b"\xff\xfe\x00",
        b"name: !!binary aGVsbG8=\n",
        b"name: !!python/object/apply:os.getcwd []\n",
        b"name: a\nname: b\n",
    ],
)
def test_a_saved_file_that_is_not_a_config_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert all(line and "\n" not in line for line in caught.value.lines)


@pytest.mark.parametrize("name", [".", "nowhere.yaml"])
def test_a_saved_file_that_cannot_be_opened_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / name)
    (line,) = caught.value.lines
    assert line.startswith(str(tmp_path))


def test_interpolations_of_saved_files_are_not_resolved(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(load(replaced(plain(), "data.cache", "${oc.env:HOME}"))))
    assert load(path).data.cache == "${oc.env:HOME}"


@pytest.mark.parametrize("wrong", [Path("x"), b"x", {1, 2}])
def test_values_that_are_not_json_are_an_error(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"^name"):
        load({**plain(), "name": wrong})


# -- every key and every choice ------------------------------------------------------------------------------


WRONG: tuple[Any, ...] = (None, [], [[]], {}, -1.5, "no such thing\n", True)


@pytest.mark.parametrize("key", KEYS)
def test_an_invalid_value_of_any_key_is_one_line(key: str) -> None:
    for wrong in WRONG:
        try:
            load(replaced(plain("data=wheezy"), key, wrong))
        except ConfigError as error:
            (line,) = error.lines
            assert line.startswith((f"{key}=", f"{key}:"))


# Added later, so missing in older GPU files of users, and in older runs.
OPTIONAL = {"gpu.compute_capability", "tracking.register"}


@pytest.mark.parametrize("key", [key for key in KEYS if key not in OPTIONAL])
def test_no_key_has_a_default_outside_conf(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(replaced(plain("data=wheezy"), key))
    (line,) = caught.value.lines
    assert line.startswith((f"{key}=", f"{key}:"))


GROUPS = ["", "captcha.", "data.", "model.", "train.", "device.", "gpu.", "gpu.context_mib.", "tracking."]


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_rejects_unknown_keys(group: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{group}no_such_key=1: unknown key"):
        load(replaced(plain(), f"{group}no_such_key", 1))


@pytest.mark.parametrize("key", KEYS)
def test_an_error_has_the_description_of_the_key(key: str) -> None:
    with pytest.raises(ConfigError, match=r"\(.{8,}\)$|must be one of") as caught:
        load(replaced(plain("data=wheezy"), key, {}))
    assert len(caught.value.lines) == 1


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_of_conf_loads(choice: str) -> None:
    config = load(composed(*with_required(choice)))
    assert set(flatten(config)) == set(leaf_keys(plain(*with_required(choice))))


@pytest.mark.parametrize("choice", CHOICES)
def test_a_saved_config_loads_as_the_same_config(choice: str, tmp_path: Path) -> None:
    config = load(composed(*with_required(choice)))
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load(path) == config
    assert load(to_dict(config)) == config


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("machine", [CPU_ONLY, TWO_GPUS])
def test_resolve_replaces_every_auto(choice: str, machine: Machine) -> None:
    requested = load(composed(*with_required(choice)))
    resolved = resolve(requested, machine)
    # Those of the captcha group are inferred from the images; they choose the head.
    inferred = [*resolved.captcha.inferred_keys, *(["model.head"] if resolved.captcha.inferred_keys else [])]
    assert {key for key, value in flatten(resolved).items() if value == "auto"} == set(inferred)
    assert resolve(resolved, machine) == resolved


@pytest.mark.parametrize("file", sorted((conf_dir() / "gpu").glob("*.yaml")), ids=lambda file: str(file.stem))
def test_every_gpu_file_has_all_figures_with_bounds_and_source(file: Path) -> None:
    gpu = load_gpu(file)
    written = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert list(written) == [field.name for field in dataclasses.fields(GpuSpec)]
    for key, figure in written.items():
        if key in ("name", "compute_capability") or (key, file.stem) == ("total_mib", "generic"):
            continue
        assert list(figure) == ["min", "max", "source"], key
        assert 0 <= figure["min"] <= figure["max"], key
        assert len(figure["source"]) > 5, key
    assert gpu.fp16_speedup.max > 0
    assert gpu.bf16_speedup.max > 0
    assert (gpu.total_mib is None) == (file.stem == "generic")  # any GPU


# -- load and resolve ----------------------------------------------------------------------------------------


def test_load_changes_nothing() -> None:
    raw = plain("device.name=auto", "device.threads=auto", "seed=0")
    before = copy.deepcopy(raw)
    assert to_dict(load(raw)) == before
    assert raw == before


def test_resolve_uses_the_first_device_all_cores_and_the_default_store() -> None:
    resolved = flatten(resolve(load(composed()), TWO_GPUS))
    assert resolved["device.name"] == "cuda"
    assert resolved["device.threads"] == resolved["data.workers"] == "8"
    assert resolved["tracking.uri"] == "sqlite:////somewhere/mlruns/mlflow.db"


@pytest.mark.parametrize(
    "override",
    ["device.name=cuda:1", "device.threads=2", "data.workers=2", "tracking.uri=http://host", "seed=0"],
)
def test_resolve_keeps_explicit_values(override: str) -> None:
    key, _, value = override.partition("=")
    assert flatten(resolve(load(compose(override)), TWO_GPUS))[key] == value


def test_resolve_rejects_an_unavailable_device() -> None:
    with pytest.raises(ConfigError, match="no GPU; available here: auto, cpu"):
        resolve(load(compose("device.name=cuda")), CPU_ONLY)


@pytest.mark.parametrize("key", ["seed", "data.seed", "data.split_seed"])
def test_zero_is_a_valid_seed(key: str) -> None:
    assert flatten(resolve(load(compose(f"{key}=0")), CPU_ONLY))[key] == "0"
    assert flatten(load(compose(f"{key}=7")))[key] == "7"


@pytest.mark.parametrize(
    "override",
    [
        "captcha.width=100",
        "captcha.height=40",
        "captcha.alphabet=xyz",
        "captcha.length=6",
        "data.count=500",
        "train.batch_size=25",
        "train.epochs=7",
        "device.name=cpu",
    ],
)
def test_an_override_changes_only_its_key(override: str) -> None:
    key, _, value = override.partition("=")
    before, after = flatten(load(composed())), flatten(load(compose(override)))
    assert {k: after[k] for k in after if after[k] != before[k]} == {key: value}


def test_an_override_takes_precedence_over_an_experiment() -> None:
    assert load(compose("train.epochs=1", "experiment=alnum")).train.epochs == 1
    assert load(compose("experiment=alnum", "train.epochs=1")).train.epochs == 1


def test_a_home_directory_is_expanded_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = load(compose("data.cache=~/c", "data.fonts=[~/a.ttf,b.ttf]", "tracking.uri=sqlite:///~/m.db"))
    assert isinstance(config.data, BaseGeneratorConfig)
    assert isinstance(config.tracking, MlflowConfig)
    assert (config.data.cache, config.data.fonts) == ("/home/me/c", ("/home/me/a.ttf", "b.ttf"))
    assert config.tracking.uri == "sqlite:////home/me/m.db"
    folder = load(compose("data=folder", "data.path=~", "data.labels=~/a.csv")).data
    assert isinstance(folder, FolderConfig)
    assert (folder.path, folder.labels) == ("/home/me", "/home/me/a.csv")


def test_an_unknown_home_directory_is_an_error() -> None:
    (line,) = errors("data.cache=~no-such-user/x")
    assert line.startswith("data.cache=~no-such-user/x: the home directory of this user is not known")


def test_a_config_is_frozen() -> None:
    with pytest.raises(AttributeError):
        load(composed()).seed = 1  # type: ignore[misc]  # tests that it is frozen
