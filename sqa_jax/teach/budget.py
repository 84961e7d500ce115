"""Cost accounting: the highest cost of a request, the cost of a reply, and a budget that is never exceeded."""

from __future__ import annotations

import math
from typing import Any

from sqa_jax.errors import UserError
from sqa_jax.metrics.costs import token_prices
from sqa_jax.teach.teacher import Reply, Request

_TEMPLATE_TOKENS = 64  # upper bound on what a service's chat template adds to a prompt


class Prices:
    """Token prices of one model.

    Args:
      settings: `config.teach`.

    Raises:
      UserError: the model is not in the price table, or a row of the table is malformed.
    """

    def __init__(self, settings: Any):
        table = token_prices(settings.prices)
        model = settings.model.removeprefix("models/")
        if model not in table:
            raise UserError(
                f"the price of {model!r} is not known; add it: --config.teach.prices=\"(('{model}', 0.1, 0.4),)\" in US dollars "
                "a million input and output tokens, or 0, 0 for a free one"
            )
        discount = settings.batch_discount if settings.batch else 1.0
        self._input, self._output = (discount * price / 1e6 for price in table[model])
        self._max_output, self._image = settings.max_output_tokens, settings.image_tokens
        self._scale = 1.0

    @property
    def free(self) -> bool:
        return not self._input and not self._output

    def upper_bound(self, request: Request) -> float:
        """US dollars that a request costs at most: no tokenizer produces more tokens than bytes."""
        tokens = len(request.prompt.encode()) + _TEMPLATE_TOKENS + (self._image if request.image else 0)
        return self._scale * (tokens * self._input + self._max_output * self._output)

    def of(self, reply: Reply, reserved: float) -> float:
        """US dollars of a reply; `reserved` if the service reports no token counts.

        If a reply cost more than the upper bound of its request, later upper bounds are scaled by that ratio.
        """
        if reply.prompt_tokens is None or reply.output_tokens is None:
            return reserved
        price = reply.prompt_tokens * self._input + reply.output_tokens * self._output
        if price > reserved > 0:
            self._scale *= price / reserved
        return price


class Budget:
    """Reserves a request's upper bound before it is sent, so that the total never exceeds the limit.

    Attributes:
      limit: US dollars; infinite for a free teacher.
      spent: paid, or possibly paid.
      reserved: for requests in flight.
    """

    def __init__(self, limit: float, spent: float):
        self.limit, self.spent = limit, spent
        self._reservations: list[float] = []

    @property
    def reserved(self) -> float:
        return math.fsum(self._reservations)

    @property
    def idle(self) -> bool:
        """Whether no request is in flight, so no reservation will be released."""
        return not self._reservations

    def reserve(self, amount: float) -> bool:
        """Reserves an amount; False if it exceeds what is left."""
        if math.fsum([self.spent, amount, *self._reservations]) > self.limit:
            return False
        self._reservations.append(amount)
        return True

    def settle(self, amount: float, price: float) -> None:
        """Replaces a reservation by what the request did cost."""
        self._reservations.remove(amount)
        self.spent += price
