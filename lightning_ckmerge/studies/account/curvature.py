"""The curvature of a loss at some weights, from products of its Hessian with vectors alone.

`curvlinops-for-pytorch` offers the same two estimates, but builds its operator from a model, a loss function and pairs
of inputs and targets. A LightningModule's loss is whatever its ``validation_step`` returns, so the products come from
two backward passes through that, and SciPy's Lanczos does the rest.

Letters: P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh  # type: ignore[import-untyped]

Array = Any
Product = Callable[[Array], Array]
# Smaller Hessians are written out.
MAX_DENSE = 24
NUM_LANCZOS = 20
NUM_RESTARTS = 2
TOLERANCE = 1e-2
NUM_PROBES = 8
# At most, of both estimates.
MAX_PRODUCTS = NUM_LANCZOS * (1 + NUM_RESTARTS) + NUM_PROBES


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """Of a Hessian.

    Args:
        top: Its largest eigenvalue; ``None`` where Lanczos' method did not come to one.
        trace: Its trace.
        trace_error: The estimate's standard error; 0 where the trace is exact.
        num_products: What both took.
    """

    top: float | None
    trace: float
    trace_error: float
    num_products: int


def find_curvature(product: Product, num_parameters: int, *, seed: int = 0) -> Curvature:
    """Return the largest eigenvalue and the trace of a symmetric matrix.

    Args:
        product: Returns the matrix times a vector, both ``(P,)``.
        num_parameters: P.
        seed: Of the probes. Two matrices with equal seeds see equal probes, so that their traces can be compared.

    Source:
        Largest eigenvalue: ARPACK's restarted Lanczos method, to 1 %. Trace: Hutchinson 1990, with 8 probes of random
        signs, whose mean error is known from their spread.

    >>> found = find_curvature(lambda v: np.arange(1.0, 101.0) * v, 100)
    >>> round(found.top, 1), found.trace, found.trace_error
    (100.0, 5050.0, 0.0)
    """
    num_products = 0

    def counted(v: Array) -> Array:
        nonlocal num_products
        num_products += 1
        return np.asarray(product(np.asarray(v).reshape(-1)))

    if num_parameters <= MAX_DENSE:
        columns = np.stack([counted(v) for v in np.eye(num_parameters)])
        eigenvalues = np.linalg.eigvalsh((columns + columns.T) / 2)
        return Curvature(
            top=float(eigenvalues[-1]), trace=float(np.trace(columns)), trace_error=0.0, num_products=num_products
        )
    top = _largest(counted, num_parameters, seed)
    random = np.random.default_rng(seed)
    probes = [random.choice([-1.0, 1.0], num_parameters) for _ in range(NUM_PROBES)]
    traces = [float(v @ counted(v)) for v in probes]
    return Curvature(
        top=top,
        trace=float(np.mean(traces)),
        trace_error=float(np.std(traces, ddof=1)) / math.sqrt(NUM_PROBES),
        num_products=num_products,
    )


def _largest(product: Product, size: int, seed: int) -> float | None:
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    start = np.random.default_rng(seed).standard_normal(size)
    try:
        found = eigsh(
            operator,
            k=1,
            which="LA",
            v0=start,
            ncv=NUM_LANCZOS,
            tol=TOLERANCE,
            maxiter=NUM_RESTARTS + 1,
            return_eigenvectors=False,
        )
    except ArpackNoConvergence as error:
        found = error.eigenvalues
    return float(found[0]) if len(found) else None
