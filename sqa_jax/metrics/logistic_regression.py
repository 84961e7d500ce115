"""Binary logistic regression with an L2 penalty, fitted by L-BFGS."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import expit


def fit(
    features: sparse.csr_array, labels: Bool[np.ndarray, " N"], penalty: float = 1.0, max_iterations: int = 200
) -> tuple[Float[np.ndarray, " D"], float]:
    """Minimises Σ log(1 + exp(-y (w·x + b))) + penalty/2 |w|² with L-BFGS (Liu & Nocedal 1989), from zero.

    The bias has no penalty. Loss, scaling and stopping rule are those of scikit-learn's `LogisticRegression` with
    C = 1/penalty. Only columns that occur are fitted: the penalty holds every other weight at zero.

    Args:
      features: [N, D].

    Returns:
      weights [D] and bias; the score of x is w·x + b.
    """
    assert features.shape is not None  # scipy's stubs
    used = np.unique(features.indices)
    X = sparse.csr_array(features[:, used])
    y, n = labels.astype(float), len(labels)

    def loss_and_gradient(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weights, scores = parameters[:-1], X @ parameters[:-1] + parameters[-1]
        residuals = (expit(scores) - y) / n
        loss = (np.logaddexp(0, scores) - y * scores).sum() / n + penalty / n / 2 * (weights @ weights)
        return loss, np.append(X.T @ residuals + penalty / n * weights, residuals.sum())

    options = {"maxiter": max_iterations, "maxls": 50, "gtol": 1e-4, "ftol": 64 * np.finfo(float).eps}
    found = minimize(loss_and_gradient, np.zeros(len(used) + 1), method="L-BFGS-B", jac=True, options=options)
    weights = np.zeros(features.shape[1])
    weights[used] = found.x[:-1]
    return weights, float(found.x[-1])
