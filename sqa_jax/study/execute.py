"""Runs the cells of the matrix, one after the other; what one of them loads, tokenizes or compiles serves the rest."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqa_jax.batches.config_data import config_images, config_records, training_problems
from sqa_jax.batches.dataset import DistillationDataset, build_or_reuse
from sqa_jax.batches.images import ImageBatcher
from sqa_jax.checkpoints.load import Student
from sqa_jax.data.images import ImageStore
from sqa_jax.data.sources import ProblemSet
from sqa_jax.data.teacher_records import records_by_pid
from sqa_jax.errors import UserError
from sqa_jax.files import read_json, sha256_file, sha256_json, write_json
from sqa_jax.metrics.costs import inference_cost, teacher_cost, training_cost
from sqa_jax.prompts.recipes import Example, Records, arm_format, arm_of, examples
from sqa_jax.study.matrix import Run, run_config
from sqa_jax.teach.prompts import prompt_of_record
from sqa_jax.training.workdir import described, flatten

EXPLANATIONS = "explanations"  # folder of the generated explanations, under a run's eval/
# Settings that say where things are and how work is cut into pieces, not what comes of it.
_FREE = (
    "mesh.", "study.", "teach.", "data.cache", "data.path", "data.teacher", "train.save_every", "train.log_every", "train.stop_after", "train.profile_steps",
)  # fmt: skip


class Interrupted(Exception):
    """SIGTERM came: the run in progress is saved, and the rest waits for the same command."""


class Executor:
    """Makes runs under a directory; `run.json` in a run's folder says that it is done, or why it failed.

    Args:
      config: the study's.
      root: its workdir.
    """

    def __init__(self, config, root: Path, problems: ProblemSet):
        self.config, self.root, self.problems = config, root, problems
        self._runtime: tuple[Any, Any] | None = None  # (what it was loaded from, the loaded student)
        self._tokens: dict[Run, float] = {}  # that the reference's runs see
        self._replies: dict[tuple[str, ...], Mapping[str, Records]] = {}  # by pid, of the files that they come from

    def settings(self, run: Run) -> dict[str, Any]:
        """By name, all that decides a run's results and is known before the student is loaded."""
        own = self._config(run)
        settings = {name: value for name, value in flatten(own.to_dict()).items() if not name.startswith(_FREE)}
        settings["questions"] = self.problems.fingerprint
        if run.trained:
            study = self.config.study
            settings |= {f"study.{name}": study[name] for name in ("equal", "explanations")}
            if arm_of(own.recipe).kinds or own.recipe.require:
                settings["replies"] = [path if path == "sample" else sha256_file(path) for path in own.data.teacher]
            if study.equal == "tokens" and run.arm != study.reference:
                # How long the reference trains is how long this run does.
                reference = flatten(self._config(run._replace(arm=study.reference)).to_dict())
                of_length = ("train.epochs", "train.steps", "train.batch_rows", "train.accumulate", "train.row_length")
                settings |= {f"{study.reference}'s {name}": reference[name] for name in of_length}
        return json.loads(json.dumps(settings))  # as the file has them

    def done(self, run: Run) -> dict[str, Any] | None:
        """What a finished run left, None where there is none or it failed.

        Raises:
          UserError: it was made, or begun, with other settings.
        """
        file = run.folder(self.root) / "run.json"
        if not file.exists():
            return None
        made = read_json(file, "what came of a run of the study")
        before, now = made["settings"], self.settings(run)
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if differing := [(name, before.get(name), now.get(name)) for name in names]:
            raise UserError(
                f"{file.parent}: was made with other settings ({described(differing)}); choose another --workdir, or remove this folder to "
                "make the run again"
            )
        return made if made["status"] == "finished" else None

    def __call__(self, run: Run) -> dict[str, Any]:
        """Trains and evaluates, unless it is done; a failure is recorded, and tried again by the next start.

        Raises:
          Interrupted: SIGTERM came.
        """
        if (made := self.done(run)) is not None:
            return made
        folder = run.folder(self.root)
        started = time.time()
        record = {**run._asdict(), "settings": self.settings(run), "started": started}
        write_json(folder / "run.json", {**record, "status": "started"})
        try:
            record |= {"status": "finished", **self._make(run, folder)}
            (folder / "error.txt").unlink(missing_ok=True)
        except Interrupted:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:500] or type(error).__name__
            record |= {
                "status": "failed",
                "error": reason if isinstance(error, UserError) else f"{type(error).__name__}: {reason}",
            }
            (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        record["seconds"] = round(time.time() - started, 1)
        write_json(folder / "run.json", record)
        return record

    def _config(self, run: Run):
        return run_config(self.config, run)

    def _make(self, run: Run, folder: Path) -> dict[str, Any]:
        from sqa_jax.evaluation.evaluate import evaluate
        from sqa_jax.training.loop import train

        own = self._config(run)
        runtime = self._load(own)
        made: dict[str, Any] = {
            "student_fingerprint": runtime.student.fingerprint,
            "sees": runtime.student.config.vision is not None,
        }
        if run.trained:
            dataset, _ = self._dataset(own, runtime.student)
            manifest = dataset.manifest
            made["dataset"] = {
                key: manifest[key] for key in ("rows", "rows_by_source", "tokens", "target_tokens", "dropped")
            }
            if self.config.study.equal == "tokens":
                own.train.steps = self._equal_steps(run, runtime)
            result = train(own, str(folder), runtime)
            # Also where the signal came in the last step: the study must not go on.
            if result["stopped"] or not result["finished"]:
                raise Interrupted
            mean_length = manifest["tokens"]["total"] / manifest["rows"]
            made["training"] = {
                **training_cost(folder, own, runtime.student.config, mean_length),
                "steps": result["steps"],
                "best_val_loss": result["best_val_loss"],
            }
            made["teacher"] = self._teacher(own)
        metrics = evaluate(own, str(folder), runtime)
        made["metrics"] = metrics
        made["inference"] = inference_cost(metrics, runtime.student.config)
        if self.config.study.explanations and "E" in arm_format(own.recipe).targets:
            own.eval.mode, own.eval.folder = "generate", EXPLANATIONS
            own.eval.limit = self.config.study.explanations
            evaluate(own, str(folder), runtime)
        return made

    def _load(self, own):
        """The student of a run; the one before is kept where it is the same, and let go where it is not."""
        from sqa_jax.runtime import build_runtime

        full, lora = "full" in own.adapter.methods, "lora" in own.adapter.methods
        random_seed = own.seed if own.student.path.startswith("random:") else None
        key = sha256_json(
            [own.student.to_dict(), own.mesh.to_dict(), full, own.adapter.lora.dropout if lora else 0.0, random_seed]
        )
        if self._runtime is None or self._runtime[0] != key:
            self._runtime = None
            self._runtime = (key, build_runtime(own))
        return self._runtime[1]

    def _equal_steps(self, run: Run, runtime) -> int:
        """Steps in which a run sees as many tokens, without padding, as the reference arm in its epochs."""
        reference = run._replace(arm=self.config.study.reference)
        if reference not in self._tokens:
            steps, per_step = self._length(reference, runtime)
            self._tokens[reference] = steps * per_step
        return max(1, round(self._tokens[reference] / self._length(run, runtime)[1]))

    def _length(self, run: Run, runtime) -> tuple[int, float]:
        """(steps that a run's own epochs take, tokens of a step on average)."""
        from sqa_jax.adapters import soft_prompt_tokens
        from sqa_jax.batches.loader import pack_dataset, training_steps

        own, student = self._config(run), runtime.student
        dataset, images = self._dataset(own, student)
        rows = pack_dataset(
            dataset, own, student.tokenizer.pad_token_id, soft_prompt_tokens(own.adapter), student.config.prefix_lm,
            images and ImageBatcher(images),
        )  # fmt: skip
        step = own.train.row_length * own.train.batch_rows * own.train.accumulate
        return training_steps(own, rows), rows.packing_efficiency() * step

    def _dataset(self, own, student: Student) -> tuple[DistillationDataset, ImageStore | None]:
        """The dataset of a run, and the pictures of its questions."""
        images = config_images(own, student.config, training_problems(own, self.problems))
        return build_or_reuse(own, student.tokenizer, self.problems, images)[0], images

    def _teacher(self, own) -> dict[str, Any]:
        """What the replies cost that a run learned from."""
        files = tuple(own.data.teacher)
        if files not in self._replies:
            self._replies[files] = records_by_pid(config_records(own, self.problems))
        by_pid = self._replies[files]
        made = [
            e for p in training_problems(own, self.problems) for e in examples(p, by_pid.get(p.pid, {}), own.recipe)
        ]
        replies = [(e.problem, e.reply) for e in made if isinstance(e, Example) and e.reply is not None]
        return teacher_cost(replies, self.config.teach.prices, prompt_of_record)
