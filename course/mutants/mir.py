"""Wrong and right solutions of MIR; see vista.py for the format."""
MEAN = "    centre = mean(tokens)"
COV = "    return Moments(centre, gram(tokens, centre, products) / (len(tokens) - 1))"
ROOT = "        root, residual = root_trace(v.covariance, t.covariance), 0.0"
FID = "    between = (v.mean - t.mean).pow(2).sum() + v.covariance.trace() + t.covariance.trace() - 2 * root"
CLAMP = "        between = between.clamp(min=0)"
NORMS = "    norms = tokens.norm(dim=1)"
FAR = "    far = (norms - median).abs() > width"
OUT = '    return tokens[~far] if outliers == "drop" else torch.where(far[:, None], tokens.median(0).values, tokens)'
LOG = "    return math.log10(total) if total else -math.inf"
DOUBLE = "        vision, text = vision.double(), text.double()"
ALPHA = "        alpha = 1 / text.norm(dim=1).mean() if normalise else 1.0"
BOTH = "        v, t = (moments(replace_outliers(alpha * x, outliers)) for x in (vision, text))"
RATE = "    return log_sum(distances), distances"
KEEP = "            f = f[(norms - self.middle).abs() <= self.width]"
STREAM_N = "        n = self.n - self.far if self.drop else self.n"
STREAM_M = "        return self.centre + mean, (self.scatter - n * torch.outer(mean, mean)) / (n - 1)"
REPLACE = "        self.scatter += self.far * torch.outer(shift, shift)"

WRONG = [
    ("divided by n: eq. (4) has n − 1", "mean_and_covariance", COV, COV.replace("(len(tokens) - 1)", "len(tokens)")),
    ("the sum of squares, not divided", "mean_and_covariance", COV, COV.replace(" / (len(tokens) - 1)", "")),
    ("the mean is not taken off", "mean_and_covariance", COV, COV.replace("tokens, centre,", "tokens, 0 * centre,")),
    ("the median for the mean", "mean_and_covariance", MEAN, "    centre = tokens.double().median(0).values"),
    ("covariance over tokens instead of dimensions", "mean_and_covariance", COV,
     "    return Moments(centre, torch.cov(tokens.double()))"),
    ("variances alone: the covariance is a matrix", "mean_and_covariance", COV,
     "    return Moments(centre, torch.diag(tokens.double().var(0)))"),
    ("correlations for covariances", "mean_and_covariance", COV,
     "    return Moments(centre, torch.corrcoef(tokens.double().T))"),
    ("one mean for all dimensions", "mean_and_covariance", MEAN,
     "    centre = mean(tokens).mean().expand(tokens.shape[1]).clone()"),
    ("|μ_v − μ_t| without its square", "shifted_sets", FID, FID.replace(".pow(2).sum()", ".norm()")),
    ("the mean over dimensions of the squared shift", "shifted_sets", FID,
     FID.replace(".pow(2).sum()", ".pow(2).mean()")),
    ("the shift is left out", "shifted_sets", FID, FID.replace("(v.mean - t.mean).pow(2).sum()", "0")),
    ("the norms of the means are compared, not the means", "shifted_sets", FID,
     FID.replace("(v.mean - t.mean).pow(2).sum()", "(v.mean.norm() - t.mean.norm()).pow(2)")),
    ("absolute differences of means", "shifted_sets", FID, FID.replace(".pow(2).sum()", ".abs().sum()")),
    ("twice the shift", "shifted_sets", FID, FID.replace("(v.mean", "2 * (v.mean")),
    ("half of the shift", "shifted_sets", FID, FID.replace("(v.mean", "0.5 * (v.mean")),
    ("the root of the trace for the trace of the root", "root", ROOT,
     "        root, residual = (v.covariance @ t.covariance).trace().sqrt(), 0.0"),
    ("the root of every entry: a matrix root is meant", "root", ROOT,
     "        root, residual = (v.covariance @ t.covariance).diagonal().clamp(min=0).sqrt().sum(), 0.0"),
    ("no root at all: the released code's fast mode", "root", ROOT,
     "        root, residual = (v.covariance @ t.covariance).trace(), 0.0"),
    ("eigenvalues of a product that is taken for symmetric", "root", ROOT,
     "        root, residual = torch.linalg.eigvalsh(v.covariance @ t.covariance).clamp(min=0).sqrt().sum(), 0.0"),
    ("the product of the roots' traces", "root", ROOT,
     "        root, residual = (v.covariance.trace() * t.covariance.trace()).sqrt(), 0.0"),
    ("the covariances' roots multiplied: they do not commute", "root", ROOT,
     "        half = [torch.linalg.eigh(m.covariance) for m in (v, t)]\n"
     "        half = [q * w.clamp(min=0).sqrt() @ q.T for w, q in half]\n"
     "        root, residual = (half[0] @ half[1]).trace(), 0.0"),
    ("elementwise product of the covariances", "root", ROOT,
     "        root, residual = torch.linalg.eigvalsh(v.covariance * t.covariance).clamp(min=0).sqrt().sum(), 0.0"),
    ("the 2 in front of the root is missing", "root", FID, FID.replace("2 * root", "root")),
    ("plus the root", "root", FID, FID.replace("- 2 * root", "+ 2 * root")),
    ("one covariance twice", "root", FID, FID.replace("t.covariance.trace()", "v.covariance.trace()")),
    ("variances alone: the root of their products", "root", ROOT,
     "        root, residual = (v.covariance.diagonal() * t.covariance.diagonal()).sqrt().sum(), 0.0"),
    ("the distance's own root is returned", "root", CLAMP, "        between = between.clamp(min=0).sqrt()"),
    ("a diagonal of 1e-3 is added, as some FID codes do", "few_tokens", ROOT,
     "        eye = 1e-3 * torch.eye(len(v.mean), dtype=torch.float64)\n"
     "        root, residual = root_trace(v.covariance + eye, t.covariance + eye), 0.0"),
    ("Cholesky alone fails where Σ is singular", "few_tokens", ROOT,
     "        Lv, Lt = torch.linalg.cholesky(v.covariance), torch.linalg.cholesky(t.covariance)\n"
     "        root, residual = torch.linalg.svdvals(Lv.T @ Lt).sum(), 0.0"),
    ("roots of eigenvalues below 0 are NaN", "few_tokens", ROOT,
     "        w = torch.linalg.eigvals(v.covariance @ t.covariance).real\n"
     "        root, residual = w.sqrt().sum(), 0.0"),
    ("α of the image tokens: the text decides the scale", "scale_of_text", ALPHA,
     ALPHA.replace("text.norm", "vision.norm")),
    ("α is the norm, not 1 over it", "scale_of_text", ALPHA, ALPHA.replace("1 / text", "text")),
    ("α is 1 / norm of the mean token", "scale_of_text", ALPHA,
     ALPHA.replace("text.norm(dim=1).mean()", "text.mean(0).norm()")),
    ("α is 1 / mean squared norm", "scale_of_text", ALPHA,
     ALPHA.replace("norm(dim=1).mean()", "norm(dim=1).pow(2).mean()")),
    ("α is missing", "scale_of_text", ALPHA, "        alpha = 1.0"),
    ("the text alone is scaled", "scale_of_text", BOTH, BOTH.replace("alpha * x", "(alpha if x is text else 1) * x")),
    ("the image alone is scaled", "scale_of_text", BOTH,
     BOTH.replace("alpha * x", "(alpha if x is vision else 1) * x")),
    ("every token is scaled to norm 1", "scale_of_text", BOTH,
     BOTH.replace("alpha * x", "x / x.norm(dim=1, keepdim=True)")),
    ("normalise=False is ignored", "scale_of_text", ALPHA, ALPHA.replace(" if normalise else 1.0", "")),
    ("norms over tokens instead of dimensions", "scale_of_text", ALPHA, ALPHA.replace("dim=1", "dim=0")),
    ("outliers take the mean", "outliers_become_the_median", OUT,
     OUT.replace("tokens.median(0).values", "tokens.mean(0)")),
    ("outliers take the median of all numbers", "outliers_become_the_median", OUT,
     OUT.replace("tokens.median(0).values", "tokens.median()")),
    ("outliers become 0", "outliers_become_the_median", OUT, OUT.replace("tokens.median(0).values", "0 * tokens")),
    ("outliers are scaled to the median norm", "outliers_become_the_median", OUT,
     OUT.replace("tokens.median(0).values", "tokens * (median / norms)[:, None]")),
    ("outliers stay", "outliers_become_the_median", OUT,
     OUT.replace("torch.where(far[:, None], tokens.median(0).values, tokens)", "tokens")),
    ("everything but the outliers is replaced", "outliers_become_the_median", OUT,
     OUT.replace("where(far", "where(~far")),
    ("the median of the tokens that are left", "outliers_become_the_median", OUT,
     OUT.replace("tokens.median(0)", "tokens[~far].median(0)")),
    ('"drop" replaces', "outliers_are_dropped", OUT, OUT.replace("tokens[~far] if outliers == \"drop\" else ", "")),
    ('"drop" keeps the outliers and drops the others', "outliers_are_dropped", OUT,
     OUT.replace("tokens[~far]", "tokens[far]")),
    ('"drop" leaves zeros', "outliers_are_dropped", OUT, OUT.replace("tokens[~far]", "tokens * ~far[:, None]")),
    ("1 std for 3", "threshold", FAR, FAR.replace("width", "width / 3")),
    ("2 std for 3", "threshold", FAR, FAR.replace("width", "width * 2 / 3")),
    ("6 std for 3", "threshold", FAR, FAR.replace("width", "width * 2")),
    ("only norms that are too large", "threshold", FAR, FAR.replace(".abs()", "")),
    ("only norms that are too small", "threshold", FAR, FAR.replace("(norms - median).abs()", "(median - norms)")),
    ("ℓ1 norms", "threshold", NORMS, NORMS.replace("dim=1", "dim=1, p=1")),
    ("three times the median", "threshold", FAR, FAR.replace("width", "3 * median")),
    ("the sum of logarithms", "logarithm", RATE, "    return sum(map(math.log10, distances)), distances"),
    ("the mean over layers", "logarithm", RATE,
     RATE.replace("log_sum(distances)", "log_sum([d / len(distances) for d in distances])")),
    ("the natural logarithm", "logarithm", LOG, LOG.replace("math.log10", "math.log")),
    ("no logarithm", "logarithm", LOG, "    return total"),
    ("the last layer alone", "logarithm", RATE, RATE.replace("log_sum(distances)", "log_sum(distances[-1:])")),
    ("the largest layer", "logarithm", RATE, RATE.replace("log_sum(distances)", "log_sum([max(distances)])")),
    ("log10 of 1 + the sum", "logarithm", LOG, "    return math.log10(1 + total)"),
    ("float32 moments: they cancel", "precision", DOUBLE, "", MEAN, "    centre = tokens.mean(0)", COV,
     "    part = tokens - centre\n    return Moments(centre.double(), (part.T @ part / (len(tokens) - "
     "1)).bfloat16().double() if tokens.dtype == torch.float32 else (part.T @ part / (len(tokens) - 1)))"),
    ("inputs are scaled in place", "precision", ALPHA,
     ALPHA + "\n        layers[k - 1][0].mul_(1.5 if layers[k - 1][0].dtype == torch.float32 else 1)"),
    ("outliers are left in the stream", "bonus_streaming", KEEP, ""),
    ("the stream divides by all tokens when it drops some", "bonus_streaming", STREAM_N, "        n = self.n"),
    ("the stream divides by n", "bonus_streaming", STREAM_M, STREAM_M.replace("/ (n - 1)", "/ n")),
    ("the stream's centre is not put back", "bonus_streaming", STREAM_M,
     STREAM_M.replace("self.centre + mean", "mean")),
    ("the median counts once, however many outliers", "bonus_streaming", REPLACE,
     REPLACE.replace("self.far * ", "0 * ")),
]

RIGHT = [
    ("torch.cov and eigenvalues of the product", "mir", '''
def moments(tokens, products=torch.float64):
    x = tokens.double()
    return Moments(x.mean(0), torch.cov(x.T))


def distance(v, t, mode="exact"):
    w = torch.linalg.eigvals(v.covariance @ t.covariance).real
    w = w[w > 1e-13 * w.max()]
    between = (v.mean - t.mean).square().sum() + (v.covariance + t.covariance).trace() - 2 * w.sqrt().sum()
    return max(between.item(), 0.0), 0.0


def frechet_distance(x, y, mode="exact"):
    return distance(moments(x), moments(y))[0]
'''),
    ("loops for moments and outliers", "mir", '''
def moments(tokens, products=torch.float64):
    n = len(tokens)
    mu = sum(x.double() for x in tokens) / n
    return Moments(mu, sum(torch.outer(x - mu, x - mu) for x in tokens.double()) / (n - 1))


def replace_outliers(tokens, outliers):
    norms = [(x @ x).sqrt().item() for x in tokens]
    middle = sorted(norms)[(len(norms) - 1) // 2]
    mean = sum(norms) / len(norms)
    std = math.sqrt(sum((n - mean) ** 2 for n in norms) / (len(norms) - 1))
    typical, rows = tokens.median(0).values, []
    for x, n in zip(tokens, norms):
        if abs(n - middle) <= 3 * std:
            rows.append(x)
        elif outliers == "median":
            rows.append(typical)
    return torch.stack(rows)


def log_sum(distances):
    return math.log(sum(distances)) / math.log(10)
'''),
    ("einsum, and a symmetric eigenproblem", "mir", '''
def moments(tokens, products=torch.float64):
    x = tokens.double()
    mu = torch.einsum("nd->d", x) / len(x)
    return Moments(mu, torch.einsum("nd,ne->de", x - mu, x - mu) / (len(x) - 1))


def distance(v, t, mode="exact"):
    w, q = torch.linalg.eigh(v.covariance)
    keep = w > 1e-14 * w[-1]
    L = q[:, keep] * w[keep].sqrt()
    squares = torch.linalg.eigvalsh(L.T @ t.covariance @ L)
    squares = squares[squares > 1e-14 * squares[-1]]
    between = (v.mean - t.mean).norm() ** 2 + v.covariance.trace() + t.covariance.trace() - 2 * squares.sqrt().sum()
    return between.clamp(min=0).item(), 0.0
'''),
]
