"""What `captcha-exp train` suggests at its end."""

import json
import shlex

import pytest
from conftest import TINY

from captcha_exp import compose, load, runs
from captcha_exp.cli.hydra_config import try_compose
from captcha_exp.cli.train import _suggest_data


@pytest.mark.parametrize("path", ["my_captchas", "/a b/$(x)/it's,", "[one,'two 2']"])
def test_the_command_for_wrong_labels_names_the_folder(path: str) -> None:
    words = [word for word in TINY if not word.startswith(("data.", "captcha."))]
    value = path if path.isidentifier() or path.startswith("[") else json.dumps(path)
    config = load(compose(*words, "data=folder", f"data.path={value}"))
    run = runs.create_run(config, config)
    (run.run_dir / "dataset.json").write_text('{"files": [{}]}')
    command, _ = _suggest_data(run.run_dir, "tiny")
    first, *overrides = shlex.split(command)
    assert (first, overrides[:2]) == ("data", ["--folds", "5"])
    assert try_compose([*words, *overrides[2:]], None).to_config(None).data == config.data
    if path == "my_captchas":
        assert command == "data --folds 5 data=folder data.path=my_captchas"
