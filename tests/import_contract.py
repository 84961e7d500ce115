"""The import contract: packages form layers, and imports only ever point to a lower one.

`python -m tests.import_contract` checks it; `--picture FILE.svg` also draws the layers. Every import counts, those
inside functions and under TYPE_CHECKING too.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent / "sqa_jax"

Layers = Sequence[Sequence[str]]

# From the top down. Packages and modules of one layer do not import each other.
LAYERS: Layers = (
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
# The same inside a package that has packages of its own.
INNER: Mapping[str, Layers] = {
    "models": (
        ("catalogue", "log_probs"),
        ("api",),
        ("flops", "params"),
        ("decoder", "decoder_params", "t5"),
        ("decoder_config",),
        ("student_config", "adaptation"),
        ("vision",),
        ("layers",),
        ("identity", "param_spec", "rope_frequencies", "segments", "soft_tokens", "validation"),
    ),
}


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the package by its dotted name, without the leading "sqa_jax."; packages by their own name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] in ("__init__", "__main__") else parts)
        found[f"{name}.__main__" if parts[-1] == "__main__" else name] = path
    return found


def imports(path: Path, known: Mapping[str, Path], top: str = ROOT.name) -> list[tuple[int, str]]:
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
            if module.split(".")[0] != top:
                continue
            inner = module.removeprefix(top).removeprefix(".")
            longer = ".".join(part for part in (inner, name) if part)
            found.append((node.lineno, longer if longer in known else inner))
    return found


def violations(root: Path = ROOT, layers: Layers = LAYERS, inner: Mapping[str, Layers] = INNER) -> list[str]:
    """One line for each import that points up or sideways, each package that no layer names, and each cycle."""
    known = modules(root)
    edges = {
        module: [(line, target) for line, target in imports(path, known, root.name) if target]
        for module, path in known.items()
        if module
    }
    found = [f"cycle of modules: {' → '.join(cycle)}" for cycle in cycles(_targets(edges))]
    for package, of_package in {"": layers, **inner}.items():
        found += _upward(package, of_package, edges, known)
    for package in sorted({module.rpartition(".")[0] for module in edges}):
        between = {}
        for (source, target), count in unit_imports(package, edges).items():
            between.setdefault(source, []).append((count, target))
        where = f" inside {package}" if package else ""
        found += [f"cycle of packages{where}: {' → '.join(cycle)}" for cycle in cycles(_targets(between))]
    return found


def _targets(edges: Mapping[str, Sequence[tuple[int, str]]]) -> dict[str, set[str]]:
    return {module: {target for _, target in targets} for module, targets in edges.items()}


def _unit(package: str, module: str) -> str:
    """The sub-package or module of `package` that a module is in; "" if it is elsewhere, or the package itself."""
    if package and not module.startswith(f"{package}."):
        return ""
    return module.removeprefix(package).removeprefix(".").split(".")[0]


def unit_imports(package: str, edges: Mapping[str, Sequence[tuple[int, str]]]) -> Counter[tuple[str, str]]:
    """How often each sub-package or module of `package` imports each other one."""
    pairs = ((_unit(package, module), _unit(package, target)) for module in edges for _, target in edges[module])
    return Counter((source, target) for source, target in pairs if source and target and source != target)


def _upward(
    package: str, layers: Layers, edges: Mapping[str, Sequence[tuple[int, str]]], known: Mapping[str, Path]
) -> list[str]:
    """Imports inside a package that do not point to a lower layer, and what is in none."""
    found, rank = [], {name: k for k, layer in enumerate(layers) for name in layer}
    for module, targets in edges.items():
        unit = _unit(package, module)
        if unit and unit not in rank:
            found.append(f"{known[module]}: {unit} is in no layer; add it to tests/import_contract.py")
            continue
        for line, target in targets:
            other = _unit(package, target)
            if unit and other and other != unit and rank.get(other, -1) <= rank[unit]:
                found.append(f"{known[module]}:{line}: {unit} imports {other}, which is not below it")
    return found


def cycles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """One cycle of each group of nodes that import each other (Tarjan 1972: strongly connected components)."""
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


def draw(file: Path, root: Path = ROOT) -> None:
    """Layers from the top down, lines of code, and how often each row imports each column: all right of the diagonal."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams.update({"svg.hashsalt": "layers", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    known = modules(root)
    edges = {module: imports(path, known, root.name) for module, path in known.items()}
    panels = {"": LAYERS, **INNER}
    rows = [sum(map(len, layers)) for layers in panels.values()]
    height = 0.26 * (sum(rows) + 9 * len(rows))
    figure, axes = pyplot.subplots(len(rows), figsize=(11, height), height_ratios=[n + 6 for n in rows], squeeze=False)
    for axis, (package, layers) in zip(axes[:, 0], panels.items(), strict=True):
        _draw_panel(axis, package, layers, unit_imports(package, edges), _lines(package, known))
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=110)


def _lines(package: str, known: Mapping[str, Path]) -> Counter[str]:
    lines: Counter[str] = Counter()
    for module, path in known.items():
        lines[_unit(package, module)] += len(path.read_text().splitlines())
    return lines


def _draw_panel(axis, package: str, layers: Layers, counts: Counter[tuple[str, str]], lines: Counter[str]) -> None:
    """Boxes by layer at the left, the matrix of imports at the right."""
    units = [(k, name) for k, layer in enumerate(layers) for name in layer]
    n, box = len(units), 7.0
    columns = {name: box + 0.7 + j for j, (_, name) in enumerate(units)}
    for i, (layer, name) in enumerate(units):
        colour = ("#cfe3f5", "#e8f1fa")[layer % 2]
        axis.add_patch(_rectangle((0, i + 0.06), box, 0.88, colour))
        axis.text(0.2, i + 0.5, name, va="center", weight="bold")
        axis.text(box - 0.2, i + 0.5, f"{lines[name]:,} lines", va="center", ha="right", color="#444444", fontsize=8)
        axis.add_patch(_rectangle((columns[name], i), 1, 1, "#9aa7b3"))
        for _, other in units:
            if count := counts[name, other]:
                shade = "#fde2b8" if count < 10 else "#f9bf62"
                axis.add_patch(_rectangle((columns[other], i), 1, 1, shade))
                axis.text(columns[other] + 0.5, i + 0.5, str(count), ha="center", va="center", fontsize=8)
        axis.text(columns[name] + 0.5, -0.2, name, rotation=60, ha="left", va="bottom", fontsize=8)
    for i in range(n + 1):
        axis.plot((box + 0.7, box + 0.7 + n), (i, i), color="#dddddd", lw=0.5, zorder=0)
        axis.plot((box + 0.7 + i, box + 0.7 + i), (0, n), color="#dddddd", lw=0.5, zorder=0)
    axis.set(xlim=(-0.1, box + n + 4), ylim=(n + 0.1, -5.5))
    title = f"sqa_jax.{package}" if package else "sqa_jax"
    axis.text(0, -3.2, f"{title}: layers from the top down", weight="bold", fontsize=11)
    axis.text(
        0,
        -1.9,
        "Numbers: how often the row imports the column.\nAll are right of the diagonal: imports point down.",
        fontsize=8,
    )
    axis.axis("off")


def _rectangle(corner: tuple[float, float], width: float, height: float, colour: str):
    from matplotlib.patches import Rectangle

    return Rectangle(corner, width, height, facecolor=colour, edgecolor="white", lw=0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="also draw the layers")
    arguments = parser.parse_args()
    if arguments.picture:
        draw(arguments.picture)
    lines = violations()
    print("\n".join(lines) or "imports point down only")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
