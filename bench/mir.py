"""Time and error of the exact Fréchet distance beside scipy's square root and the released code's
fast mode, and the peak memory of measuring a model in passes beside keeping every token.

    python -m bench.mir                            D = 1024 and 2048, 20,000 tokens a set, four spectra; memory
    python -m bench.mir --sizes 512 --tokens 8000  smaller; the default takes about ten minutes
    python -m bench.mir --ckpt out/toy             also every layer of a checkpoint, on its own tokens

A set is float32 tokens (n,D), a random rotation of independent dimensions whose scales are
    mild         1/√i                   1e-2, 1e-5   from 1 down to it, evenly in the logarithm
    rank         1 for half of the dimensions, 0 for the others
Each side goes from tokens to distance: `exact` is mir.py's, `scipy` sqrtm on covariances in
float64, `released` five rounds of two inversions in float32 (`five_rounds`, hence its error),
`newton-schulz` a real iteration for it. Times are CPU seconds of this process on one thread, the
least of --runs; sides take turns. Errors are relative, against singular values from QR factors of
the tokens in float64. scipy is optional. Memory is the peak of a process beyond model and inputs.
"""
import os
import time
from dataclasses import dataclass

# One thread a side. Libraries read this when they are imported.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
import torch

import mir
from bench.common import in_own_process, memory, reset_peak
from common.flags import option, parse, run
from common.roots import five_rounds
from data import Batch
from hub.checkpoint import checkpoint_folder, load_model
from hub.pairs import choose_pairs, pair_batches
from model import Decoder, DecoderConfig, Llava, Projector, VisionConfig, ViT

try:
    from scipy.linalg import sqrtm
except ImportError:
    sqrtm = None

PAIRS, IMAGE_TOKENS, LAYERS, WIDTH = (10, 50, 100), 64, 8, 256


# ----------------------------------------------------------------------------------- time and error
def scales(spectrum: str, d: int) -> torch.Tensor:
    """Standard deviations (D,) before the rotation."""
    if spectrum == "mild":
        return torch.arange(1, d + 1) ** -0.5
    if spectrum == "rank":
        return (torch.arange(d) < d // 2).float()
    return torch.logspace(0, torch.tensor(float(spectrum)).log10().item(), d)


def tokens(n: int, d: int, seed: int, spectrum: str) -> torch.Tensor:
    """(n,d) float32."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=g)).Q
    x = torch.randn(n, d, generator=g) @ (scales(spectrum, d)[:, None] * basis)
    return x + 0.02 * torch.randn(d, generator=g)


def truth(x, y) -> float:
    """The distance from QR factors of the centred tokens: no covariance is formed."""
    factors, rest = [], (x.double().mean(0) - y.double().mean(0)).pow(2).sum()
    for t in (x.double(), y.double()):
        centred = (t - t.mean(0)) / (len(t) - 1) ** 0.5
        rest += centred.pow(2).sum()
        factors.append(torch.linalg.qr(centred, mode="r").R)
    return (rest - 2 * torch.linalg.svdvals(factors[0] @ factors[1].T).sum()).item()


def with_root(x, y, dtype, root) -> float:
    """The distance as the released code writes it down, in a dtype, with root(A) for Tr A^{1/2}."""
    means, covariances = [], []
    for t in (x, y):
        t = t.to(dtype)
        mean = t.mean(0)
        centred = t - mean
        means.append(mean)
        covariances.append(centred.T @ centred / (len(t) - 1))
    a, b = covariances
    return ((means[0] - means[1]).pow(2).sum() + a.trace() + b.trace() - 2 * root(a @ b)).item()


SIDES = {
    "exact": lambda x, y: mir.frechet_distance(x, y),
    "released": lambda x, y: with_root(x, y, torch.float32, lambda a: five_rounds(a).trace()),
    "newton-schulz": lambda x, y: mir.frechet_distance(x, y, "newton-schulz"),
    "scipy": lambda x, y: with_root(x, y, torch.float64, lambda a: sqrtm(a.numpy()).real.trace()),
}


def compare(title: str, x, y, runs: int) -> None:
    """Print one row a side."""
    wanted = truth(x, y)
    times, errors = {name: [] for name in SIDES}, {}
    for turn in range(runs):
        for name, side in SIDES.items():
            if name == "scipy" and sqrtm is None or turn > 0 and name in ("scipy", "newton-schulz"):
                continue
            start = time.process_time()
            try:
                value = side(x, y)
            except ValueError:                                  # the released code: singular
                value = float("nan")
            times[name].append(time.process_time() - start)
            errors[name] = abs(value - wanted) / wanted
    print(f"\n{title}, {len(x)} + {len(y)} tokens, distance {wanted:.6g}")
    print(f"{'':16}{'seconds':>10}{'× exact':>10}{'error':>10}")
    for name, seconds in times.items():
        if seconds:
            print(f"{name:16}{min(seconds):10.3f}{min(seconds) / min(times['exact']):10.2f}{errors[name]:10.0e}")
        else:
            print(f"{name:16}  not installed")


def compare_checkpoint(ckpt: str, runs: int) -> None:
    """Compare on every layer of a checkpoint, on 100 pairs of the toy's, at the text's scale."""
    folder = checkpoint_folder(ckpt)
    samples, images = choose_pairs(folder, None, None, None, 100, None)
    model = load_model(folder).eval()
    for k, (vision, text) in enumerate(kept(model, pair_batches(folder, samples, images)), 1):
        alpha = 1 / text.norm(dim=1).mean()
        x, y = (mir.replace_outliers(alpha * f, "median") for f in (vision, text))
        compare(f"{folder}, layer {k}, D = {x.shape[1]}", x, y, runs)


def kept(model, batches) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(vision, text) tokens of every layer, all of them, as the released script keeps them."""
    depth = model.language_model.config.num_hidden_layers
    layers = [([], []) for _ in range(depth)]

    def keep(k, vision, text):
        layers[k - 1][0].append(vision)
        layers[k - 1][1].append(text)
    with torch.no_grad():
        for batch in batches:
            mir.visit(model, batch, keep)
    return [(torch.cat(v), torch.cat(t)) for v, t in layers]


# ------------------------------------------------------------------------------------------- memory
class Pairs:
    """n pairs of random pixels and words, each batch made when it is asked for."""
    def __init__(self, n: int):
        self.n = n

    def __len__(self) -> int:
        return self.n // 5

    def __getitem__(self, i: int) -> Batch:
        if i >= len(self):
            raise IndexError(i)
        g = torch.Generator().manual_seed(i)
        ids = torch.randint(0, 1000, (5, 2 * IMAGE_TOKENS), generator=g)
        image = (torch.arange(2 * IMAGE_TOKENS) < IMAGE_TOKENS).expand(5, -1)
        return Batch(ids, ids.masked_fill(image, -100), image, torch.ones_like(image),
                     torch.randn(5, 3, 32, 32, generator=g), torch.ones(5, dtype=torch.bool),
                     torch.zeros(5, dtype=torch.bool))


def keep_everything(model, batches) -> float:
    return mir.modality_integration_rate(kept(model, batches))[0]


def in_passes(model, batches) -> float:
    return mir.measure(model, batches)["mir"]


def peak(side, n: int) -> tuple[float, float, float]:
    """Return (MIR, seconds, peak MiB) of n pairs on a random model."""
    torch.manual_seed(0)
    vision = VisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                          num_attention_heads=2, image_size=32, patch_size=4)
    decoder = DecoderConfig(vocab_size=1000, hidden_size=WIDTH, intermediate_size=2 * WIDTH,
                            num_hidden_layers=LAYERS, num_attention_heads=4)
    model = Llava(ViT(vision), Projector(32, WIDTH), Decoder(decoder))
    for p in model.parameters():
        p.data = 0.05 * torch.randn(p.shape) if p.dim() > 1 else torch.ones_like(p)
    side(model, Pairs(5))                                       # what libraries allocate once
    before = memory("VmRSS")
    reset_peak()
    start = time.perf_counter()
    value = side(model, Pairs(n))
    return value, time.perf_counter() - start, memory("VmHWM") - before


def compare_memory() -> None:
    tokens_of = f"{IMAGE_TOKENS} image and {IMAGE_TOKENS} text tokens"
    print(f"\n{LAYERS} layers, D = {WIDTH}, {tokens_of} a pair, float32")
    print(f"{'':18}" + "".join(f"{n:>22} pairs" for n in PAIRS))
    for side in (keep_everything, in_passes):
        cells = []
        for n in PAIRS:
            value, seconds, mib = in_own_process(peak, side, n)
            cells.append(f"{mib:7.0f} MiB {seconds:5.1f} s MIR {value:.4f}")
        print(f"{side.__name__:18}" + "".join(f"{c:>28}" for c in cells))


@dataclass
class Bench:
    """Compare the Fréchet distance with scipy's and the released code's, and the memory of measuring a model."""
    sizes: list[int] = option((1024, 2048), "dimensions D")
    spectra: list[str] = option(("mild", "1e-2", "1e-5", "rank"), "of the tokens")
    tokens: int = option(20000, "in each set", least=2)
    runs: int = option(3, "of each side; the least time counts", least=1)
    ckpt: str | None = option(None, "a run of the toy, or a checkpoint of it (unset: none)")


def main() -> None:
    b = parse(Bench)
    torch.set_num_threads(1)
    for size in b.sizes:
        for spectrum in b.spectra:
            x, y = (tokens(b.tokens, size, seed, spectrum) for seed in (0, 1))
            compare(f"D = {size}, {spectrum}", x, y, b.runs)
    if b.ckpt:
        compare_checkpoint(b.ckpt, b.runs)
    compare_memory()


if __name__ == "__main__":
    run(main)
