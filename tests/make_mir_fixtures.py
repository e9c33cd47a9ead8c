"""Writes tests/fixtures/mir/distances.json: Fréchet distances of small token sets, by scipy.linalg.sqrtm.

Run by hand, where scipy and mpmath are installed (the tests need neither): python
tests/make_mir_fixtures.py Nothing here reads the code under test. A case is a recipe (seeds of
numpy's default_rng, shapes, a spectrum), so that no tokens are stored. `sqrtm` is eq. (3) with
scipy's square root of Σ_v Σ_t; where that matrix is singular, sqrtm is no better than about 1e-8
(it warns), so `value` is beside it: the same formula in 60 digits (mpmath).
"""
import json
import warnings
from pathlib import Path

import mpmath
import numpy as np
import scipy

OUT = Path(__file__).resolve().parent / "fixtures" / "mir" / "distances.json"
# n, m: tokens; d: dimensions; rank: of both sets; decay: decades that their scales span
CASES = {
    "more tokens than dimensions": dict(n=90, m=70, d=16),
    "as many tokens as dimensions": dict(n=16, m=16, d=16),
    "fewer tokens than dimensions": dict(n=9, m=7, d=16),
    "few and many": dict(n=5, m=80, d=16),
    "two tokens": dict(n=2, m=2, d=8),
    "both of rank 3": dict(n=60, m=50, d=16, rank=3),
    "scales from 1 to 1e-4": dict(n=90, m=70, d=12, decay=4),
    "one dimension a thousand times the others": dict(n=90, m=70, d=12, massive=1e3),
    "float32": dict(n=90, m=70, d=16, dtype="float32"),
    "bfloat16": dict(n=90, m=70, d=16, dtype="bfloat16"),
    "float32, rank 3": dict(n=60, m=50, d=12, rank=3, dtype="float32"),
}


def tokens(seed, n, d, rank=None, decay=0, massive=1, dtype="float64"):
    """(n,d) float64; float32 and bfloat16 (cut, not rounded) values are exact in it."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) if rank is None else rng.standard_normal((n, rank)) @ rng.standard_normal((rank, d))
    x = x * np.logspace(0, -decay, d) * np.where(np.arange(d) == 0, massive, 1) * (1 + seed % 2) + 0.3 * (seed % 2)
    if dtype != "float64":
        bits = x.astype(np.float32).view(np.uint32)
        x = (bits & (0xffff0000 if dtype == "bfloat16" else 0xffffffff)).astype(np.uint32).view(np.float32)
    return x.astype(np.float64)


def by_sqrtm(x, y):
    a, b = np.cov(x.T), np.cov(y.T)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = scipy.linalg.sqrtm(a @ b)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a)
                 + np.trace(b) - 2 * np.trace(root).real)


def in_60_digits(x, y):
    """The same with Σ singular values of A Bᵀ for the centred tokens A, B: the roots of the
    eigenvalues of Σ_v Σ_t."""
    mpmath.mp.dps = 60
    sets, means, traces = [], [], []
    for t in (x, y):
        t = mpmath.matrix(t.tolist())
        mean = [mpmath.fsum(t[i, j] for i in range(t.rows)) / t.rows for j in range(t.cols)]
        c = mpmath.matrix(t.rows, t.cols)
        for i in range(t.rows):
            for j in range(t.cols):
                c[i, j] = (t[i, j] - mean[j]) / mpmath.sqrt(t.rows - 1)
        sets.append(c.T * c if t.rows > t.cols else c)
        means.append(mean)
        traces.append(mpmath.fsum(v * v for v in c))
    factors = []
    for s in sets:          # L with L Lᵀ = Σ
        if s.rows == s.cols and s == s.T:
            values, vectors = mpmath.eigsy(s)
            factors.append(vectors * mpmath.diag([mpmath.sqrt(max(v, 0)) for v in values]))
        else:
            factors.append(s.T)
    product = factors[0].T * factors[1]
    product = product if product.rows <= product.cols else product.T
    roots = mpmath.fsum(mpmath.sqrt(max(v, 0))
                        for v in mpmath.eigsy(product * product.T, eigvals_only=True))
    between = mpmath.fsum((a - b) ** 2 for a, b in zip(*means))
    return float(between + traces[0] + traces[1] - 2 * roots)


if __name__ == "__main__":
    out = []
    for i, (name, c) in enumerate(CASES.items()):
        recipe = {k: v for k, v in c.items() if k not in ("n", "m")}
        x, y = tokens(2 * i, c["n"], **recipe), tokens(2 * i + 1, c["m"], **recipe)
        value, sqrtm = in_60_digits(x, y), by_sqrtm(x, y)
        print(f"{name:45} {value:.12g}   sqrtm {sqrtm:.12g} ({abs(sqrtm - value) / value:.0e})")
        out.append({"name": name, **c, "seeds": [2 * i, 2 * i + 1], "value": value, "sqrtm": sqrtm})
    OUT.write_text(json.dumps({"scipy": scipy.__version__, "cases": out}, indent=1) + "\n")
