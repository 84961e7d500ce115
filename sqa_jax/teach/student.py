"""A larger model on this machine as the teacher."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

from sqa_jax.errors import UserError
from sqa_jax.teach.teacher import Reply, Request


class StudentTeacher:
    """A `LocalTeacher`: the weights at `config.teach.model`, with the other settings of `config.student` and `config.mesh`.

    Args:
      config: the whole configuration.

    Raises:
      UserError: the model's name is empty, the weights cannot be loaded, or images are to be sent to a text-only model.
    """

    price: float | None = 0.0

    def __init__(self, config: Any):
        settings = config.teach
        if not settings.model:
            raise UserError("config.teach.model is empty; with client = 'student' it is the path of the weights")
        from sqa_jax.runtime import build_runtime

        config = config.copy_and_resolve_references()
        config.student.path = settings.model
        config.adapter.methods = ()
        runtime = build_runtime(config)
        if settings.image and runtime.student.config.vision is None:
            raise UserError(
                f"{runtime.student.name} has no vision encoder; set --config.teach.image=False, and --config.teach.caption=True to "
                "describe the images, or name a vision-language model"
            )
        self.model = runtime.student.name
        self.identity: Mapping[str, Any] = {"student": runtime.student.fingerprint}
        self._config, self._runtime = config, runtime

    def ask_all(self, requests: Sequence[Request]) -> Generator[list[tuple[Request, Reply]], None, None]:
        """Yields replies as their sequences end (continuous batching), in chunks of `config.teach.concurrency`.

        A request whose image the vision encoder cannot process is left out: without it, it is another question.

        Raises:
          UserError: a prompt and its reply exceed the model's maximum positions.
        """
        from sqa_jax.inference import generate as generation
        from sqa_jax.inference.features import image_batcher
        from sqa_jax.prompts.encode import Encoder

        settings, student = self._config.teach, self._runtime.student
        images = image_batcher(self._config, self._runtime, requests)
        requests = [request for request in requests if images is None or request.pid not in images.images.failed]
        if not requests:
            return
        encoder = Encoder(student.tokenizer, student.config.max_positions, True, False, images=images and images.images)
        encoded = encoder.encode_prompts([r.pid for r in requests], [r.prompt for r in requests])
        prompts = [example.tokens for example in encoded]
        longest = max(range(len(prompts)), key=lambda k: len(prompts[k]))
        max_prompt = student.config.max_positions - settings.max_output_tokens
        if len(prompts[longest]) > max_prompt:
            raise UserError(
                f"question {requests[longest].pid}: its prompt takes {len(prompts[longest])} tokens and the reply up to "
                f"{settings.max_output_tokens}, more than the {student.config.max_positions} positions of {student.name}; "
                "lower --config.teach.max_output_tokens"
            )
        # Sampling is a function of the seed and the prompt's index in the list, which changes after a restart: with a
        # constant seed, a second sample of a question could be drawn with the first one's random numbers.
        generate = generation.Generator(
            self._config.adapter, self._runtime.decoder, self._runtime.mesh, student.eos_ids, settings.max_output_tokens,
            settings.concurrency, settings.temperature, int(requests[0].hash[:7], 16), images,
        )  # fmt: skip
        chunk: list[tuple[Request, Reply]] = []
        for index, ids in generate({}, student.params, prompts):
            text = student.tokenizer.decode(ids, skip_special_tokens=True)
            status = "cut_off" if len(ids) >= settings.max_output_tokens else "ok"
            chunk.append((requests[index], Reply(status, text, len(prompts[index]), len(ids))))
            if len(chunk) == settings.concurrency:
                yield chunk
                chunk = []
        if chunk:
            yield chunk
