"""Metrics of predictions and of cost; everything here runs without JAX.

- `leaderboard`: predictions files, accuracy by ScienceQA's columns. `intervals`, `paired_tests`: confidence
  intervals, McNemar's test, the bootstrap, Holm's correction.
- `explanations`: BLEU, ROUGE-L, METEOR, embedding similarity of generated explanations.
- `costs`: tokens, FLOPs and US dollars of a teacher, of training and of inference; the look-ups of prices.
- `bag_of_words`: the baseline, on `feature_hashing` and `logistic_regression`.
"""
