"""The contract of the config: what is written arrives as it was written, or one line says what is wrong."""

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
from captcha_exp.config import GpuSpec, Machine, MlflowConfig, flatten, load_gpu, resolve, to_dict, to_yaml
from captcha_exp.errors import ConfigError, UserError
from captcha_exp.runtime.paths import conf_dir

NO_CARD = Machine(
    devices=("cpu",),
    num_cores=3,
    root=Path("/somewhere"),
    unavailable_reason={"cuda": "no card", "mps": "no Mac"},
)
TWO_CARDS = Machine(
    devices=("cuda", "cuda:0", "cuda:1", "cpu"), num_cores=8, root=Path("/somewhere"), unavailable_reason={}
)

# Every file of every group, as an override.
CHOICES = sorted(f"{file.parent.name}={file.stem}" for file in conf_dir().glob("*/*.yaml"))


def complete(choice: str) -> tuple[str, ...]:
    """A choice with what it leaves to be given."""
    return (choice, "data.path=/pictures") if choice == "data=folder" else (choice,)


@cache
def composed(*overrides: str) -> DictConfig:
    return compose(*overrides)


def plain(*overrides: str) -> dict[str, Any]:
    """A composed config as plain values, to be changed by a test."""
    values: dict[str, Any] = json.loads(json.dumps(OmegaConf.to_container(composed(*overrides))))
    return values


def mistakes(*overrides: str, config_dir: Path | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        try_compose(overrides, str(config_dir) if config_dir else None).to_config(NO_CARD)
    return caught.value.lines


def keys(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def put(values: dict[str, Any], key: str, *value: Any) -> dict[str, Any]:
    """A copy with another value at a key, or without the key."""
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


KEYS = sorted(set(keys(plain("data=wheezy"))) - {"gpu.total_mib"})  # null, or a group of keys


# -- mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("captcha.widht=56", "did you mean captcha.width?"),
        ("captcha.width=15", "at least 16, at most 2048 (pixels, after the resize)"),
        ("captcha.channels=2", "must be one of 1, 3"),
        ("captcha.alphabet=aab", "'a' occurs more than once"),
        ("captcha.alphabet='1e55'", "'5' occurs more than once"),
        ("captcha.alphabet=1e5", "must be text"),
        ("captcha.alphabet=true", "must be text"),
        ("captcha.alphabet=1_000", "must be text"),
        ("captcha.alphabet=null", "must be text"),
        ("captcha.alphabet='a b'", "' ' cannot be seen"),
        ("data.count=0", "must be a whole number, at least 1"),
        ("data.workers=0", "must be a whole number, at least 1, at most 1024 or auto"),
        ("data.fonts=[1]", "must be a list, each text"),
        ("data.validation_fraction=1", "must be a number, at least 0, below 1"),
        ("data.source=folders", "must be one of article, captcha, folder, wheezy"),
        ("device.name=cuda", "no card; available here: auto, cpu"),
        ("device.name=cuda:1", "no card; available here: auto, cpu"),
        ("device.name=mps", "no Mac; available here: auto, cpu"),
        ("device.name=gpu", "auto, cpu, mps, cuda, cuda:1"),
        ("device.name=cuda:x", "auto, cpu, mps, cuda, cuda:1"),
        ("device.threads=true", "at least 1, at most 1024 or auto"),
        ("model.channels=[4,x]", "must be a list, each a whole number, at least 1"),
        ("model.channels=[4,0]", "must be a list, each a whole number, at least 1"),
        ("model.channels=[4]", "entries at least 2"),
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
        ("train.foo=1", "there is no such key; known are train.activation_checkpointing, "),
        ("width=100", "did you mean "),
        ("experiment=typo", "one of alnum, article, quickstart"),
        ("experiment=quickstrat", "did you mean quickstart?"),
        ("train=null", "one of constant, few, onecycle"),
        ("model=", "one of compact, resnet18"),
        ("hydra.run.dir=x", "has no effect, Hydra only composes the config"),
        ("train.batch_size=25,50", "is a sweep"),
        ("seed=range(1,4)", "is a sweep"),
    ],
)
def test_a_mistake_gives_one_line_with_the_key_the_value_and_what_is_allowed(
    override: str, allowed: str
) -> None:
    (line,) = mistakes(override)
    assert line.startswith(f"{override}: ")
    assert allowed in line
    assert "\n" not in line


@pytest.mark.parametrize("override", ["foo", "", "a=b=c", "train.batch_size=[1", "captcha.alphabet=abc#d"])
def test_what_is_no_override_is_quoted_in_one_line(override: str) -> None:
    assert mistakes(override) == (
        f"{override!r}: invalid override; write key=value, with quotes around special characters",
    )


def test_a_plus_does_not_let_an_unknown_key_in() -> None:
    (line,) = mistakes("+train.foo=1")
    assert line.startswith("train.foo=1: there is no such key")


@pytest.mark.parametrize("override", ["~captcha.width", "~train", "~seed", "data.cache=???"])
def test_a_key_without_a_value_is_missing(override: str) -> None:
    (line,) = mistakes(override)
    assert line.startswith(f"{override.strip('~=?')}: is missing; write ")


def test_all_mistakes_are_told_at_once_a_line_each() -> None:
    lines = mistakes(
        "captcha=typo", "captcha.widht=56", "train.batch_size=abc", "seed=null", "device.name=mps"
    )
    assert sorted(line.split("=")[0] for line in lines) == [
        "captcha",
        "captcha.widht",
        "device.name",
        "seed",
        "train.batch_size",
    ]


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.9, 0.3), (0.0, 0.999), (0.25, 0.25)])
def test_the_fractions_leave_something_to_train_on(fractions: tuple[float, float]) -> None:
    overrides = f"data.validation_fraction={fractions[0]}", f"data.test_fraction={fractions[1]}"
    if sum(fractions) < 1:
        load(compose(*overrides))
    else:
        (line,) = mistakes(*overrides)
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
def test_a_key_of_another_choice_is_refused_without_being_proposed_itself(
    overrides: tuple[str, ...], key: str
) -> None:
    (line,) = mistakes(*overrides)
    assert line.startswith(f"{key}=")
    assert "there is no such key" in line
    assert f"did you mean {key}?" not in line


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
def test_a_secret_in_the_tracking_uri_is_refused(uri: str) -> None:
    (line,) = mistakes(f"tracking.uri={uri}")
    assert line.startswith("tracking.uri")
    assert "secret" in line
    assert "MLFLOW_TRACKING_PASSWORD" in line


def test_a_refused_secret_is_not_repeated_where_a_log_keeps_it() -> None:
    assert "hunter2" not in str(mistakes(f"tracking.uri={SECRETS[0]}"))


@pytest.mark.parametrize("uri", ["file:/tmp/mlruns", "file:///tmp/mlruns", "mlruns", "./mlruns", "''"])
def test_a_tracking_uri_that_is_a_plain_folder_is_refused(uri: str) -> None:
    (line,) = mistakes(f"tracking.uri={uri}")
    assert line.startswith(f"tracking.uri={uri}: ")
    assert "sqlite:///PATH" in line


@pytest.mark.parametrize("uri", ["auto", "sqlite:////tmp/a.db", "http://127.0.0.1:5000", "https://me@host"])
def test_a_tracking_uri_without_a_secret_is_accepted(uri: str) -> None:
    tracking = load(compose(f"tracking.uri={uri}")).tracking
    assert isinstance(tracking, MlflowConfig)
    assert tracking.uri == uri


@pytest.mark.parametrize("alphabet", ["0123456789", "01234567", "'1e5'", "'true'", "'0.1'", "'äöü'"])
def test_an_alphabet_that_is_text_stays_the_text_that_was_typed(alphabet: str) -> None:
    assert load(compose(f"captcha.alphabet={alphabet}")).captcha.alphabet == alphabet.strip("'")


# -- files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("01234567", "must be text"),  # YAML reads an octal number
        ("12:30:45", "must be text"),  # a number to the base of 60
        ("1e5", "must be text"),
        ("yes", "must be text"),
        ("0x12", "must be text"),
        ("aab", "'a' occurs more than once"),
    ],
)
def test_what_yaml_bends_in_a_persons_own_file_is_refused(tmp_path: Path, written: str, words: str) -> None:
    (tmp_path / "captcha").mkdir()
    (tmp_path / "captcha/mine.yaml").write_text(f"defaults: [digits]\nalphabet: {written}\n")
    (line,) = mistakes("captcha=mine", config_dir=tmp_path)
    assert line.startswith("captcha.alphabet=")
    assert words in line


def test_a_persons_own_file_is_a_choice_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "captcha").mkdir()
    (tmp_path / "captcha/mine.yaml").write_text("defaults: [digits]\nalphabet: '01234567'\n")
    config = load(compose("captcha=mine", config_dir=str(tmp_path)))
    assert config.captcha.alphabet == "01234567"
    assert config.captcha.width == load(composed()).captcha.width


def test_a_persons_own_file_that_is_no_yaml_gives_one_line(tmp_path: Path) -> None:
    (tmp_path / "captcha").mkdir()
    (tmp_path / "captcha/mine.yaml").write_text("alphabet: [a\n")
    (line,) = mistakes("captcha=mine", config_dir=tmp_path)
    assert "mine" in line
    assert "there is no such file" not in line


def test_a_config_dir_that_is_not_there_gives_one_line(tmp_path: Path) -> None:
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
def test_a_saved_file_that_is_no_config_is_refused_in_lines(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert all(line and "\n" not in line for line in caught.value.lines)


@pytest.mark.parametrize("name", [".", "nowhere.yaml"])
def test_a_saved_file_that_cannot_be_opened_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / name)
    (line,) = caught.value.lines
    assert line.startswith(str(tmp_path))


def test_an_interpolation_in_a_saved_file_is_text_and_is_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(load(put(plain(), "data.cache", "${oc.env:HOME}"))))
    assert load(path).data.cache == "${oc.env:HOME}"


@pytest.mark.parametrize("wrong", [Path("x"), b"x", {1, 2}])
def test_values_that_no_file_can_hold_are_refused_in_a_library_call_too(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"^name"):
        load({**plain(), "name": wrong})


# -- every key and every choice ------------------------------------------------------------------------------


WRONG: tuple[Any, ...] = (None, [], [[]], {}, -1.5, "no such thing\n", True)


@pytest.mark.parametrize("key", KEYS)
def test_a_wrong_value_at_any_key_gives_one_line_that_begins_with_the_key(key: str) -> None:
    for wrong in WRONG:
        try:
            load(put(plain("data=wheezy"), key, wrong))
        except ConfigError as error:
            (line,) = error.lines
            assert line.startswith((f"{key}=", f"{key}:"))


# Not in every file of a GPU that a user wrote: it came later.
OPTIONAL = {"gpu.compute_capability"}


@pytest.mark.parametrize("key", [key for key in KEYS if key not in OPTIONAL])
def test_no_key_has_a_default_outside_conf(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(put(plain("data=wheezy"), key))
    (line,) = caught.value.lines
    assert line.startswith((f"{key}=", f"{key}:"))


GROUPS = ["", "captcha.", "data.", "model.", "train.", "device.", "card.", "gpu.context_mib.", "tracking."]


@pytest.mark.parametrize("group", GROUPS)
def test_no_group_takes_an_unknown_key(group: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{group}unheard_of=1: there is no such key"):
        load(put(plain(), f"{group}unheard_of", 1))


@pytest.mark.parametrize("key", KEYS)
def test_a_mistake_tells_the_meaning_of_the_key_also_where_a_group_inherits_it(key: str) -> None:
    with pytest.raises(ConfigError, match=r"\(.{8,}\)$|must be one of") as caught:
        load(put(plain("data=wheezy"), key, {}))
    assert len(caught.value.lines) == 1


@pytest.mark.parametrize("choice", CHOICES)
def test_every_file_in_conf_is_a_choice_that_loads(choice: str) -> None:
    config = load(composed(*complete(choice)))
    assert set(flatten(config)) == set(keys(plain(*complete(choice))))


@pytest.mark.parametrize("choice", CHOICES)
def test_a_saved_config_loads_as_the_same_config(choice: str, tmp_path: Path) -> None:
    config = load(composed(*complete(choice)))
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load(path) == config
    assert load(to_dict(config)) == config


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("machine", [NO_CARD, TWO_CARDS])
def test_resolve_turns_every_auto_into_a_value_once(choice: str, machine: Machine) -> None:
    resolved = resolve(load(composed(*complete(choice))), machine)
    assert [key for key, value in flatten(resolved).items() if value == "auto"] == []
    assert resolve(resolved, machine) == resolved


@pytest.mark.parametrize("file", sorted((conf_dir() / "gpu").glob("*.yaml")), ids=lambda file: str(file.stem))
def test_every_card_has_every_figure_with_its_bounds_and_its_source(file: Path) -> None:
    gpu = load_gpu(file)
    written = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert list(written) == [field.name for field in dataclasses.fields(GpuSpec)]
    for key, figure in written.items():
        if key in ("name", "compute_capability") or (key, file.stem) == ("total_mib", "generic"):
            continue
        assert list(figure) == ["least", "most", "source"], key
        assert 0 <= figure["least"] <= figure["most"], key
        assert len(figure["source"]) > 5, key
    assert gpu.fp16_speedup.max > 0
    assert gpu.bf16_speedup.max > 0
    assert (gpu.total_mib is None) == (file.stem == "generic")  # it may be any


# -- load and resolve ----------------------------------------------------------------------------------------


def test_load_edits_nothing() -> None:
    raw = plain("device.name=auto", "device.threads=auto", "seed=0")
    before = copy.deepcopy(raw)
    assert to_dict(load(raw)) == before
    assert raw == before


def test_resolve_takes_the_first_device_all_cores_and_the_store_beside_the_outputs() -> None:
    resolved = flatten(resolve(load(composed()), TWO_CARDS))
    assert resolved["device.name"] == "cuda"
    assert resolved["device.threads"] == resolved["data.workers"] == "8"
    assert resolved["tracking.uri"] == "sqlite:////somewhere/mlruns/mlflow.db"


@pytest.mark.parametrize(
    "override",
    ["device.name=cuda:1", "device.threads=2", "data.workers=2", "tracking.uri=http://host", "seed=0"],
)
def test_resolve_leaves_alone_what_was_asked_for(override: str) -> None:
    key, _, value = override.partition("=")
    assert flatten(resolve(load(compose(override)), TWO_CARDS))[key] == value


def test_resolve_refuses_a_device_that_is_not_here() -> None:
    with pytest.raises(ConfigError, match="no card; available here: auto, cpu"):
        resolve(load(compose("device.name=cuda")), NO_CARD)


@pytest.mark.parametrize("key", ["seed", "data.seed", "data.split_seed"])
def test_zero_is_a_seed_like_any_other(key: str) -> None:
    assert flatten(resolve(load(compose(f"{key}=0")), NO_CARD))[key] == "0"
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
def test_one_override_changes_one_thing(override: str) -> None:
    key, _, value = override.partition("=")
    before, after = flatten(load(composed())), flatten(load(compose(override)))
    assert {k: after[k] for k in after if after[k] != before[k]} == {key: value}


def test_an_override_wins_over_an_experiment_wherever_it_stands() -> None:
    assert load(compose("train.epochs=1", "experiment=alnum")).train.epochs == 1
    assert load(compose("experiment=alnum", "train.epochs=1")).train.epochs == 1


def test_a_config_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(AttributeError):
        load(composed()).seed = 1  # type: ignore[misc]  # that it is frozen is the point
