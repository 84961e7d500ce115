"""The study: a matrix of arms × adapters × students × seeds, hypothesis tests, costs, and a report.

- `matrix`: from a configuration to `StudyRun`s and the configuration of each. `check`: what is refused before any run.
- `run`: `run_study`, the verb `python -m sqa_jax.study`. `execute`: trains and evaluates one run of the matrix.
- `systems`, `comparisons`, `summary`, `explain`: from finished runs to results.json. `hypotheses`, `published`: data.
- `report`, `plots`, templates/: from results.json to report.md and report.html.
"""
