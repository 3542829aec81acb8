"""Plants one bug at a time in a copy of the project and shows that some test turns red.

    python tests/plant.py            all of them; exit code 1 if a bug goes unseen
    python tests/plant.py NAME ...   some

A test is worth what it catches. Each entry replaces a piece of code that stands there exactly once;
`test_plants.py` checks that it still does, so that this list cannot rot unseen.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Plant:
    """A bug: in this file, this text becomes that one; these test files are asked."""

    name: str
    file: str
    healthy: str
    buggy: str
    tests: tuple[str, ...]


PLANTS = (
    Plant(
        "the last batch is dropped",
        "dataset.py",
        "range(0, len(self) if order is None else len(order), size)",
        "range(0, (len(self) if order is None else len(order)) - size + 1, size)",
        ("test_dataset.py",),
    ),
    Plant(
        "batches come in the same order in every epoch",
        "dataset.py",
        'chance.derive(seed, "order", epoch)',
        'chance.derive(seed, "order")',
        ("test_dataset.py",),
    ),
    Plant(
        "the split looks at the picture, not at its label",
        "dataset.py",
        'chance.fraction(data.split_seed, "split", label)',
        'chance.fraction(data.split_seed, "split", str(number))',
        ("test_dataset.py",),
    ),
    Plant(
        "a picture of another size comes from the cache",
        "dataset.py",
        '"captcha": to_dict(config.captcha), **source',
        '"captcha": config.captcha.alphabet, **source',
        ("test_dataset.py",),
    ),
    Plant(
        "a damaged cache is believed",
        "dataset.py",
        "if sha256_of(path) != expected:",
        "if not expected:",
        ("test_dataset.py",),
    ),
    Plant(
        "a drawing depends on the process that draws it",
        "sources/generators.py",
        'chance.stream(data.seed, "picture", index)',
        'chance.stream(data.seed + __import__("os").getpid(), "picture", index)',
        ("test_sources.py",),
    ),
    Plant(
        "a class id depends on the order of a sorted alphabet",
        "alphabet.py",
        "self.characters.find(character)",
        '"".join(sorted(self.characters, reverse=True)).find(character)',
        ("test_alphabet.py",),
    ),
    Plant(
        "the resize cuts off instead of rounding",
        "pixels.py",
        "wide + UNIT**2 / 2",
        "wide + 0",
        ("test_pixels.py",),
    ),
    Plant(
        "what is transparent becomes black",
        "pixels.py",
        "(255, 255, 255, 255)",
        "(0, 0, 0, 255)",
        ("test_pixels.py",),
    ),
    Plant(
        "a label of a table loses its zeros",
        "sources/labels.py",
        'return (value or "").strip()',
        'return (value or "").strip().lstrip("0")',
        ("test_folder.py",),
    ),
    Plant(
        "one picture with two labels is used with both",
        "sources/folder.py",
        "{used[n].label for n in numbers}) > 1",
        "{used[n].label for n in numbers}) > 2",
        ("test_folder.py",),
    ),
    Plant(
        "a link to a folder is lost in silence",
        "sources/folder.py",
        "if (here / name).is_symlink():",
        "if (here / name).is_mount():",
        ("test_folder.py",),
    ),
    Plant(
        "the cache of a folder does not know the labels",
        "sources/folder.py",
        "[c.name, c.label, c.sha256 or c.reason]",
        "[c.name, c.sha256 or c.reason]",
        ("test_folder.py",),
    ),
    Plant(
        "bad pictures of a folder are left out unasked",
        "dataset.py",
        'if data.on_bad == "refuse" or not good:',
        "if not good:",
        ("test_folder.py",),
    ),
    Plant(
        "the cache forgets which pictures were refused",
        "dataset.py",
        "json.dumps(asdict(outline.verdict))",
        'json.dumps({**asdict(outline.verdict), "refused": []})',
        ("test_folder.py",),
    ),
    Plant(
        "a picture of 16 bits becomes white",
        "pixels.py",
        "values >> 8",
        "np.minimum(values, 255)",
        ("test_pixels.py",),
    ),
    Plant(
        "room is made for a picture of any size",
        "pixels.py",
        "if file.width * file.height > LARGEST:",
        "if not file.width * file.height:",
        ("test_pixels.py",),
    ),
    Plant(
        "validation looks at the training split",
        "train.py",
        "evaluate(state.model, validation, config, leaving.look_for_signal)",
        "evaluate(state.model, training, config, leaving.look_for_signal)",
        ("test_train.py",),
    ),
    Plant(
        "the last weights are tested instead of the best",
        "train.py",
        "state.restore_best()",
        "state.best_weights",
        ("test_train.py",),
    ),
    Plant(
        "the checkpoint lacks the optimiser's state",
        "checkpoint.py",
        'found |= {f"optimizer/{names[parameter]}/{key}": value for key, value in values.items()}',
        "pass",
        ("test_checkpoint.py",),
    ),
    Plant(
        "a checkpoint's flipped bit is not seen",
        "checkpoint.py",
        "if _digest(tensors, json.dumps(counters)) != expected:",
        "if not expected:",
        ("test_checkpoint.py",),
    ),
    Plant(
        "generations are counted by the alphabet",
        "record/run.py",
        "key=lambda path: -int(steps[path])",
        "key=lambda path: path.name, reverse=True",
        ("test_checkpoint.py",),
    ),
    Plant(
        "the best weights are lost with the process",
        "checkpoint.py",
        "for name, key in best.items()} or None",
        "for name, key in ()} or None",
        ("test_checkpoint.py",),
    ),
    Plant(
        "a second Ctrl-C waits for the step, too",
        "leaving.py",
        "            signal.signal(signal.SIGINT, signal.SIG_DFL)\n            with contextlib",
        "            with contextlib",
        ("test_leaving.py",),
    ),
    Plant(
        "a process that ignores Ctrl-C begins to hear it",
        "leaving.py",
        "if handler not in (signal.SIG_IGN, None) and",
        "if handler is not None and",
        ("test_leaving.py",),
    ),
    Plant(
        "a store that was cut while it was made is opened",
        "tracking/store.py",
        "            if not path.exists():\n                _make(path)\n",
        "",
        ("test_tracking.py",),
    ),
    Plant(
        "pictures that a killed process was writing stay for ever",
        "dataset.py",
        'for part in path.parent.glob(f".{path.stem}.*.part"):',
        "for part in ():",
        ("test_dataset.py",),
    ),
    Plant(
        "a folder has its name before it says what it is",
        "record/beginning.py",
        "    if folder is not None:\n        folder.mkdir(exist_ok=True)\n",
        "    if folder is None:\n        folder = new_folder(config.name)\n    if folder is not None:\n"
        "        folder.mkdir(exist_ok=True)\n",
        ("test_interrupted.py",),
    ),
    Plant(
        "an epoch is done again from its first batch",
        "train.py",
        "[progress.batches * size :]",
        "[0:]",
        ("test_interrupted.py",),
    ),
    Plant(
        "a row that was logged before is logged again",
        "record/run.py",
        "            if not changed:\n                return False\n",
        "",
        ("test_interrupted.py",),
    ),
    Plant(
        "a clock that is set ends the runs at work",
        "record/process.py",
        'return int(after_name[_START - 3]) / os.sysconf("SC_CLK_TCK")',
        "return float(psutil.Process(pid).create_time())",
        ("test_record.py",),
    ),
    Plant(
        "a container's process is taken for the machine's",
        "record/process.py",
        ' and state.get("pid_namespace") != _pid_namespace()',
        " and False",
        ("test_record.py",),
    ),
    Plant(
        "the time limit is never looked at",
        "train.py",
        "            self.save(state)\n        self._leaving.look()",
        "            self.save(state)",
        ("test_interrupted.py",),
    ),
    Plant(
        "the best weights go on changing",
        "checkpoint.py",
        'value.detach().to("cpu", copy=True)',
        'value.detach().to("cpu")',
        ("test_train.py", "test_checkpoint.py"),
    ),
    Plant(
        "patience ends one epoch early",
        "checkpoint.py",
        "self.epochs_without_gain() > train.patience",
        "self.epochs_without_gain() >= train.patience",
        ("test_train.py",),
    ),
    Plant(
        "a step that is not finite changes the weights",
        "optim.py",
        "(~finite).float()",
        "torch.zeros_like(finite, dtype=torch.float32)",
        ("test_step.py",),
    ),
    Plant(
        "a step that is not finite changes the batch norms",
        "step.py",
        "optim.undo_unless(finite, buffers, before)",
        "optim.undo_unless(finite, buffers, buffers)",
        ("test_step.py",),
    ),
    Plant(
        "the step waits for the device",
        "step.py",
        "return Step(loss, right, finite, broken)",
        "return Step(loss + 0 * loss.item(), right, finite, broken)",
        ("test_step.py",),
    ),
    Plant(
        "evaluation normalises with the batch's own statistics",
        "evaluate.py",
        "    model.eval()\n",
        "    model.train()\n",
        ("test_evaluate.py", "test_train.py"),
    ),
    Plant(
        "one right character is as good as a label",
        "evaluate.py",
        "(self.predicted == self.targets).all(axis=1).sum()",
        "(self.predicted == self.targets).any(axis=1).sum()",
        ("test_evaluate.py",),
    ),
    Plant(
        "the confusion matrix lies on its side",
        "evaluate.py",
        "(self.targets.ravel(), self.predicted.ravel())",
        "(self.predicted.ravel(), self.targets.ravel())",
        ("test_evaluate.py",),
    ),
    Plant(
        "the interval is one of 90 %",
        "evaluate.py",
        "1.959963984540054",
        "1.6448536269514722",
        ("test_evaluate.py",),
    ),
    Plant(
        "the residual forgets what it adds to",
        "models.py",
        "F.relu(self.second(F.relu(self.first(x))) + self.short_cut(x))",
        "F.relu(self.second(F.relu(self.first(x))))",
        ("test_models.py",),
    ),
    Plant(
        "the article's network has a stride too many",
        "models.py",
        "((64, 1), (128, 2), (256, 2), (512, 2))",
        "((64, 2), (128, 2), (256, 2), (512, 2))",
        ("test_models.py",),
    ),
    Plant(
        "batch norms decay",
        "optim.py",
        '"weight_decay": 0.0',
        '"weight_decay": train.weight_decay',
        ("test_optim.py",),
    ),
    Plant(
        "the environment decides the number of threads",
        "device.py",
        "torch.set_num_threads(int(config.device.threads))",
        "int(config.device.threads)",
        ("test_train.py", "test_device.py"),
    ),
    Plant(
        "an overflow leaves the loss scale as it is",
        "optim.py",
        "torch.where(finite, grown, shrunk)",
        "torch.where(finite, grown, self.factor)",
        ("test_step.py",),
    ),
    Plant(
        "the loss scale is not divided out of the gradients",
        "step.py",
        "None if scale is None else scale.factor)",
        "None)",
        ("test_step.py",),
    ),
    Plant(
        "a precision is taken though its gradient points elsewhere",
        "probe.py",
        "if t.finite and t.is_close and t.step",
        "if t.finite and t.step",
        ("test_probe.py",),
    ),
    Plant(
        "a picture changes by its place in the batch",
        "augment.py",
        "self._draws[batch.rows]",
        "self._draws[: len(batch.rows)]",
        ("test_augment.py",),
    ),
    Plant(
        "evaluation looks at changed pictures",
        "train.py",
        "                result = evaluate(state.model, validation, config, leaving.look_for_signal)\n",
        "                changed = change(next(validation.batches(len(validation))))\n"
        "                result = evaluate(state.model, Split(*changed, validation.device), config)\n",
        ("test_augment.py",),
    ),
    Plant(
        "pictures change in full from the first epoch on",
        "augment.py",
        "share = min(1.0, (epoch - 1) / (how.ramp * epochs))",
        "share = 1.0",
        ("test_augment.py",),
    ),
    Plant(
        "the numbers of the pictures stay off the device",
        "dataset.py",
        "yield Batch(*map(self._on_device, (images, targets, rows)))",
        "yield Batch(self._on_device(images), self._on_device(targets), rows)",
        ("test_dataset.py",),
    ),
    Plant(
        "predict brings a picture to its size by another filter",
        "predict.py",
        "arrays.append(picture(content(path), self.config.captcha)[1])",
        "size = self.config.captcha.width, self.config.captcha.height\n"
        "                image = picture(content(path), self.config.captcha)[0].image\n"
        '                arrays.append(np.asarray(image.convert("RGB").resize(size, 0)))',
        ("test_predict.py",),
    ),
    Plant(
        "readings stand in another order than the pictures",
        "predict.py",
        "return [readings[path] for path in pictures]",
        "return [readings[path] for path in sorted(pictures)]",
        ("test_predict.py",),
    ),
    Plant(
        "a reading has the confidence of another picture",
        "predict.py",
        "zip(usable, ids, confidences, strict=True)",
        "zip(usable, ids, confidences[::-1], strict=True)",
        ("test_predict.py",),
    ),
    Plant(
        "the errors that it was least sure of come first",
        "evaluate.py",
        "np.argsort(-sure[wrong]",
        "np.argsort(sure[wrong]",
        ("test_report.py", "test_evaluate.py"),
    ),
    Plant(
        "the sheet of errors shows other pictures",
        "report.py",
        "data.images[[error.row for error in shown]]",
        "data.images[: len(shown)]",
        ("test_report.py",),
    ),
    Plant(
        "the article's labels have too many digits",
        "sources/article.py",
        "DIGIT_SHARE = 0.5",
        "DIGIT_SHARE = 0.6",
        ("test_sources.py",),
    ),
    Plant(
        "the loop ends at a picture that cannot be read",
        "cli/asking.py",
        'print(f"{path}: {reading.error}", file=sys.stderr)',
        'sys.exit(f"{path}: {reading.error}")',
        ("test_predict.py",),
    ),
    Plant(
        "a label in brackets is taken for a colour",
        "cli/summary.py",
        "Text(text) for text in (shown(error.picture)",
        "text for text in (shown(error.picture)",
        ("test_evaluate.py",),
    ),
    Plant(
        "a run is judged by its last epoch, not by its best",
        "record/facts.py",
        "return by_step.get(best)",
        "return by_step[max(by_step)]",
        ("test_looking.py",),
    ),
    Plant(
        "a damaged line of metrics is left out in silence",
        "record/facts.py",
        'tell(f"{path}, line {number}: is left out: {_one_line(error)}")',
        "del error",
        ("test_looking.py",),
    ),
    Plant(
        "an alias makes a small config endless",
        "record/facts.py",
        'raise ValueError("it holds an alias")',
        "return",
        ("test_looking.py",),
    ),
    Plant(
        "one condition of several is enough",
        "cli/looking.py",
        "if all(c.key in run and c.holds(run[c.key]) for c in conditions)",
        "if not conditions or any(c.key in run and c.holds(run[c.key]) for c in conditions)",
        ("test_looking.py",),
    ),
    Plant(
        "98% is 98",
        "cli/looking.py",
        '(100 if text.endswith("%") else 1)',
        "1",
        ("test_looking.py",),
    ),
    Plant(
        "runs without a value come first when the order is turned",
        "cli/looking.py",
        "return sorted(ordered, key=lambda run: _place(run, sort)[0] == LAST)",
        "return ordered",
        ("test_looking.py",),
    ),
    Plant(
        "true is the same as 1",
        "cli/comparing.py",
        "return json.dumps(first) == json.dumps(second)",
        "return bool(first == second)",
        ("test_looking.py",),
    ),
    Plant(
        "unknown keys are ignored",
        "config/card.py",
        'extra="forbid"',
        'extra="ignore"',
        ("test_config.py",),
    ),
    Plant(
        "YAML's numbers become text",
        "config/card.py",
        "strict=True",
        "strict=False, coerce_numbers_to_str=True",
        ("test_config.py",),
    ),
    Plant(
        "an alphabet may repeat itself",
        "alphabet.py",
        "if characters.count(c) > 1",
        "if characters.count(c) > 2",
        ("test_alphabet.py", "test_config.py"),
    ),
    Plant(
        "only the first mistake is reported",
        "cli/composing.py",
        "mistakes += error.lines",
        "mistakes += error.lines[:1]",
        ("test_cli.py", "test_config.py"),
    ),
    Plant(
        "a cut line of metrics is believed",
        "record/run.py",
        "if row.to_line() != line:",
        "if not row.metrics:",
        ("test_record.py",),
    ),
    Plant(
        "a file is written in place",
        "record/files.py",
        'path.with_name(f".{path.name}.{os.getpid()}.part")',
        "path",
        ("test_record.py",),
    ),
    Plant(
        "weights that have changed since are believed",
        "record/run.py",
        "sha256_of(path) != expected",
        "not expected",
        ("test_record.py",),
    ),
    Plant(
        "a run that cannot be read is passed over in silence",
        "record/run.py",
        "tell(str(error))",
        "pass",
        ("test_record.py",),
    ),
    Plant(
        "a first bad step leaves the momentum unwritten",
        "optim.py",
        '"momentum_buffer": torch.zeros_like(parameter)',
        "\"momentum_buffer\": torch.full_like(parameter, float('nan'))",
        ("test_step.py", "test_optim.py"),
    ),
    Plant(
        "a batch norm counts a batch again when it is recomputed",
        "models.py",
        "norm.again = True",
        "norm.again = False",
        ("test_step.py",),
    ),
    Plant(
        "a micro-batch has the weight of a whole batch",
        "step.py",
        "part.rows.shape[0] / whole, config",
        "1.0, config",
        ("test_step.py",),
    ),
    Plant(
        "a bad step of another kernel counts",
        "optim.py",
        "undo_unless(finite, kept, before)",
        "undo_unless(finite, kept, kept)",
        ("test_step.py",),
    ),
    Plant(
        "a failed run is called finished",
        "tracking/tracker.py",
        'client.set_terminated(run_id, state["status"],',
        'client.set_terminated(run_id, "FINISHED",',
        ("test_tracking.py",),
    ),
    Plant(
        "a run that ends just now is called killed",
        "record/closing.py",
        "now = read_left(self.path)",
        "now = self",
        ("test_closing.py",),
    ),
    Plant(
        "every process closes at once what others left",
        "record/closing.py",
        "        lock.acquire()\n",
        "        pass\n",
        ("test_closing.py",),
    ),
    Plant(
        "a killed run ends when somebody looks",
        "record/closing.py",
        "datetime.fromtimestamp(_newest(self.folder)).astimezone()",
        "datetime.now().astimezone()",
        ("test_closing.py",),
    ),
    Plant(
        "a part that a living process writes is removed",
        "record/closing.py",
        "return int(writer) == pid or not psutil.pid_exists(int(writer))",
        "return True",
        ("test_closing.py",),
    ),
    Plant(
        "a torn line of metrics hides the rows before it",
        "record/run.py",
        "                broken.append(number)",
        "                return [], [number]",
        ("test_closing.py",),
    ),
    Plant(
        "a store that is away is asked for each run",
        "tracking/closing.py",
        'if look_at_store(uri, "")[0] != "current":',
        'if look_at_store(uri, "")[0] == "new":',
        ("test_closing.py",),
    ),
    Plant(
        "a run that MLflow has in part counts as closed",
        "tracking/tracker.py",
        "if files and end and not self._unsent:",
        "if end:",
        ("test_closing.py",),
    ),
    Plant(
        "a deleted run is asked for at each start",
        "tracking/store.py",
        'if error.error_code == "RESOURCE_DOES_NOT_EXIST":',
        'if error.error_code == "DELETED":',
        ("test_closing.py",),
    ),
    Plant(
        "a store that goes away ends the training",
        "tracking/tracker.py",
        'self._display.warn(f"MLflow did not take {what}',
        'raise RuntimeError(f"MLflow did not take {what}',
        ("test_tracking.py",),
    ),
    Plant(
        "MLflow hides the points of a sweep below their parent",
        "tracking/views.py",
        '"orderByKey": "tags.`mlflow.source.name`"',
        '"orderByKey": "attributes.start_time"',
        ("test_views.py",),
    ),
    Plant(
        "the oldest sweep is taken for the newest",
        "tracking/views.py",
        'order_by=["start_time DESC"], max_results=1',
        'order_by=["start_time ASC"], max_results=1',
        ("test_views.py",),
    ),
    Plant(
        "every param counts as swept",
        "tracking/views.py",
        "for one in params}) > 1]",
        "for one in params}) > 0]",
        ("test_views.py",),
    ),
    Plant(
        "a page of the UI names a view that is not kept",
        "tracking/views.py",
        'f"mlflow.sharedViewState.{_key(name)}"',
        'f"mlflow.sharedViewState.{name}"',
        ("test_views.py",),
    ),
    Plant(
        "a store that takes no view ends the UI",
        "tracking/server.py",
        'display.warn(f"MLflow did not take the views',
        'raise RuntimeError(f"MLflow did not take the views',
        ("test_views.py",),
    ),
    Plant(
        "MLflow gets the config as asked, not as resolved",
        "train.py",
        "with recorded(recording, job.config):",
        "with recorded(recording, requested):",
        ("test_tracking.py",),
    ),
    Plant(
        "doctor asks for a newer driver within one CUDA",
        "doctor/judging_cards.py",
        "newest[0] < _numbers(torch.cuda)[0]",
        "newest < _numbers(torch.cuda)",
        ("test_doctor.py",),
    ),
    Plant(
        "doctor takes machine code for an earlier card as good",
        "doctor/judging_cards.py",
        'made_for == here if only == "a" else made_for <= here',
        'made_for == here if only == "a" else made_for[0] == here[0]',
        ("test_doctor.py",),
    ),
    Plant(
        "doctor counts itself among those that hold a card",
        "doctor/cards.py",
        "process.pid != os.getpid()",
        "process.pid != 0",
        ("test_doctor.py",),
    ),
    Plant(
        "doctor makes the store that it looks at",
        "tracking/store.py",
        "    if standing != path:\n",
        '    open_store(f"sqlite:///{path}")\n    if standing != path:\n',
        ("test_doctor.py",),
    ),
    Plant(
        "one thing that fails ends the doctor",
        "doctor/looking.py",
        "except Exception as error:  # a thing",
        "except ValueError as error:  # a thing",
        ("test_doctor.py",),
    ),
    Plant(
        "sizes are not rounded to 512 bytes",
        "memory/allocator.py",
        "size = -(-requested_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES",
        "size = max(requested_bytes, MIN_BLOCK_BYTES)",
        ("test_allocator.py",),
    ),
    Plant(
        "10 MiB are cut from a shared segment",
        "memory/allocator.py",
        "if size < MIN_LARGE_BYTES:",
        "if size <= MIN_LARGE_BYTES:",
        ("test_allocator.py",),
    ),
    Plant(
        "a rest of 1 MiB is cut off a large block",
        "memory/allocator.py",
        "else SMALL_BYTES + 1",
        "else SMALL_BYTES",
        ("test_allocator.py",),
    ),
    Plant(
        "memory ends while the cache is full",
        "memory/allocator.py",
        "            self.empty_cache()\n",
        "",
        ("test_allocator.py",),
    ),
    Plant(
        "the end of an expandable range is used up first",
        "memory/allocator.py",
        "place = pool.best_fit(place)",
        "pass",
        ("test_allocator.py",),
    ),
    Plant(
        "a freed block does not join the one below it",
        "memory/blocks.py",
        "if before is not None and before.mapped and not before.live:",
        "if before is not None and before.mapped and before is block:",
        ("test_allocator.py",),
    ),
    Plant(
        "the trace takes what stays on the host for the device's",
        "memory/trace.py",
        "torch.device(HOST), _steps_counted_on_device(), recorder",
        "torch.device(DEVICE), _steps_counted_on_device(), recorder",
        ("test_trace.py",),
    ),
    Plant(
        "the trace forgets what an evaluation is sent and keeps",
        "memory/trace.py",
        "else 8 * length + 8)",
        "else 0)",
        ("test_trace.py",),
    ),
    Plant(
        "the traced evaluation builds graphs, unlike the real one",
        "evaluate.py",
        "@torch.inference_mode()\ndef read(",
        "def read(",
        ("test_trace.py",),
    ),
    Plant(
        "the trace gives a view memory of its own",
        "memory/recorder.py",
        "return Answer(number, _form(result), 0)",
        "break",
        ("test_recorder.py",),
    ),
    Plant(
        "the trace takes 1 for True",
        "memory/recorder.py",
        "into += (kind, value)",
        "into.append(value)",
        ("test_recorder.py",),
    ),
    Plant(
        "the traced convolution answers with its colours first",
        "memory/recorder.py",
        "result = _colours_last(result)",
        "pass",
        ("test_trace.py",),
    ),
    Plant(
        "a budget forgets that the context takes its part",
        "device.py",
        "((budget - context) * MIB + 0.5) / total",
        "(budget * MIB + 0.5) / total",
        ("test_device.py",),
    ),
    Plant(
        "a budget is cut down by a byte, and what just fits does not run",
        "device.py",
        "* MIB + 0.5) / total",
        "* MIB) / total",
        ("test_device.py",),
    ),
    Plant(
        "the context of a measured card has what torch's allocator holds in it",
        "memory/judging.py",
        "stage.process_mib - stage.reserved_mib",
        "stage.process_mib",
        ("test_calibrate.py",),
    ),
    Plant(
        "a convolution's room hides in the gradient of its pictures",
        "memory/measuring.py",
        "for wanted in [*layer.parameters(), *([seen] if conv.inner else [])]:",
        "for wanted in [[*layer.parameters(), seen]]:",
        ("test_calibrate.py",),
    ),
    Plant(
        "calibrate writes over somebody's card file",
        "memory/calibrate.py",
        "if path.exists() and not force:",
        "if path.exists() and force is None:",
        ("test_calibrate.py",),
    ),
    Plant(
        "the largest batch may be one that is unsure",
        "memory/plan.py",
        'self.at(batch).fits == "fits"',
        'self.at(batch).fits != "does not fit"',
        ("test_plan.py",),
    ),
    Plant(
        "a small convolution takes all of cuDNN's workspace",
        "memory/plan.py",
        "min(self.cudnn_bytes, WORKSPACE_TIMES * convolution.fp32_bytes)",
        "self.cudnn_bytes",
        ("test_plan.py",),
    ),
    Plant(
        "a convolution at the end of a phase counts in the next one, too",
        "memory/plan.py",
        "phase.begin, key=lambda each: each.place)",
        "phase.begin - 1, key=lambda each: each.place)",
        ("test_plan.py",),
    ),
    Plant(
        "advice has a part of the batch more than is needed",
        "memory/advice.py",
        "chosen, plan = planned(fewest)",
        "chosen, plan = planned(min(fewest + 1, len(sizes) - 1))",
        ("test_advice.py",),
    ),
    Plant(
        "advice leaves an evaluation large where the test's split comes on top",
        "memory/advice.py",
        'while plan.fits != "fits" and plan.evaluation_is_the_peak:',
        'while plan.fits != "fits" and plan.evaluation.reserved_mib.most >= plan.reserved_mib.most:',
        ("test_advice.py",),
    ),
    Plant(
        "the probe ends at the first batch size that brings nothing",
        "probe.py",
        "max(speeds[-2:]) < STALLED * max(speeds[:-2])",
        "speeds[-1] < STALLED * max(speeds[:-1])",
        ("test_probe.py",),
    ),
    Plant(
        "the probe takes the largest batch near the best",
        "probe.py",
        "chosen = min(size for size, speed in speeds.items()",
        "chosen = max(size for size, speed in speeds.items()",
        ("test_probe.py",),
    ),
    Plant(
        "seeds that are swept make groups of their own",
        "sweep/groups.py",
        "for key, value in row.swept.items() if key not in SEEDS)",
        "for key, value in row.swept.items() if key != 'seed')",
        ("test_verdict.py",),
    ),
    Plant(
        "the interval of a mean is that of a normal distribution",
        "sweep/groups.py",
        "stdtrit(count - 1, 0.975)",
        "stdtrit(1e6, 0.975)",
        ("test_verdict.py",),
    ),
    Plant(
        "a batch that may not fit is recommended",
        "sweep/groups.py",
        'fits_of(row) == "fits" or (',
        'fits_of(row) != "does not fit" or (',
        ("test_verdict.py",),
    ),
    Plant(
        "the largest of the fast batches is recommended",
        "sweep/sentences.py",
        "for group, speed in zip(timed, speeds, strict=True)",
        "for group, speed in reversed(list(zip(timed, speeds, strict=True)))",
        ("test_verdict.py",),
    ),
    Plant(
        "too little memory makes a sweep fail",
        "sweep/verdict.py",
        'row.became in ("failed", "killed", "not run")',
        'row.became in ("failed", "killed", "not run", "oom")',
        ("test_verdict.py",),
    ),
    Plant(
        "a machine's memory is drawn beside a card's",
        "sweep/picture.py",
        'found.get("measured_mib") if group.on_card else None',
        'found.get("measured_mib")',
        ("test_verdict.py",),
    ),
    Plant(
        "a value that stands in a grid twice runs twice",
        "cli/grid.py",
        "if values.count(value) > 1",
        "if values.count(value) > 2",
        ("test_grid.py",),
    ),
    Plant(
        "a sweep in a file has the last word",
        "cli/grid.py",
        "if key not in axes.values:",
        "if key:",
        ("test_grid.py",),
    ),
    Plant(
        "too little memory in the evaluation is taken for the training's",
        "oom.py",
        "state is not None and not state.model.training",
        "state is not None and state.model.training",
        ("test_oom.py",),
    ),
    Plant(
        "a remedy may need as much as what failed",
        "oom.py",
        "CLEARLY_LESS = 0.9",
        "CLEARLY_LESS = 1.1",
        ("test_oom.py",),
    ),
    Plant(
        "too little memory is a failure though it is to be a result",
        "recording.py",
        '("FINISHED" if short.is_result else "FAILED")',
        '"FAILED"',
        ("test_oom.py",),
    ),
    Plant(
        "every error of CUDA is taken for too little memory",
        "device.py",
        "== _CUDA_ERROR_MEMORY_ALLOCATION",
        "is not None",
        ("test_oom.py",),
    ),
    Plant(
        "a micro-batch is halved downwards",
        "sweep/supervise.py",
        "micro_batch_size=-(-size // 2)",
        "micro_batch_size=size // 2",
        ("test_oom.py",),
    ),
    Plant(
        "two keys with the same last word have one name",
        "sweep/points.py",
        "if last.count(word) == 1",
        "if last.count(word) >= 1",
        ("test_points.py",),
    ),
    Plant(
        "what is foretold to be unsure is trained",
        "sweep/foretelling.py",
        'in ("fits", None)',
        'in ("fits", "unsure", None)',
        ("test_points.py",),
    ),
    Plant(
        "the first epoch counts for the speed",
        "sweep/rows.py",
        "speeds[1:] or speeds",
        "speeds",
        ("test_points.py",),
    ),
    Plant(
        "a sweep that is gone on with stays that of the process before",
        "sweep/running.py",
        "        sweep.reopen()\n",
        "",
        ("test_sweeping.py",),
    ),
    Plant(
        "a failed point is not run again",
        "sweep/points.py",
        'SETTLED = ("finished", "oom", "unfit")',
        'SETTLED = ("finished", "oom", "unfit", "failed")',
        ("test_sweeping.py",),
    ),
    Plant(
        "a point waits for a reader that is gone",
        "sweep/supervise.py",
        "except (OSError, SystemExit):  # rich",
        "except ValueError:  # rich",
        ("test_sweeping.py",),
    ),
    Plant(
        "a second Ctrl-C is forgotten",
        "leaving.py",
        "    if heard:\n        signal.raise_signal(heard[0])\n",
        "",
        ("test_sweeping.py",),
    ),
    Plant(
        "a point that waits does not hear that it is to stop",
        "sweep/work.py",
        'if hasattr(signal, "pthread_kill"):',
        'if hasattr(signal, "no_such_thing"):',
        ("test_sweeping.py",),
    ),
    Plant(
        "only the first point's missing pictures are told",
        "sweep/foretelling.py",
        "                mistakes |= dict.fromkeys(error.lines)\n                continue\n",
        "                raise ConfigError(*error.lines) from None\n",
        ("test_sweeping.py",),
    ),
    Plant(
        "a run of other code is gone on with",
        "record/unfinished.py",
        'return "free" if known == code or',
        'return "free" if known or',
        ("test_unfinished.py",),
    ),
    Plant(
        "two processes go on with the same run",
        "record/unfinished.py",
        "if now is None or _owner(now) != _owner(seen) or",
        "if now is None or",
        ("test_unfinished.py",),
    ),
    Plant(
        "a failed run without a checkpoint is gone on with",
        "record/unfinished.py",
        'if state["status"] == "FAILED" and not has_checkpoint:',
        "if False:",
        ("test_unfinished.py",),
    ),
    Plant(
        "an evaluation is cut by a limit of time",
        "train.py",
        "validation, config, leaving.look_for_signal)\n",
        "validation, config, leaving.look)\n",
        ("test_train.py",),
    ),
    Plant(
        "what changed while a run was interrupted is told and not recorded",
        "recording.py",
        '{**this_time, "changed": changed}',
        "this_time",
        ("test_train.py",),
    ),
    Plant(
        "a limit of time is reproduced",
        "reproduce/original.py",
        "replace(config.train, stop_after_minutes=None)",
        "replace(config.train)",
        ("test_reproduce.py",),
    ),
    Plant(
        "a run that began from another's state is reproduced from nothing later on",
        "reproduce/running.py",
        '        links["continues"] = dict(original.continues)\n',
        "        pass\n",
        ("test_reproduce.py",),
    ),
    Plant(
        "each point of a sweep has the whole time",
        "sweep/supervise.py",
        "if sweep.until is not None and record.is_elsewhere(sweep.state):",
        "if sweep.until is not None:",
        ("test_sweeping.py",),
    ),
    Plant(
        "a sweep that is out of time counts as failed",
        "sweep/running.py",
        "if sweep.until is not None and _wants_time(",
        "if not sweep.points and _wants_time(",
        ("test_sweeping.py",),
    ),
    Plant(
        "another limit of time makes another sweep",
        "cli/sweeping.py",
        "if grid.asked - {LIMIT} and not",
        "if grid.asked and not",
        ("test_sweeping.py",),
    ),
    Plant(
        "a run that has finished just now is gone on with",
        "cli/resuming.py",
        '        if left.state["status"] == "FINISHED":\n            raise',
        "        if left is None:\n            raise",
        ("test_resuming.py",),
    ),
    Plant(
        "a run whose start failed is left RUNNING",
        "record/unfinished.py",
        "            _release(mine)\n",
        "            pass\n",
        ("test_unfinished.py", "test_resuming.py"),
    ),
    Plant(
        "an unfinished run takes other values",
        "cli/resuming.py",
        "if key != LIMIT}:\n",
        "if key not in other}:\n",
        ("test_resuming.py",),
    ),
    Plant(
        "more epochs that were killed at once start from nothing",
        "train.py",
        "if saved is None and start_from is not None:",
        "if saved is None and start_from is None and folder is None:",
        ("test_resuming.py",),
    ),
    Plant(
        "a value that was rounded otherwise is the same",
        "reproduce/results.py",
        "repr(pair[0]) != repr(pair[1])",
        'f"{pair[0]:.6}" != f"{pair[1]:.6}"',
        ("test_reproduce.py",),
    ),
    Plant(
        "an edited config.yaml is believed",
        "reproduce/original.py",
        "if json.dumps(pair[0]) != json.dumps(pair[1]):",
        "if pair[0] is ABSENT:",
        ("test_reproduce.py",),
    ),
    Plant(
        "every suspect is the cause",
        "reproduce/judging.py",
        "sole = certain and not ran and len(sources) == 1",
        "sole = certain and not ran",
        ("test_reproduce.py",),
    ),
    Plant(
        "a version is the cause though the pictures are the same",
        "reproduce/judging.py",
        '(drift.touches == "pictures" and not same_pictures)',
        'drift.touches == "pictures"',
        ("test_reproduce.py",),
    ),
    Plant(
        "a picture with another content is not seen",
        "reproduce/pictures.py",
        'now[n].sha256 != then[n]["sha256"]',
        "now[n].sha256 is None",
        ("test_reproduce.py",),
    ),
    Plant(
        "a commit is put into a command as it stands",
        "reproduce/running.py",
        're.fullmatch(r"[0-9a-f]{7,64}", commit)',
        "commit",
        ("test_reproduce.py",),
    ),
    Plant(
        "new files are not in the changes since the commit",
        "record/code.py",
        'filter(None, new.decode(errors="surrogateescape").split("\\0"))',
        "()",
        ("test_code.py",),
    ),
    Plant(
        "a secret stands in the record",
        "record/environment.py",
        "and not _SECRET.search(name) ",
        "",
        ("test_code.py",),
    ),
    Plant(
        "a session takes predictions of other code",
        "../benchmarks/gpu_files.py",
        "    if found != code_sha256:",
        "    if False:",
        ("test_gpu_session.py",),
    ),
    Plant(
        "children of a part that hangs keep running",
        "../benchmarks/gpu_processes.py",
        "            os.killpg(pid, signal.SIGKILL)",
        "            pass",
        ("test_gpu_session.py",),
    ),
    Plant(
        "an H100 is judged by the figures of the H200",
        "../benchmarks/gpu_judging.py",
        "if card in words)",
        "if True)",
        ("test_gpu_session.py",),
    ),
)


GIT = (
    "git",
    "-c",
    "user.name=nobody",
    "-c",
    "user.email=nobody@example.invalid",
    "-c",
    "commit.gpgsign=false",
)


def passes(tests: Iterable[str], plant: Plant) -> bool:
    """Whether these test files are green where the bug is planted.

    Raises:
        RuntimeError: they cannot be run at all, which is a mistake in this program.
    """
    done = asked(tests, plant)
    if done.returncode not in (0, 1) or "ERROR collecting" in done.stdout:
        raise RuntimeError(
            f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return done.returncode == 0


def asked(tests: Iterable[str], plant: Plant | None) -> "subprocess.CompletedProcess[str]":
    """What pytest says of them in a copy of the project, with the bug planted if there is one."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("benchmarks", "captcha_exp", "conf", "tests"):
            shutil.copytree(PROJECT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(PROJECT / "pyproject.toml", copy)
        if plant is not None:
            file = copy / "captcha_exp" / plant.file
            file.write_text(file.read_text().replace(plant.healthy, plant.buggy))
        for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "copy"]):
            subprocess.run([*GIT, *command], cwd=copy, check=True)  # runs note the commit that they come from
        files = [f"tests/{test}" for test in tests]
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *files],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
        )


def main(names: Sequence[str]) -> int:
    chosen = [plant for plant in PLANTS if not names or plant.name in names]
    healthy = asked(sorted({test for plant in chosen for test in plant.tests}), None)
    if healthy.returncode:
        print(f"{healthy.stdout[-2000:]}\nthe healthy copy is not green: mend that first")
        return 1
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        results = list(threads.map(lambda plant: not passes(plant.tests, plant), chosen))
    for plant, seen in zip(chosen, results, strict=True):
        print(f"{'caught' if seen else 'NOT SEEN':9} {plant.name}")
    print(f"{sum(results)} of {len(chosen)} planted bugs are caught")
    return 0 if all(results) and chosen else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
