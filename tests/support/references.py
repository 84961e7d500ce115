"""Arrays that PyTorch, PEFT or another outside library computed: committed, and computed anew with `--reference`.

Without `--reference` a test reads them from `tests/references/NAME.npz`, so it needs none of these libraries.
`bash launch/test.sh --reference` installs the libraries, computes every array again, and fails where the committed
one disagrees; with `--remake` it writes them instead. Inputs (tokens, random weights) never come from the outside
library: both sides make them from the same NumPy seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent.parent / "references"


class References:
    """What the fixture `reference` gives a test.

    Args:
      live: compute the arrays, in place of reading them.
      remake: with `live`, write what was computed.
    """

    def __init__(self, live: bool = False, remake: bool = False):
        self.live, self.remake = live, remake

    def __call__(
        self, name: str, compute: Callable[[], Mapping[str, np.ndarray]], tolerance: float = 1e-5
    ) -> dict[str, np.ndarray]:
        """The arrays `compute` returns, or those it returned when they were committed as NAME.npz.

        Args:
          name: path below `tests/references`, such as "models/decoder/llama"; one name for one computation.
          compute: imports the outside library itself, since it only runs with `--reference`.
          tolerance: largest absolute difference from the committed floating-point arrays; others must be equal.
        """
        file = FOLDER / f"{name}.npz"
        if not self.live:
            assert file.exists(), f"{file} is missing: run `bash launch/test.sh --reference --remake` and commit it"
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        computed = {key: np.asarray(value) for key, value in compute().items()}
        if self.remake:
            file.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(file, **computed)
            return computed
        assert file.exists(), f"{file} is missing: add --remake and commit it"
        with np.load(file, allow_pickle=False) as committed:
            assert set(committed) == set(computed), f"{file} holds other arrays; add --remake and commit it"
            for key, value in computed.items():
                message = f"{file}: {key}"
                if np.issubdtype(value.dtype, np.floating):
                    np.testing.assert_allclose(value, committed[key], rtol=0, atol=tolerance, err_msg=message)
                else:
                    np.testing.assert_array_equal(value, committed[key], err_msg=message)
        return computed
