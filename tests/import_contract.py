"""The import contract: packages form layers, and imports only ever point to a lower one.

`python -m tests.import_contract` checks it, `--picture FILE.svg` also draws the layers. Every import counts, those
inside functions and under TYPE_CHECKING too.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent / "sqa_jax"

# From the top down. Packages of one layer do not import each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("study",),
    ("agent", "export"),
    ("train", "evaluate", "preprocess", "score", "plan", "teach"),
    ("evaluation",),
    ("reporting",),
    ("metrics",),
    ("training",),
    ("inference",),
    ("runtime",),
    ("batches",),
    ("prompts",),
    ("data",),
    ("adapters",),
    ("checkpoints",),
    ("models",),
    ("cli",),
    ("parallel", "config"),
    ("files", "config_aliases"),
    ("bucket", "signals"),
    ("errors",),
)
# The same inside packages of packages; modules that stand beside sub-packages are layers, too.
INNER: dict[str, tuple[tuple[str, ...], ...]] = {}


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the package by its dotted name, without the leading "sqa_jax."; packages by their own name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] in ("__init__", "__main__") else parts)
        found[f"{name}.__main__" if parts[-1] == "__main__" else name] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> list[tuple[int, str]]:
    """(line, imported module of the package) of each import in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        for module, name in names:
            if module.split(".")[0] != "sqa_jax":
                continue
            inner = module.removeprefix("sqa_jax").removeprefix(".")
            longer = ".".join(part for part in (inner, name) if part)
            found.append((node.lineno, longer if longer in known else inner))
    return found


def violations(root: Path = ROOT) -> list[str]:
    """One line for each import that points up or sideways, each package that no layer names, and each cycle of modules."""
    known, found = modules(root), []
    rank = {name: k for k, layer in enumerate(LAYERS) for name in layer}
    edges: dict[str, set[str]] = {}
    for module, path in known.items():
        package = module.split(".")[0]
        if not module:
            continue
        if package not in rank:
            found.append(f"{path}: package {package} is in no layer; add it to LAYERS in tests/import_contract.py")
            continue
        for line, target in imports(path, known):
            other = target.split(".")[0]
            if target:
                edges.setdefault(module, set()).add(target)
            if target and other != package and rank.get(other, -1) <= rank[package]:
                found.append(f"{path}:{line}: {package} imports {other}, which is not below it")
    return found + [f"cycle of modules: {' → '.join(cycle)}" for cycle in cycles(edges)]


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """One cycle of each group of modules that import each other (Tarjan 1972: strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(edges.get(node, ())):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append([*group, group[0]])

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return found


if __name__ == "__main__":
    lines = violations()
    print("\n".join(lines))
    sys.exit(bool(lines))
