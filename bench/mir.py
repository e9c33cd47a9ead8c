"""Time and error of the exact Fréchet distance against scipy's square root and five rounds of two inversions, and the
peak memory of measuring a model in passes against keeping every token.

    python -m bench.mir                   D = 512, 1024, 2048; 8000 image and 6000 text tokens; 10, 50, 100 pairs
    python -m bench.mir --sizes 512       one of them (scipy takes about a minute for the last)

Inputs are float32 tokens whose scales fall like 1/√i over the dimensions. `root` is the time of Tr (Σ_v Σ_t)^{1/2} from
the two covariances, `whole` that of the distance from the tokens; the sides take turns, the medians are printed. The
error is that of the distance against singular values from QR factors of the tokens in float64. The released code's fast
mode runs its five rounds in float32; in either precision they end at Σ_v Σ_t and not at its root, hence their error.
scipy is optional: where it is not installed its row says so. Peak memory is that of a process of its own, beyond model
and inputs.
"""
import argparse
import multiprocessing
import statistics
import time
from pathlib import Path

import torch

import mir
from data import Batch
from model import Decoder, DecoderConfig, Llava, Projector, VisionConfig, ViT

try:
    from scipy.linalg import sqrtm
except ImportError:
    sqrtm = None

VISION_TOKENS, TEXT_TOKENS, RUNS = 8000, 6000, 5
PAIRS, IMAGE_TOKENS, LAYERS, WIDTH = (10, 50, 100), 64, 8, 256


# ------------------------------------------------------------------------------------------------ time and error
def tokens(n: int, d: int, seed: int) -> torch.Tensor:
    """(n,d) float32, correlated between dimensions."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=g)).Q
    x = torch.randn(n, d, generator=g) @ (torch.arange(1, d + 1) ** -0.5 * basis).T
    return x + 0.02 * torch.randn(d, generator=g)


def truth(x, y) -> float:
    factors, rest = [], (x.double().mean(0) - y.double().mean(0)).pow(2).sum()
    for t in (x.double(), y.double()):
        centred = (t - t.mean(0)) / (len(t) - 1) ** 0.5
        rest += centred.pow(2).sum()
        factors.append(torch.linalg.qr(centred, mode="r").R)
    return (rest - 2 * torch.linalg.svdvals(factors[0] @ factors[1].T).sum()).item()


def covariances(x, y, dtype):
    """As the released code makes them, but for the precision."""
    return [torch.mm(c.T, c) / (len(c) - 1) for c in (t.to(dtype) - t.to(dtype).mean(0) for t in (x, y))]


def five_rounds(a, b):
    product = a @ b
    y, z = product, torch.eye(len(a), dtype=a.dtype)
    for _ in range(5):
        y = 0.5 * (y + torch.inverse(z) @ product)
        z = 0.5 * (z + torch.inverse(y) @ product)
    return y.trace()


def by_scipy(a, b):
    return torch.tensor(sqrtm((a @ b).numpy()).real.trace())


SIDES = {           # name: how the covariances are made, precision, the trace of the root, how often at most
    "exact": (lambda x, y, _: [mir.moments(t).covariance for t in (x, y)], torch.float64, mir.root_trace, RUNS),
    "newton-schulz": (lambda x, y, _: [mir.moments(t).covariance for t in (x, y)], torch.float64,
                      lambda a, b: mir.newton_schulz(a @ b)[0].trace(), 1),
    "scipy sqrtm, float64": (covariances, torch.float64, by_scipy, 1),
    "five rounds, float32": (covariances, torch.float32, five_rounds, RUNS),
    "five rounds, float64": (covariances, torch.float64, five_rounds, 3),
}


def compare(d: int) -> None:
    x, y = tokens(VISION_TOKENS, d, 0), tokens(TEXT_TOKENS, d, 1)
    wanted = truth(x, y)
    times, errors = {name: [] for name in SIDES}, {}
    for turn in range(RUNS):
        for name, (make, dtype, root, most) in SIDES.items():
            if turn >= most or name.startswith("scipy") and sqrtm is None:
                continue
            start = time.perf_counter()
            a, b = make(x, y, dtype)
            between = (x.to(dtype).mean(0) - y.to(dtype).mean(0)).pow(2).sum() + a.trace() + b.trace()
            middle = time.perf_counter()
            value = (between - 2 * root(a, b)).item()
            end = time.perf_counter()
            times[name].append((end - middle, end - start))
            errors[name] = abs(value - wanted) / wanted
    ours = [statistics.median(t) for t in zip(*times["exact"])]
    print(f"\nD = {d}, {VISION_TOKENS} + {TEXT_TOKENS} tokens, distance {wanted:.6f}")
    print(f"{'':22}{'root, s':>10}{'whole, s':>10}{'× exact':>16}{'error':>10}")
    for name, pairs in times.items():
        if not pairs:
            print(f"{name:22}not measured: scipy is not installed")
            continue
        root, whole = (statistics.median(t) for t in zip(*pairs))
        print(f"{name:22}{root:10.3f}{whole:10.3f}{root / ours[0]:8.1f}{whole / ours[1]:8.1f}{errors[name]:10.0e}")


# ------------------------------------------------------------------------------------------------ memory
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
    layers = [([], []) for _ in range(LAYERS)]
    with torch.no_grad():
        for batch in batches:
            mir.visit(model, batch, lambda k, v, t: (layers[k - 1][0].append(v), layers[k - 1][1].append(t)))
    return mir.modality_integration_rate([(torch.cat(v), torch.cat(t)) for v, t in layers])[0]


def in_passes(model, batches) -> float:
    return mir.measure(model, batches)["mir"]


def memory(field: str) -> float:
    """VmRSS or VmHWM (its peak) of this process, in MiB."""
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) / 1024


def peak(side, n: int, queue) -> None:
    torch.manual_seed(0)
    model = Llava(ViT(VisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                   image_size=32, patch_size=4)), Projector(32, WIDTH),
                  Decoder(DecoderConfig(vocab_size=1000, hidden_size=WIDTH, intermediate_size=2 * WIDTH,
                                        num_hidden_layers=LAYERS, num_attention_heads=4)))
    for p in model.parameters():
        p.data = 0.05 * torch.randn(p.shape) if p.dim() > 1 else torch.ones_like(p)
    side(model, Pairs(5))                                       # what libraries allocate once
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")               # sets the peak back to the present
    start = time.perf_counter()
    value = side(model, Pairs(n))
    queue.put((value, time.perf_counter() - start, memory("VmHWM") - before))


def compare_memory() -> None:
    print(f"\n{LAYERS} layers, D = {WIDTH}, {IMAGE_TOKENS} image and {IMAGE_TOKENS} text tokens a pair, float32")
    print(f"{'':18}" + "".join(f"{n:>22} pairs" for n in PAIRS))
    spawn = multiprocessing.get_context("spawn")
    for side in (keep_everything, in_passes):
        cells = []
        for n in PAIRS:
            queue = spawn.Queue()
            process = spawn.Process(target=peak, args=(side, n, queue))
            process.start()
            value, seconds, mib = queue.get()
            process.join()
            cells.append(f"{mib:7.0f} MiB {seconds:5.1f} s MIR {value:.4f}")
        print(f"{side.__name__:18}" + "".join(f"{c:>28}" for c in cells))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[512, 1024, 2048])
    print(f"{torch.get_num_threads()} threads")
    for size in parser.parse_args().sizes:
        compare(size)
    compare_memory()
