"""A larger student on this machine as the teacher."""

from __future__ import annotations

from collections.abc import Generator as Generates
from collections.abc import Sequence

from sqa_jax.errors import UserError
from sqa_jax.teach.teacher import Reply, Request


class StudentTeacher:
    """Loads the weights that `config.teach.model` names, with `config.student`'s and `config.mesh`'s other settings.

    Args:
      config: the whole configuration.

    Raises:
      UserError: the model's name is empty, the weights cannot be loaded, or images are to be sent to a student of text.
    """

    price = 0.0

    def __init__(self, config):
        settings = config.teach
        if not settings.model:
            raise UserError("config.teach.model is empty; with client = 'student' it is the path of the weights")
        from sqa_jax.runtime import build_runtime

        own = config.copy_and_resolve_references()
        own.student.path = settings.model
        own.adapter.methods = ()
        runtime = build_runtime(own)
        if settings.image and runtime.student.config.vision is None:
            raise UserError(
                f"{runtime.student.name} sees no images; set --config.teach.image=False, and --config.teach.caption=True to "
                "describe them, or name a student that sees"
            )
        self.model = runtime.student.name
        self.identity = {"student": runtime.student.fingerprint}
        self._config, self._runtime = own, runtime

    def ask_all(self, requests: Sequence[Request]) -> Generates[list[tuple[Request, Reply]], None, None]:
        """Yields replies as their texts end, `config.teach.concurrency` at a time.

        A request whose image the student cannot take is left out: it would answer another question.

        Raises:
          UserError: a prompt and its reply are longer than the student's positions.
        """
        from sqa_jax.inference.features import picture_rows
        from sqa_jax.inference.generate import Generator
        from sqa_jax.prompts.encode import Encoder

        settings, student = self._config.teach, self._runtime.student
        seen = picture_rows(self._config, self._runtime, requests)
        requests = [request for request in requests if seen is None or request.pid not in seen.pictures.failed]
        if not requests:
            return
        encoder = Encoder(student.tokenizer, student.config.max_positions, True, False, pictures=seen and seen.pictures)
        encoded = encoder.encode_prompts([r.pid for r in requests], [r.prompt for r in requests])
        prompts = [one.tokens for one in encoded]
        longest = max(range(len(prompts)), key=lambda k: len(prompts[k]))
        room = student.config.max_positions - settings.max_output_tokens
        if len(prompts[longest]) > room:
            raise UserError(
                f"question {requests[longest].pid}: its prompt takes {len(prompts[longest])} tokens and the reply up to "
                f"{settings.max_output_tokens}, more than the {student.config.max_positions} positions of {student.name}; "
                "lower --config.teach.max_output_tokens"
            )
        # Sampling is a function of the seed and the prompt's place in the list, which is another after a restart:
        # with the same seed, a second sample of a question could be drawn with the first one's random numbers.
        generate = Generator(
            self._config.adapter, self._runtime.decoder, self._runtime.mesh, student.eos_ids, settings.max_output_tokens,
            settings.concurrency, settings.temperature, int(requests[0].hash[:7], 16), seen,
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
