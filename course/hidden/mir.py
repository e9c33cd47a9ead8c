"""MIR, eq. (1) to (4)."""
import torch

from course.hidden import item
from course.hidden.tools import randn, size


def tokens(g, n, D, even=False):
    """(n,D) correlated tokens around a mean; even: of norms 1 to 1.1, without outliers."""
    x = randn(g, n, D) @ randn(g, D, D) + randn(g, D)
    if even:
        scale = 1 + torch.rand(n, 1, generator=g, dtype=torch.float64) / 10
        x = x / x.norm(dim=1, keepdim=True) * scale
    return x


@item(10)
def mean_and_covariance(f, g):
    """μ is the mean of the tokens, Σ = Σ_i (f_i − μ)(f_i − μ)ᵀ / (n − 1), (D,D)."""
    found = f.moments(tokens(g, size(g, 30, 50), size(g, 4, 7)))
    return found.mean, found.covariance


@item(10, tolerance=1e-6)
def shifted_sets(f, g):
    """A set and the same set moved by s are at distance |s|²; the covariances add nothing."""
    x = tokens(g, size(g, 30, 50), 5)
    return f.frechet_distance(x, x + randn(g, 5))


@item(20, tolerance=1e-6, view=lambda r: [r[0] - r[1]])
def root(f, g):
    """Tr (Σ_v + Σ_t − 2 (Σ_v Σ_t)^{1/2}) takes the matrix root, not one of the trace or entries."""
    x, y = tokens(g, size(g, 30, 50), 5), tokens(g, size(g, 30, 50), 5)
    return f.frechet_distance(x, y), (x.mean(0) - y.mean(0)).pow(2).sum()


@item(5, tolerance=1e-5)
def few_tokens(f, g):
    """With fewer tokens than dimensions Σ is singular; the distance stays exact and at least 0."""
    x, y = tokens(g, 4, size(g, 8, 12)), tokens(g, 30, 5)
    pairs = (x, 2 * x + 1), (x - x.mean(0), torch.cat([x, x]) - x.mean(0))
    return [f.frechet_distance(*pair) for pair in pairs], abs(f.frechet_distance(y, y.clone())) < 1e-8


@item(15, tolerance=1e-6, view=lambda r: [r[0] / r[1], r[2] / r[0], r[3] / r[4]])
def scale_of_text(f, g):
    """α = 1 / mean ‖t‖ over the text tokens scales both sets of a layer, if normalise is True."""
    n, D = size(g, 30, 50), size(g, 4, 6)
    v, t = 3 * tokens(g, n, D, even=True), 2 * tokens(g, n + 7, D, even=True)
    alpha = 1 / t.norm(dim=1).mean()
    scaled, larger, plain = [f.modality_integration_rate([(s * v, s * t)], normalise=on)[1][0]
                             for s, on in ((1, True), (7, True), (1, False))]
    return scaled, f.frechet_distance(alpha * v, alpha * t), larger, plain, f.frechet_distance(v, t)


@item(10, view=lambda r: [r[0] - r[1], r[2], r[3]])
def outliers_become_the_median(f, g):
    """An outlier becomes the median of each dimension over all tokens; the others stay."""
    x = tokens(g, size(g, 50, 70), 5, even=True)
    x[3], x[8] = 40 * x[3], 30 * x[8]
    kept = torch.ones(len(x)).bool()
    kept[[3, 8]] = False
    out = f.replace_outliers(x.clone(), "median")
    return out[kept], x[kept], out[3], out[8]


@item(5, view=lambda r: [torch.tensor(r[0].shape), r[0].mean(0)])
def outliers_are_dropped(f, g):
    """outliers="drop" leaves the outliers out, and keeps all others in their order."""
    x = tokens(g, size(g, 50, 70), 5, even=True)
    x[3] *= 40
    return f.replace_outliers(x, "drop")


@item(10, view=lambda r: [torch.tensor([float(len(x)) for x in r])])
def threshold(f, g):
    """Far is |norm − median| > 3 std, on both sides, in ℓ2 norms, with the std of all norms."""
    n, out = size(g, 60, 80), []
    for low, high in ((0, 0), (0.31, 0), (0.45, 0), (0, 0.31), (0, 0.5), (0.25, 0.25)):
        norms = 1 + 0.1 * torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0).double()
        norms[0], norms[1], norms[2:4] = 1 - low, 1 + high, 1.0
        unit = torch.nn.functional.normalize(randn(g, n, 3))
        out.append(f.replace_outliers(unit * norms[:, None], "drop"))
    return out


@item(10, view=lambda r: [r[0] - sum(r[1:]).log10()])
def logarithm(f, g):
    """MIR is the log10 of the sum over layers, not the sum of logarithms, nor their mean."""
    layers = [(tokens(g, 30, 5), tokens(g, 40, 5)) for _ in range(size(g, 2, 4))]
    return f.modality_integration_rate(layers)


@item(5, tolerance=1e-5, view=lambda r: [r[0] / r[1], *(a - b for a, b in zip(r[2:4], r[4:]))])
def precision(f, g):
    """Inputs of any dtype are computed in float64, and stay as they are."""
    x, y = ((100 + tokens(g, 40, 5, even=True)).float() for _ in range(2))
    kept = x.clone(), y.clone()
    exact = f.modality_integration_rate([(x.double(), y.double())])[1][0]
    return f.modality_integration_rate([(x, y)])[1][0], exact, x, y, kept


@item(10, tolerance=1e-6)
def bonus_streaming(f, g):
    """Bonus: Stream finds the moments without outliers in passes, and keeps no token."""
    x = tokens(g, size(g, 60, 80), 5, even=True).float()
    x[3] *= 40
    out = []
    for drop in (True, False):
        stream, step = f.Stream(5, torch.device("cpu"), drop), 0
        while step < 2 or stream.median is not None:
            for part in x.split(17):
                stream.add(part, step)
            stream.close("tokens", step)
            step += 1
        out.append(stream.mean_and_covariance())
    return out
