"""The one exception that stands for a mistake a user can mend."""


class UserError(Exception):
    """A problem with the input, said in one line: what, where, and what to do.

    Every verb turns it into that line on standard error and exit code 2. Anything else that escapes
    is a defect of this package and keeps its traceback.
    """


class UnusableImage(UserError):
    """An image that cannot be used.

    Attributes:
      reason: what is wrong, in the same words for every image of which it is.
    """

    def __init__(self, where: str, reason: str, remedy: str, detail: str = ""):
        super().__init__(f"{where}: {reason}{f' ({detail})' if detail else ''}; {remedy}")
        self.reason = reason
