"""The trace of the square root of a product of covariances, Tr (Σ_v Σ_t)^{1/2}: exactly, by
iteration, as released.

    factor           L with L Lᵀ = Σ, for every spectrum: nearly singular and singular ones too
    root_trace       the sum of the roots of the eigenvalues of L_vᵀ Σ_t L_v, in float64
    newton_schulz    a root by matrix products alone
    five_rounds      what MIR's released code computes instead of a root
"""
import math

import torch
from torch import Tensor

from common.streams import gram

EPS = torch.finfo(torch.float64).eps


def cholesky(covariance: Tensor, least: float) -> Tensor | None:
    """L (D,D) with L Lᵀ = Σ; None if a dimension keeps too little of its variance given those before."""
    L, failed = torch.linalg.cholesky_ex(covariance)
    if failed or (L.diagonal().square() <= least * covariance.diagonal()).any():
        return None
    return L


def factor(covariance: Tensor, panel: int = 128) -> Tensor:
    """L (D,r) with L Lᵀ = Σ (D,D) of rank r: Cholesky's factor, with pivoting where Σ is close to
    singular. There each step takes the dimension with the most variance left, so columns fall in
    size; it ends where only rounding is left."""
    L = cholesky(covariance, least=1e-10)
    if L is not None:
        return L
    D, r = len(covariance), 0
    L, rows, a = torch.zeros_like(covariance), torch.arange(D, device=covariance.device), covariance
    rounding = 16 * D ** 0.5 * EPS * covariance.diagonal()                      # (D,)
    while len(rows):
        columns = a.new_zeros(panel, len(rows)).T                               # the next columns of L
        # What they leave of each variance.
        left = a.diagonal().clone()
        for j in range(panel):
            left[left <= rounding[rows]] = 0
            p = int(left.argmax())
            if left[p] == 0:
                columns = columns[:, :j]
                break
            column = (a[p] - columns[:, :j] @ columns[p, :j]) / left[p].sqrt()
            columns[:, j] = torch.where(left > 0, column, 0)
            left -= columns[:, j].square()
            left[p] = 0
        L[rows, r:r + columns.shape[1]] = columns
        r += columns.shape[1]
        # Go on with the dimensions that have variance left, and with what is left of it.
        keep = left > rounding[rows]
        rows, columns = rows[keep], columns[keep]
        a = torch.addmm(a[keep][:, keep], columns, columns.T, alpha=-1)
    return L[:, :r]


def root_trace(v: Tensor, t: Tensor) -> Tensor:
    """Tr (Σ_v Σ_t)^{1/2}: the sum of the roots of the eigenvalues of Lᵀ Σ_t L, L Lᵀ = Σ_v. Where
    rounding may hide small ones, a factor of Σ_t shows them."""
    L = factor(v)                                                               # (D,r)
    if L.numel() == 0:
        # All tokens are the same.
        return v.new_zeros(())
    total, error = sum_of_roots(L.T @ (t @ L))                       # of C
    if error <= 1e-9 * total:
        return total
    product = L.T @ factor(t)                                                   # (r,s)
    product = product if product.shape[0] >= product.shape[1] else product.T
    total, error = sum_of_roots(gram(product))
    if error <= 1e-9 * total:
        return total
    # Slower, but it loses no small value by squaring.
    return torch.linalg.svdvals(product).sum()


def sum_of_roots(squares: Tensor) -> tuple[Tensor, Tensor]:
    """(Σ √λ over the eigenvalues of a symmetric matrix ≥ 0, a bound on its rounding error)."""
    values = torch.linalg.eigvalsh(squares).clamp(min=0)                        # (r,) ascending
    # An eigenvalue is wrong by rounding of a row of its size: rows fall as the columns of L do. The
    # root of a wrong value is wrong by δ / (2√value), at most by √δ.
    delta = 8 * EPS * squares.norm(dim=1).sort().values
    return values.sqrt().sum(), (delta / (values.sqrt() + delta.sqrt())).sum()


def newton_schulz(a: Tensor, steps: int = 100) -> tuple[Tensor, float]:
    """(Y, residual): Y ≈ A^{1/2} of a (D,D) with real eigenvalues ≥ 0, by matrix products alone;
    the residual is ‖Y² − A‖ / ‖A‖ (Frobenius). Divided by its norm, A has eigenvalues in [0,1],
    where each step makes the residual smaller, until it is rounding: there the iteration ends.
    Roots below about 1e-8 of the largest are lost in it."""
    scale = a.norm()
    if scale == 0:
        return a, 0.0
    eye = torch.eye(len(a), dtype=a.dtype, device=a.device)
    a = a / scale
    y, z, root, residual = a, eye, a, math.inf
    for _ in range(steps):
        left = (y @ y - a).norm().item()
        if not left < residual:
            break
        root, residual = y, left
        t = (3 * eye - z @ y) / 2
        y, z = y @ t, t @ z                                                     # → A^{1/2}, A^{-1/2}
    return root * scale.sqrt(), residual


def five_rounds(a: Tensor) -> Tensor:
    """Y after the rounds that the released code's fast mode, its default, makes of A = Σ_v Σ_t
    (D,D) in float32: five times, from Y = A and Z = I,
        Y ← (Y + Z⁻¹A) / 2,   Z ← (Z + Y⁻¹A) / 2.
    This takes no root: without rounding Y ← (A + A) / 2 = A and Z ← (I + A⁻¹A) / 2 = I. So the
    distance of a set to itself is not 0, and distances below 0 are possible. With rounding it
    stays there only while A is well conditioned: tr Y / tr A was 1.000 at a condition of 1e2, .5 to
    .7 at 1e4, .2 to .8 at 1e6 and 1/16 at 1e10, where every round but the first halves Y. It is
    good for comparing with numbers that were published with it, and for nothing else."""
    y, z = a, torch.eye(len(a), dtype=a.dtype, device=a.device)
    try:
        for _ in range(5):
            y = (y + torch.linalg.inv(z) @ a) / 2
            z = (z + torch.linalg.inv(y) @ a) / 2
    except torch.linalg.LinAlgError:
        raise ValueError("the released arithmetic has to invert a matrix that is singular: use "
                         "mode exact") from None
    return y
