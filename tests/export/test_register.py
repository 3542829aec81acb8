"""Test exported files as models in MLflow: logged, registered, and served by MLflow's own server."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import yaml
from conftest import Call, edit_record, infos, warnings
from mlflow import MlflowClient
from PIL import Image
from scoring_server import ACCEPTED, FAILING, REFUSED, Response, is_up, post, serve, to_body
from serving import measure, texts_of

from captcha_exp import OnnxPredictor
from captcha_exp.config import check_model_name
from captcha_exp.errors import RunFailed
from captcha_exp.export import register
from captcha_exp.export.export import Export
from captcha_exp.tracking import models
from captcha_exp.tracking.models import ModelNotLogged

PROJECT = Path(__file__).resolve().parents[2]
OVERRIDES = (
    *("data=folder", "device.name=cpu", "device.threads=1", "augment=none"),
    *("captcha.width=48", "captcha.height=16", "captcha.channels=1"),
    *("model.channels=[16,16,16]", "train=constant_lr", "train.epochs=6", "train.batch_size=16"),
    *("train.learning_rate=0.01", "train.patience=null"),
)


@dataclass(frozen=True)
class Trained:
    """A run with tracking.register=digits, and what its process printed."""

    root: Path
    run_dir: Path
    stderr: str

    @property
    def store(self) -> str:
        return f"sqlite:///{self.root}/mlruns/mlflow.db"

    @property
    def client(self) -> Any:
        return MlflowClient(self.store, registry_uri=self.store)

    @property
    def file(self) -> Path:
        return self.run_dir / "model.onnx"


def bars(text: str, seed: int) -> Image.Image:
    """Return an image of a dark or a bright bar for each character of 0 and 1, with noise."""
    columns = np.repeat([60 if c == "0" else 190 for c in text], 11)
    noise = np.random.default_rng(seed).integers(-25, 26, (22, 66, 3))
    return Image.fromarray((columns[None, :, None] + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("trained")
    (root / "images").mkdir()
    for n in range(256):
        bars(f"{n % 64:06b}", n).save(root / "images" / f"{n:05}-{n % 64:06b}.png")
    command = [sys.executable, "-m", "captcha_exp", "train", *OVERRIDES, f"data.path={root}/images"]
    environment = {**os.environ, "CAPTCHA_EXP_ROOT": str(root)}
    done = subprocess.run(
        [*command, "tracking.register=digits"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (run_dir,) = (path.parent for path in root.glob("outputs/*/*/run.json"))
    return Trained(root, run_dir, done.stderr)


@pytest.fixture
def exported(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> Export:
    """Return the file of the run, whose root directory is that of the test."""
    monkeypatch.setenv("CAPTCHA_EXP_ROOT", str(trained.root))
    return Export(trained.file, OnnxPredictor(trained.file).manifest, trained.file.stat().st_size)


def model_files(trained: Trained) -> Path:
    """Return the directory of the only logged model."""
    (directory,) = (trained.root / "mlruns" / "artifacts" / "models").iterdir()
    return directory / "artifacts"


# -- logged and registered -----------------------------------------------------------------------------------


@pytest.mark.long
def test_a_training_registers_its_model(trained: Trained) -> None:
    (version,) = trained.client.search_model_versions("name = 'digits'")
    test = json.loads((trained.run_dir / "test.json").read_text())
    assert f"as version 1 of digits (models:/digits@{models.ALIAS})" in " ".join(trained.stderr.split())
    assert trained.client.get_model_version_by_alias("digits", models.ALIAS).version == version.version
    assert version.run_id == json.loads((trained.run_dir / "run.json").read_text())["mlflow"]["run_id"]
    assert float(version.tags["test_accuracy"]) == pytest.approx(test["accuracy"], abs=1e-4)
    assert version.description.startswith(f"Test accuracy {test['accuracy']:.2%} (95% confidence interval ")
    run = trained.client.get_run(version.run_id)
    assert [each.model_id for each in run.outputs.model_outputs] == [version.source.removeprefix("models:/")]
    assert run.info.status == "FINISHED"


@pytest.mark.long
def test_only_data_travels_with_the_model(trained: Trained) -> None:
    directory = model_files(trained)
    assert {path.relative_to(directory).as_posix() for path in directory.rglob("*")} == {
        *("MLmodel", "model.onnx", "requirements.txt", "conda.yaml", "python_env.yaml"),
        *("input_example.json", "serving_input_example.json"),
    }
    assert (directory / "model.onnx").read_bytes() == trained.file.read_bytes()
    assert OnnxPredictor(directory / "model.onnx").self_test() == []
    described = yaml.safe_load((directory / "MLmodel").read_text())
    assert described["flavors"]["python_function"]["loader_module"] == "mlflow.onnx"
    assert described["flavors"]["python_function"].get("code") is None
    assert described["metadata"]["alphabet"] == "01"
    (image,) = json.loads(described["signature"]["inputs"])
    assert (image["name"], image["tensor-spec"]) == ("images", {"dtype": "uint8", "shape": [-1, -1, -1, 3]})
    outputs = {each["name"]: each["tensor-spec"] for each in json.loads(described["signature"]["outputs"])}
    assert outputs["ids"] == {"dtype": "int64", "shape": [-1, 6]}
    assert outputs["text_confidences"] == {"dtype": "float32", "shape": [-1]}
    requirements = (directory / "requirements.txt").read_text().split()
    assert {line.partition("==")[0] for line in requirements} == {"mlflow", "onnx", "onnxruntime"}
    assert all(re.fullmatch(r"[a-z]+==[\d.]+", line) for line in requirements)


@pytest.mark.long
def test_no_secret_and_no_address_is_in_the_model(trained: Trained) -> None:
    for path in model_files(trained).iterdir():
        content = path.read_bytes()
        assert b"TOKEN" not in content
        assert path.name == "MLmodel" or str(trained.root).encode() not in content, path


@pytest.mark.long
def test_the_same_file_is_the_same_version(trained: Trained, exported: Export) -> None:
    first = register.log_export(exported, trained.run_dir, "digits")
    assert (first.version, first.uri) == ("1", "models:/digits@newest")
    assert register.log_export(exported, trained.run_dir).model_id == first.model_id
    assert "MLFLOW_TRACKING_URI" not in os.environ
    other = register.log_export(exported, trained.run_dir, 'o\'ther "name"')
    assert (other.model_id, other.version) == (first.model_id, "1")
    assert len(list((trained.root / "mlruns" / "artifacts" / "models").iterdir())) == 1


@pytest.mark.long
def test_another_file_is_another_version(
    trained: Trained, exported: Export, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(trained.root, root)
    monkeypatch.setenv("CAPTCHA_EXP_ROOT", str(root))
    run_dir = root / trained.run_dir.relative_to(trained.root)
    shutil.move(trained.root / "mlruns", trained.root / "away")
    try:  # the copy has a store of its own, with the model in it
        ref = register.log_export(exported, run_dir, "digits")
        assert (ref.version, ref.store) == ("1", f"sqlite:///{root}/mlruns/mlflow.db")
        client: Any = MlflowClient(ref.store, registry_uri=ref.store)
        here = (root / "mlruns" / "artifacts" / "models" / ref.model_id / "artifacts").as_uri()
        assert client.get_logged_model(ref.model_id).artifact_location == here
        assert client.get_model_version_download_uri("digits", "1") == here
        content = exported.path.read_bytes()
        monkeypatch.setattr(Path, "read_bytes", lambda _: content)
        monkeypatch.setattr(models.OnnxModel, "sha256", "0" * 64)
        other = register.log_export(exported, run_dir, "digits")
        assert (other.version, other.model_id != ref.model_id) == ("2", True)
        assert str(client.get_model_version_by_alias("digits", models.ALIAS).version) == "2"
    finally:
        shutil.move(trained.root / "away", trained.root / "mlruns")


@pytest.mark.long
def test_an_upload_that_fails_leaves_no_model(
    trained: Trained, exported: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models.OnnxModel, "sha256", "1" * 64)
    monkeypatch.setattr(MlflowClient, "log_model_artifacts", fail)
    run_id = json.loads((trained.run_dir / "run.json").read_text())["mlflow"]["run_id"]
    before = trained.client.get_run(run_id)
    with pytest.raises(ModelNotLogged, match=r"^tracking\.uri=sqlite:.*No space left on device"):
        register.log_export(exported, trained.run_dir, "digits")
    after = trained.client.get_run(run_id)
    assert len(after.outputs.model_outputs) == len(before.outputs.model_outputs)
    found = trained.client.search_logged_models([before.info.experiment_id])
    assert {str(each.status) for each in found} == {"READY"}


def test_the_global_store_of_a_notebook_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    unset: Any = None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "restored by the test")
    mlflow.set_tracking_uri("http://127.0.0.1:1")
    os.environ.pop("MLFLOW_TRACKING_URI")
    try:
        with models._global_tracking_uri("http://127.0.0.1:2"):
            assert mlflow.get_tracking_uri() == "http://127.0.0.1:2"
        assert mlflow.get_tracking_uri() == "http://127.0.0.1:1"
        assert "MLFLOW_TRACKING_URI" not in os.environ
    finally:
        mlflow.set_tracking_uri(unset)


# -- the command ---------------------------------------------------------------------------------------------


@pytest.fixture
def lone_run(trained: Trained, exported: Export, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the copy of the run in another root directory, where its export is quick."""
    from captcha_exp.cli import export

    run_dir = root / trained.run_dir.relative_to(trained.root)
    shutil.copytree(trained.run_dir, run_dir)
    monkeypatch.setenv("CAPTCHA_EXP_ROOT", str(root))
    monkeypatch.setattr(export, "export_run", lambda *_: exported)
    return run_dir


@pytest.mark.long
@pytest.mark.parametrize("words", [(), ("--register", "digits")])
@pytest.mark.parametrize("reason", ["untracked", "away"])
def test_where_mlflow_is_away_the_file_is_written(
    lone_run: Path, call: Call, caplog: pytest.LogCaptureFixture, words: tuple[str, ...], reason: str
) -> None:
    record = json.loads((lone_run / "run.json").read_text())
    ref = {"untracked": None, "away": record["mlflow"] | {"uri": "http://127.0.0.1:1", "closed": False}}
    edit_record(lone_run, mlflow=ref[reason], pid=2**22 - 1)
    code, out, err = call("export", str(lone_run), *words)
    lines = [line for line in err.splitlines() if "MLflow" in line or "--register" in line]
    assert "proven on the" in out
    assert code == (1 if words else 0)
    assert len(lines) == 1, err
    why = {"untracked": "the run was made with tracking=none", "away": "http://127.0.0.1:1: "}[reason]
    assert why in lines[0]
    if words:
        assert lines[0].startswith("--register digits: not registered: ")
    else:
        assert "not in MLflow" in lines[0]


@pytest.mark.long
def test_the_store_of_another_user_is_not_asked(
    lone_run: Path, call: Call, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = tmp_path_factory.mktemp("foreign") / "run"
    shutil.move(lone_run, foreign)
    record = json.loads((foreign / "run.json").read_text())
    edit_record(foreign, mlflow=record["mlflow"] | {"uri": "http://127.0.0.1:1"})
    monkeypatch.setattr(models, "inspect_store", lambda *_: pytest.fail("was asked"))
    code, _, err = call("export", str(foreign), "--register", "digits")
    assert code == 1
    assert "may name the store of another user; set MLFLOW_TRACKING_URI to this one if you know it" in err


@pytest.mark.parametrize("name", ["", " ", "a/b", "a:b", "a@newest", "a\nb", "..", "x" * 201, " a"])
def test_a_name_that_mlflow_refuses_is_a_mistake(name: str, call: Call) -> None:
    with pytest.raises(ValueError, match="must"):
        check_model_name(name)
    code, out, err = call("export", "latest", "--register", name)
    assert (code, out) == (2, "")
    assert err.startswith("--register ")


def test_the_name_in_the_config_is_checked_before_a_run(call: Call, root: Path) -> None:
    code, _, err = call("train", "tracking.register=a/b")
    assert (code, len(err.splitlines())) == (2, 1)
    assert err.startswith("tracking.register=a/b: ")
    assert not list((root / "outputs").glob("*/*"))


@pytest.mark.long
def test_a_registration_that_fails_does_not_fail_the_training(
    trained: Trained, exported: Export, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> Export:
        raise RunFailed("not written: ONNX Runtime reads 1 of 2 test images otherwise than PyTorch")

    monkeypatch.setattr(register, "export_run", fail)
    register.register_after_training(trained.run_dir)
    (line,) = warnings(caplog)
    assert line.startswith("tracking.register=digits: not registered: not written: ONNX Runtime reads 1 of 2")
    assert line.endswith(f"captcha-exp export {trained.run_dir} --register digits tries again")
    assert infos(caplog) == []


# -- served --------------------------------------------------------------------------------------------------


def python_of_docs() -> str:
    """Return the client in docs/serving.md."""
    text = (PROJECT / "docs" / "serving.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert block is not None
    return block[1]


def curl_of_docs() -> str:
    """Return the lines that write request.json and send it."""
    text = (PROJECT / "docs" / "serving.md").read_text(encoding="utf-8")
    block = re.search(r"```bash\n(python -c .*?^curl .*?)```", text, re.DOTALL | re.MULTILINE)
    assert block is not None
    return block[1].replace("python -c", f"{sys.executable} -c")


@pytest.mark.slow
def test_the_server_answers_as_documented(trained: Trained, tmp_path: Path) -> None:
    predictor = OnnxPredictor(trained.file)
    images, manifest = predictor.proof_images(), predictor.manifest
    bodies, expected = [to_body(each.pixels.tolist()) for each in images], [each.text for each in images]
    Image.fromarray(images[0].pixels).save(tmp_path / "captcha.png")
    with serve("models:/digits@newest", trained.store) as port:
        curl = curl_of_docs().replace(":5001/", f":{port}/")
        answer = subprocess.run(["sh", "-c", curl], cwd=tmp_path, capture_output=True, check=True).stdout
        assert texts_of(Response(200, answer), manifest) == [expected[0]]
        done = subprocess.run(
            [sys.executable, "-c", python_of_docs().replace(":5001/", f":{port}/")],
            cwd=tmp_path,
            env={**os.environ, "MLFLOW_TRACKING_URI": trained.store},
            capture_output=True,
            text=True,
            check=True,
        )
        text, confidence = done.stdout.split()
        assert text == expected[0]
        assert float(confidence) == pytest.approx(images[0].confidence, abs=1e-3)
        example = (model_files(trained) / "serving_input_example.json").read_bytes()
        assert texts_of(post(port, example), manifest) == [expected[0]]
        both = to_body(*(each.pixels.tolist() for each in images[:8]))
        assert texts_of(post(port, both), manifest) == expected[:8]
        large = np.asarray(Image.fromarray(images[0].pixels).resize((330, 110), Image.Resampling.BOX))
        (other,) = predictor([large])
        assert texts_of(post(port, to_body(large.tolist())), manifest) == [other.text]

        for name, request in REFUSED.items():
            response = post(port, *request)
            assert 400 <= response.status < 500, (name, response)
            assert len(response.body) > 20, name
        for name, body in FAILING.items():
            assert post(port, body).status == 500, f"MLflow refuses {name} now: tell docs/serving.md"
        for name, body in ACCEPTED.items():
            assert post(port, body).status == 200, f"MLflow refuses {name} now: tell docs/serving.md"
        assert is_up(port)

        figures = measure(port, bodies, expected, manifest, requests=1000, clients=8)
        assert (figures["right"], figures["wrong"], figures["lost"]) == (1000, 0, 0)
