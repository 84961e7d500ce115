"""Executes the runs of the matrix one after the other; students, datasets and compiled code are reused between them."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqa_jax.adapters import soft_prompt_tokens
from sqa_jax.batches.config_data import config_images, config_records, training_problems
from sqa_jax.batches.dataset import DistillationDataset, build_or_reuse
from sqa_jax.batches.images import ImageBatcher
from sqa_jax.batches.loader import pack_dataset, training_steps
from sqa_jax.checkpoints.load import Student
from sqa_jax.config_aliases import current_key, current_value
from sqa_jax.data.images import ImageStore
from sqa_jax.data.sources import ProblemSet
from sqa_jax.data.teacher_records import records_by_pid
from sqa_jax.errors import UserError
from sqa_jax.evaluation import evaluate as evaluation
from sqa_jax.files import read_json, sha256_file, sha256_json, write_json
from sqa_jax.metrics.costs import TeacherCost, inference_cost, teacher_cost, training_cost
from sqa_jax.prompts.recipes import Example, Records, arm_format, arm_of, examples
from sqa_jax.runtime import Runtime, build_runtime
from sqa_jax.study.matrix import StudyRun, config_of_run
from sqa_jax.teach.prompts import prompt_of_record
from sqa_jax.training import loop
from sqa_jax.training.workdir import described, flatten

EXPLANATIONS = "explanations"  # folder of the generated explanations, in a run's eval/
# Settings that change where files are or how work is divided, never the result of a run.
_IRRELEVANT = (
    "mesh.", "study.", "teach.", "data.cache", "data.path", "data.teacher", "train.save_every", "train.log_every", "train.stop_after", "train.profile_steps",
)  # fmt: skip


class Interrupted(Exception):
    """SIGTERM came: the run in progress is saved, and the same command resumes the study."""


class Executor:
    """Executes runs in a directory; `run.json` in a run's folder records its results, or why it failed.

    Args:
      config: the study's.
      root: its workdir.
    """

    def __init__(self, config, root: Path, problems: ProblemSet):
        self.config, self.root, self.problems = config, root, problems
        self._runtime: tuple[str, Runtime] | None = None  # (fingerprint of what it was built from, runtime)
        self._tokens: dict[StudyRun, float] = {}  # training tokens of the reference arm's runs
        self._replies: dict[tuple[str, ...], Mapping[str, Records]] = {}  # by files, then by pid

    def settings(self, run: StudyRun) -> dict[str, Any]:
        """By name, everything that determines a run's results and is known before the student is loaded."""
        config = config_of_run(self.config, run)
        settings = {
            name: value for name, value in flatten(config.to_dict()).items() if not name.startswith(_IRRELEVANT)
        }
        settings["questions"] = self.problems.fingerprint
        if run.trained:
            study = self.config.study
            settings |= {f"study.{name}": study[name] for name in ("equal", "explanations")}
            if arm_of(config.recipe).kinds or config.recipe.require:
                settings["replies"] = [path if path == "sample" else sha256_file(path) for path in config.data.teacher]
            if study.equal == "tokens" and run.arm != study.reference:
                # This run trains for as many tokens as the reference arm.
                reference = flatten(config_of_run(self.config, run._replace(arm=study.reference)).to_dict())
                of_length = ("train.epochs", "train.steps", "train.batch_rows", "train.accumulate", "train.row_length")
                settings |= {f"{study.reference}'s {name}": reference[name] for name in of_length}
        return json.loads(json.dumps(settings))  # as read from a file

    def finished_record(self, run: StudyRun) -> dict[str, Any] | None:
        """The record of a finished run; None where there is none or the run failed.

        Raises:
          UserError: it was executed, or started, with other settings.
        """
        file = run.folder(self.root) / "run.json"
        if not file.exists():
            return None
        record = read_json(file, "what came of a run of the study")
        now = self.settings(run)
        before = {(key := current_key(name)): current_value(key, value) for name, value in record["settings"].items()}
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if differing := [(name, before.get(name), now.get(name)) for name in names]:
            raise UserError(
                f"{file.parent}: was made with other settings ({described(differing)}); choose another --workdir, or remove this folder to "
                "make the run again"
            )
        return record if record["status"] == "finished" else None

    def __call__(self, run: StudyRun) -> dict[str, Any]:
        """Trains and evaluates unless the run is finished; a failure is recorded, and retried by the next start.

        Raises:
          Interrupted: SIGTERM came.
        """
        if (finished := self.finished_record(run)) is not None:
            return finished
        folder = run.folder(self.root)
        started = time.time()
        record = {**run._asdict(), "settings": self.settings(run), "started": started}
        write_json(folder / "run.json", {**record, "status": "started"})
        try:
            record |= {"status": "finished", **self._train_and_evaluate(run, folder)}
            (folder / "error.txt").unlink(missing_ok=True)
        except Interrupted:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:500] or type(error).__name__
            known = isinstance(error, UserError)
            record |= {"status": "failed", "error": reason if known else f"{type(error).__name__}: {reason}"}
            (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        record["seconds"] = round(time.time() - started, 1)
        write_json(folder / "run.json", record)
        return record

    def _train_and_evaluate(self, run: StudyRun, folder: Path) -> dict[str, Any]:
        """The results of a run: costs, metrics."""
        config = config_of_run(self.config, run)
        runtime = self._runtime_of(config)
        student = runtime.student
        results: dict[str, Any] = {
            "student_fingerprint": student.fingerprint, "sees": student.config.vision is not None,
        }  # fmt: skip
        if run.trained:
            results |= self._train(run, config, folder, runtime)
        metrics = evaluation.evaluate(config, str(folder), runtime)
        results |= {"metrics": metrics, "inference": inference_cost(metrics, student.config)}
        if self.config.study.explanations and "E" in arm_format(config.recipe).targets:
            config.eval.mode, config.eval.folder = "generate", EXPLANATIONS
            config.eval.limit = self.config.study.explanations
            evaluation.evaluate(config, str(folder), runtime)
        return results

    def _train(self, run: StudyRun, config, folder: Path, runtime: Runtime) -> dict[str, Any]:
        manifest = self._dataset(config, runtime.student)[0].manifest
        if self.config.study.equal == "tokens":
            config.train.steps = self._equal_steps(run, runtime)
        result = loop.train(config, str(folder), runtime)
        # Also where the signal came in the last step: the study must not continue.
        if result["stopped"] or not result["finished"]:
            raise Interrupted
        mean_length = manifest["tokens"]["total"] / manifest["rows"]
        cost = training_cost(folder, config, runtime.student.config, mean_length)
        return {
            "dataset": {key: manifest[key] for key in ("rows", "rows_by_source", "tokens", "target_tokens", "dropped")},
            "training": {**cost, "steps": result["steps"], "best_val_loss": result["best_val_loss"]},
            "teacher": self._teacher_cost(config),
        }

    def _runtime_of(self, config) -> Runtime:
        """The student of a run: the previous run's where it is the same, else loaded after that one is freed."""
        full, lora = "full" in config.adapter.methods, "lora" in config.adapter.methods
        random_seed = config.seed if config.student.path.startswith("random:") else None
        dropout = config.adapter.lora.dropout if lora else 0.0
        key = sha256_json([config.student.to_dict(), config.mesh.to_dict(), full, dropout, random_seed])
        if self._runtime is None or self._runtime[0] != key:
            self._runtime = None
            self._runtime = (key, build_runtime(config))
        return self._runtime[1]

    def _equal_steps(self, run: StudyRun, runtime: Runtime) -> int:
        """Steps in which a run trains on as many tokens, without padding, as the reference arm in its epochs."""
        reference = run._replace(arm=self.config.study.reference)
        if reference not in self._tokens:
            steps, per_step = self._length(reference, runtime)
            self._tokens[reference] = steps * per_step
        return max(1, round(self._tokens[reference] / self._length(run, runtime)[1]))

    def _length(self, run: StudyRun, runtime: Runtime) -> tuple[int, float]:
        """(steps of a run's epochs, mean number of tokens of a step, without padding)."""
        config, student = config_of_run(self.config, run), runtime.student
        dataset, images = self._dataset(config, student)
        rows = pack_dataset(
            dataset, config, student.tokenizer.pad_token_id, soft_prompt_tokens(config.adapter), student.config.prefix_lm,
            images and ImageBatcher(images),
        )  # fmt: skip
        slots = config.train.row_length * config.train.batch_rows * config.train.accumulate
        return training_steps(config, rows), rows.packing_efficiency() * slots

    def _dataset(self, config, student: Student) -> tuple[DistillationDataset, ImageStore | None]:
        """The dataset of a run, and the images of its questions."""
        images = config_images(config, student.config, training_problems(config, self.problems))
        return build_or_reuse(config, student.tokenizer, self.problems, images)[0], images

    def _teacher_cost(self, config) -> TeacherCost:
        """Cost of the replies that a run was trained on."""
        files = tuple(config.data.teacher)
        if files not in self._replies:
            self._replies[files] = records_by_pid(config_records(config, self.problems))
        by_pid = self._replies[files]
        built = [
            example
            for problem in training_problems(config, self.problems)
            for example in examples(problem, by_pid.get(problem.pid, {}), config.recipe)
        ]
        replies = [(e.problem, e.reply) for e in built if isinstance(e, Example) and e.reply is not None]
        return teacher_cost(replies, self.config.teach.prices, prompt_of_record)
