"""Files that all tests of a session share, whichever process they run in: made once, by whoever needs them first."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock


class Store:
    """Results of `make`, kept in a folder that pytest-xdist's workers share."""

    def __init__(self, root: Path):
        self.root = root

    def __call__(self, name: str, make: Callable[[Path], Any]) -> tuple[Path, Any]:
        """(folder, what `make(folder)` returned); tests must not change what lies in the folder.

        Args:
          name: of the folder; the same name is the same thing.
          make: fills the folder; its result is pickled.
        """
        folder, result = self.root / name, self.root / f"{name}.pickle"
        with FileLock(self.root / f"{name}.lock"):
            if not result.exists():
                folder.mkdir()
                result.write_bytes(pickle.dumps(make(folder)))
        return folder, pickle.loads(result.read_bytes())
