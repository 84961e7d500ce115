"""The one exception that stands for a mistake a user can mend."""


class UserError(Exception):
    """A problem with the input, said in one line: what, where, and what to do.

    Every verb turns it into that line on standard error and exit code 2. Anything else that escapes
    is a defect of this package and keeps its traceback.
    """
