"""One of several processes that compute the features of images together.

Usage: features_worker.py HOST:PORT PROCESSES PROCESS CACHE
"""

from __future__ import annotations

import sys
from pathlib import Path

from sqa_jax.parallel import processes


def main() -> None:
    coordinator, count, index, cache = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    processes.start(processes.Group(coordinator, count, index, 60, 30))
    from tests.inference.test_features import features

    features(cache)


if __name__ == "__main__":
    main()
