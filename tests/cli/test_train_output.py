"""What `captcha-exp train` suggests at its end."""

import json
import shlex
from pathlib import Path

import pytest
from conftest import TINY

from captcha_exp import compose, load, runs
from captcha_exp.cli.hydra_config import try_compose
from captcha_exp.cli.train import ResultPrinter, _suggest_data
from captcha_exp.runs.info import ResultSummary


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


@pytest.mark.parametrize("error", [BrokenPipeError(), SystemExit(1)])
def test_a_closed_pipe_is_no_reason_to_fail_a_run(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results are printed while the run is open; its figures are drawn, and then the command fails."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("captcha_exp.cli.train.print_result", fail)
    printer = ResultPrinter(as_json=False)
    result = ResultSummary(
        epochs=1,
        best_epoch=1,
        val_accuracy=1.0,
        test_accuracy=1.0,
        weights_sha256="0",
        seconds=1.0,
        process_peak_mib=1.0,
    )
    printer(tmp_path, result)
    assert printer.error is error
