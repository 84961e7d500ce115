"""One of several processes that train together; prints the result of each case, [methods, mesh], as JSON.

Usage: processes_worker.py HOST:PORT PROCESSES PROCESS CASES-AS-JSON
"""

from __future__ import annotations

import json
import sys

from sqa_jax.parallel import processes


def main() -> None:
    coordinator, count, index, cases = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
    processes.start(processes.Group(coordinator, count, index, 60, 30))
    import jax

    from tests.training.test_step import trained

    results = []
    for methods, mesh in cases:
        losses, adapter = trained(methods, mesh)
        leaves = jax.tree_util.tree_leaves_with_path(adapter)
        sampled = {jax.tree_util.keystr(path): leaf.ravel()[::7].tolist() for path, leaf in leaves}
        results.append({"losses": losses, "adapter": sampled})
    print("RESULT " + json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
