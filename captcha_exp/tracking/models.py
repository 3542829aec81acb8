"""ONNX models in MLflow: log a file to its run with MLflow's own flavor, and register it as a version.

Only data is sent: the model directory has the ONNX file, MLflow's descriptions of it, and an example.
MLflow's own code loads it; none of this package, and no pickle, travels with it.
"""

import contextlib
import hashlib
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlflow
import mlflow.onnx
import numpy as np
import numpy.typing as npt
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec

from captcha_exp.config import is_inside, sqlite_path
from captcha_exp.errors import UserError
from captcha_exp.runs import RunInfo, stale_in
from captcha_exp.runtime.paths import root_dir
from captcha_exp.tracking.content import current_ref
from captcha_exp.tracking.delivery import shorten
from captcha_exp.tracking.inspection import inspect_store
from captcha_exp.tracking.problems import describe_problem, source_of
from captcha_exp.tracking.store import open_store, run_exists
from captcha_exp.tracking.sync import sync_owed

MODEL_NAME = "onnx"  # of the model within its run
FILE_NAME = "model.onnx"  # the flavor's name of the file
ALIAS = "newest"  # of the version registered last; MLflow reserves `latest`
SHA256_TAG = "onnx_sha256"
URI_VARIABLE = "MLFLOW_TRACKING_URI"
LOCK_SECONDS = 10.0  # another process may deliver runs


class ModelNotLogged(Exception):
    """MLflow did not get a model; the message is the reason, and the file is unharmed."""


class UntrackedRun(ModelNotLogged):
    """The run was made with tracking=none."""


@dataclass(frozen=True)
class TensorType:
    """An input or output of a model."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """-1 for any size"""


@dataclass(frozen=True)
class OnnxModel:
    """An ONNX file with its description for MLflow."""

    content: bytes
    inputs: Sequence[TensorType]
    outputs: Sequence[TensorType]
    example: Mapping[str, npt.NDArray[Any]]
    """an input, by name"""
    requirements: Sequence[str]
    """for pip, pinned"""
    metadata: Mapping[str, Any]
    """of the file MLmodel"""
    tags: Mapping[str, str]
    """of the model and its versions"""
    description: str
    """of a version; Markdown"""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


@dataclass(frozen=True)
class ModelRef:
    """Where MLflow has a model."""

    store: str
    """tracking URI"""
    run_id: str
    model_id: str
    name: str | None = None
    """of the registered model"""
    version: str | None = None

    @property
    def uri(self) -> str:
        """URI of the model for MLflow, by its alias if it is registered."""
        return f"models:/{self.model_id}" if self.name is None else f"models:/{self.name}@{ALIAS}"

    def to_json(self) -> dict[str, Any]:
        """Return all fields, the URI and the alias."""
        return {**asdict(self), "alias": None if self.name is None else ALIAS, "uri": self.uri}


def log_model(run_dir: Path, model: OnnxModel, name: str | None = None) -> ModelRef:
    """Log a model to the MLflow run of a run directory; register it as a version of `name`, if given.

    MLflow gets a model once: the same file again is the same model, and the same version.

    Raises:
        ModelNotLogged: MLflow is away or refuses it, or the run is not there; the message is the reason.
    """
    store, run_id = _deliver_run(run_dir)
    try:
        status, detail = inspect_store(store, "")
        if status == "new":
            raise ModelNotLogged(f"tracking.uri={store}: does not exist any more")
        # `open_store` waits for a lock; and a busy machine may be late to inspect a file.
        is_late = sqlite_path(store) is not None and status in ("locked", "unreachable")
        if status != "current" and not is_late:
            raise ModelNotLogged("; ".join(describe_problem(store, status, detail, is_written=False)))
        client = open_store(store)
        if not run_exists(client, run_id):
            raise ModelNotLogged(f"tracking.uri={store}: run {run_id} was deleted there")
        model_id = _find_model(client, run_id, model.sha256) or _create_model(client, run_id, model)
        version = None if name is None else _register(store, run_id, model_id, model, name)
    except ModelNotLogged:
        raise
    except Exception as error:  # MLflow does not wrap SQL, HTTP and file errors
        raise ModelNotLogged(f"tracking.uri={store}: {shorten(error)}") from error
    return ModelRef(store, run_id, model_id, name, version)


def _deliver_run(run_dir: Path) -> tuple[str, str]:
    """Deliver the rest of the run, and return its store and its ID there.

    Raises:
        ModelNotLogged: the run is not in MLflow.
    """
    info = RunInfo.load(run_dir)
    if info.mlflow is None:
        raise UntrackedRun("the run was made with tracking=none")
    ref = current_ref(info)
    if not _is_own(run_dir, ref.uri):
        raise ModelNotLogged(
            f"tracking.uri={ref.uri}: the run is not inside {root_dir()}, and may name the store of another "
            "user; set MLFLOW_TRACKING_URI to this one if you know it"
        )
    if not info.mlflow.closed and (owed := stale_in(run_dir)) is not None:
        try:
            (result,) = sync_owed([owed], timeout=LOCK_SECONDS)
        except UserError as error:
            raise ModelNotLogged(str(error)) from None
        if result.problem is not None:
            raise ModelNotLogged(f"tracking.uri={result.uri}: {result.problem}")
        ref = current_ref(RunInfo.load(run_dir))
    if ref.run_id is None:
        raise ModelNotLogged(
            f"tracking.uri={ref.uri}: the run is not there yet; captcha-exp sync delivers it"
        )
    return ref.uri, ref.run_id


def _is_own(run_dir: Path, store: str) -> bool:
    """Return whether a run or its store is the user's own: another one's may ask for credentials."""
    path = sqlite_path(store)
    is_own_store = source_of(store) in ("MLFLOW_TRACKING_URI", "tracking.uri=auto")
    return is_own_store or is_inside(run_dir if path is None else path, root_dir())


# -- the model of the run ------------------------------------------------------------------------------------


def _find_model(client: MlflowClient, run_id: str, sha256: str) -> str | None:
    """Return the ID of the complete model of a run that has this file, if there is one."""
    outputs = client.get_run(run_id).outputs
    for output in outputs.model_outputs if outputs else ():
        with contextlib.suppress(MlflowException):  # deleted
            found = client.get_logged_model(output.model_id)
            if str(found.status) == "READY" and found.tags.get(SHA256_TAG) == sha256:
                return str(found.model_id)
    return None


def _create_model(client: MlflowClient, run_id: str, model: OnnxModel) -> str:
    """Create the model, upload its files, and link it to the run last: a failure leaves no half of it."""
    run = client.get_run(run_id)
    created = client.create_logged_model(
        run.info.experiment_id,
        name=MODEL_NAME,
        source_run_id=run_id,
        tags={**model.tags, SHA256_TAG: model.sha256},
        params=dict(run.data.params),
    )
    try:
        with _model_dir(model, run_id, created) as directory:
            client.log_model_artifacts(created.model_id, str(directory))
        client.finalize_logged_model(created.model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(created.model_id, step=0)])
    except BaseException:
        with contextlib.suppress(Exception):  # the store is away
            client.delete_logged_model(created.model_id)
        raise
    return str(created.model_id)


@contextlib.contextmanager
def _model_dir(model: OnnxModel, run_id: str, created: Any) -> Iterator[Path]:
    """Write the directory of an MLflow model."""
    with tempfile.TemporaryDirectory() as parent:
        directory = Path(parent, "model")
        saved = Model(
            artifact_path=created.artifact_location,
            model_uuid=created.model_id,
            model_id=created.model_id,
            run_id=run_id,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MLflow's, about its own type hints
            mlflow.onnx.save_model(
                model.content,
                str(directory),
                mlflow_model=saved,
                signature=ModelSignature(_schema(model.inputs), _schema(model.outputs)),
                input_example=dict(model.example),
                pip_requirements=list(model.requirements),
                onnx_execution_providers=["CPUExecutionProvider"],  # where the file is proven
                save_as_external_data=False,
                metadata=dict(model.metadata),
            )
        (directory / FILE_NAME).write_bytes(model.content)  # to the byte, whatever onnx makes of it
        yield directory


def _schema(types: Sequence[TensorType]) -> Schema:
    return Schema([TensorSpec(np.dtype(each.dtype), each.shape, each.name) for each in types])


# -- the registry --------------------------------------------------------------------------------------------


def _register(store: str, run_id: str, model_id: str, model: OnnxModel, name: str) -> str:
    """Register a model as a version, unless it is one; let the alias name it; return the version."""
    client = MlflowClient(store, registry_uri=store)  # MLFLOW_REGISTRY_URI does not redirect it
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"models:/{model_id}"
    found = client.search_model_versions(f"run_id = '{run_id}'")
    version = next((each.version for each in found if (each.name, each.source) == (name, source)), None)
    if version is None:
        tags = {**model.tags, SHA256_TAG: model.sha256}
        with _global_tracking_uri(store):
            version = client.create_model_version(
                name, source, run_id=run_id, tags=tags, description=model.description, model_id=model_id
            ).version
    client.set_registered_model_alias(name, ALIAS, version)
    return str(version)


@contextlib.contextmanager
def _global_tracking_uri(store: str) -> Iterator[None]:
    """Set MLflow's global tracking URI for a while: its registry looks for the source of a version there."""
    variable = os.environ.get(URI_VARIABLE)
    is_set: bool = mlflow.is_tracking_uri_set()  # type: ignore[no-untyped-call]  # MLflow has no types for it
    before: Any = mlflow.get_tracking_uri() if is_set else None
    mlflow.set_tracking_uri(store)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)  # it also sets the variable
        if variable is None:
            os.environ.pop(URI_VARIABLE, None)
        else:
            os.environ[URI_VARIABLE] = variable
