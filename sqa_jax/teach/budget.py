"""Money: what a request costs at most, what a reply did cost, and a budget that is never exceeded."""

from __future__ import annotations

import math

from sqa_jax.errors import UserError
from sqa_jax.teach.teacher import Reply, Request

_AROUND = 64  # tokens that a service adds around a prompt (roles, turns), generously


class Prices:
    """Prices of one model.

    Args:
      settings: `config.teach`.

    Raises:
      UserError: the model's prices are not known, or a row of the table is not usable.
    """

    def __init__(self, settings):
        table = {}
        for row in settings.prices:
            if (
                not isinstance(row, tuple)
                or len(row) != 3
                or not all(isinstance(p, (int, float)) and p >= 0 for p in row[1:])
            ):
                raise UserError(
                    f"config.teach.prices: {row!r}; each row is (model, US dollars a million input tokens, a million output tokens)"
                )
            table[row[0]] = row[1:]
        model = settings.model.removeprefix("models/")
        if model not in table:
            raise UserError(
                f"the price of {model!r} is not known; add it: --config.teach.prices=\"(('{model}', 0.1, 0.4),)\" in US dollars "
                "a million input and output tokens, or 0, 0 for a free one"
            )
        part = settings.batch_discount if settings.batch else 1.0
        self._input, self._output = (part * price / 1e6 for price in table[model])
        self._max_output, self._image = settings.max_output_tokens, settings.image_tokens
        self._scale = 1.0

    @property
    def free(self) -> bool:
        return not self._input and not self._output

    def most(self, request: Request) -> float:
        """US dollars that a request costs at most: no tokenizer makes more tokens than there are bytes."""
        tokens = len(request.prompt.encode()) + _AROUND + (self._image if request.image else 0)
        return self._scale * (tokens * self._input + self._max_output * self._output)

    def of(self, reply: Reply, reserved: float) -> float:
        """US dollars of a reply; `reserved` where the service does not count its tokens.

        If a reply cost more than its request was to cost at most, later requests are taken to cost that much more.
        """
        if reply.prompt_tokens is None or reply.output_tokens is None:
            return reserved
        price = reply.prompt_tokens * self._input + reply.output_tokens * self._output
        if price > reserved > 0:
            self._scale *= price / reserved
        return price


class Budget:
    """Reserves the highest price of a request before it is sent, so that the sum never exceeds the limit.

    Attributes:
      limit: US dollars; infinite for a free teacher.
      spent: paid, or perhaps paid.
      held: reserved for requests under way.
    """

    def __init__(self, limit: float, spent: float):
        self.limit, self.spent, self._reserved = limit, spent, []

    @property
    def held(self) -> float:
        return math.fsum(self._reserved)

    @property
    def idle(self) -> bool:
        """Nothing is under way, so nothing will be given back."""
        return not self._reserved

    def reserve(self, amount: float) -> bool:
        """Holds an amount back; False where it does not fit."""
        if math.fsum([self.spent, amount, *self._reserved]) > self.limit:
            return False
        self._reserved.append(amount)
        return True

    def settle(self, amount: float, price: float) -> None:
        """Puts what a request did cost in the place of what was reserved for it."""
        self._reserved.remove(amount)
        self.spent += price
