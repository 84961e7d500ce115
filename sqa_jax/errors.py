"""Errors that the user can fix."""


class UserError(Exception):
    """A mistake in the input, as one line: what is wrong, where, and what to do.

    Every verb prints that line on standard error and exits with code 2. Any other exception is a bug of this package
    and keeps its traceback.
    """


class UnusableImage(UserError):
    """An image that cannot be used.

    Attributes:
      reason: what is wrong; the same text for every image with this problem, so that they can be counted.
    """

    def __init__(self, where: str, reason: str, remedy: str, detail: str = ""):
        super().__init__(f"{where}: {reason}{f' ({detail})' if detail else ''}; {remedy}")
        self.reason = reason
