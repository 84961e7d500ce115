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
      UserError: images are to be sent, the model's name is empty, or the weights cannot be loaded.
    """

    price = 0.0

    def __init__(self, config):
        settings = config.teach
        if settings.image:
            raise UserError(
                "a student sees no images; set --config.teach.image=False, and --config.teach.caption=True to describe them"
            )
        if not settings.model:
            raise UserError("config.teach.model is empty; with client = 'student' it is the path of the weights")
        from sqa_jax.data.prompts import Template
        from sqa_jax.runtime import start

        own = config.copy_and_resolve_references()
        own.student.path = settings.model
        own.adapter.methods = ()
        runtime = start(own)
        self.model = runtime.student.name
        self.identity = {"student": runtime.student.fingerprint}
        self._settings, self._runtime, self._adapter = settings, runtime, own.adapter
        self._template = Template(runtime.student.tokenizer, chat=True)

    def ask_all(self, requests: Sequence[Request]) -> Generates[list[tuple[Request, Reply]], None, None]:
        """Yields replies as their texts end, `config.teach.concurrency` at a time.

        Raises:
          UserError: a prompt and its reply are longer than the student's positions.
        """
        from sqa_jax.inference.generate import Generator

        if not requests:
            return
        settings, student = self._settings, self._runtime.student
        prompts = [self._encode(request.prompt) for request in requests]
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
            self._adapter, self._runtime.decoder, self._runtime.mesh, student.eos_ids, settings.max_output_tokens,
            settings.concurrency, settings.temperature, seed=int(requests[0].hash[:7], 16),
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

    def _encode(self, text: str) -> list[int]:
        """The prompt in the student's chat template. User text never becomes a special token."""
        tokenizer, template = self._runtime.student.tokenizer, self._template
        before, after = tokenizer([template.before, template.after], add_special_tokens=False)["input_ids"]
        (plain,) = tokenizer([text], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return before + plain + after
