"""Moments and medians of tokens that nobody keeps: from passes over the same batches, on all ranks.

    mean, gram    of a set of tokens in memory: Σ_i x_i / n and Σ_i (x_i − c)(x_i − c)ᵀ
    Median        the exact median of every dimension, one byte a pass
    Stream        mean and covariance of one set of tokens without its outliers, from 2 to 4 passes

Memory per stream is D² float64 values, however many tokens there are.
"""
from array import array

import torch
import torch.distributed as dist
from torch import Tensor


# --------------------------------------------------------------------------------------- over ranks
def place() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) without torchrun."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def add_up(t: Tensor) -> Tensor:
    """Sum t over ranks, in place."""
    if place()[1] > 1:
        dist.all_reduce(t)
    return t


def gather(t: Tensor) -> Tensor:
    """Concatenate every rank's t, on the CPU."""
    parts = [t.cpu()]
    if place()[1] > 1:
        parts = [None] * place()[1]
        dist.all_gather_object(parts, t.cpu())
    return torch.cat(parts)


# ------------------------------------------------------------------------------ of tokens in memory
def mean(x: Tensor) -> Tensor:
    """(D,) of x (n,D), in float64. 512 tokens at a time: ten times as fast as all at once."""
    total = x.new_zeros(x.shape[1], dtype=torch.float64)
    for part in x.split(512):
        total += part.double().sum(0)
    return total / len(x)


def gram(x: Tensor, centre: Tensor | float = 0.0, products: torch.dtype = torch.float64) -> Tensor:
    """Σ_i (x_i − c)(x_i − c)ᵀ (D,D) of x (n,D), in float64. products: the dtype that tokens are centred and multiplied
    in, 2048 at a time; float32 takes half the time and leaves about 7 digits on the diagonal."""
    out = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    centre = torch.as_tensor(centre, dtype=products, device=x.device)
    for part in x.split(2048):
        part = (part - centre).to(products)     # a centre (D,) of that dtype promotes it: one pass
        if part.device.type == "cpu":
            # numpy knows a matrix times its own transpose (BLAS syrk): half the work. torch has no such product.
            part = part.detach().numpy()
            out += torch.from_numpy(part.T @ part)
        else:
            out += part.T @ part
    return out


def check_tokens(name: str, tokens: Tensor) -> None:
    """Raise ValueError if tokens (n,…) are fewer than 2 or not finite."""
    if len(tokens) < 2:
        raise ValueError(f"{name} tokens: {len(tokens)}, but a covariance needs 2")
    # The two bounds are NaN or infinite if any number is: far faster than asking every one.
    if not torch.stack(tokens.aminmax()).isfinite().all():
        raise ValueError(f"{name} tokens: some are not finite")


def outlier_bounds(norms: Tensor) -> tuple[Tensor, Tensor]:
    """(median, 3 std) of norms (n,). An outlier's norm is farther than 3 std from the median."""
    norms = norms.sort().values                     # sums must not depend on the order of the tokens
    return norms.median(), 3 * norms.std()


# ---------------------------------------------------------------------------------------- in passes
class Median:
    """The exact (lower) median of every dimension: radix selection, a byte a pass, highest first.

    A pass counts, among the values that agree with the median so far, which have which next byte;
    the byte that holds the middle value is the median's next one. Bits of floats order as integers
    once the bits below the sign are flipped in negative ones."""
    def __init__(self, dim: int, device):
        self.base = torch.full((dim,), -128, device=device)                     # (D,) the bytes so far, times 256
        self.counts = torch.zeros(256, dim, dtype=torch.int32, device=device)
        self.dtype, self.shift, self.value = None, None, None

    def add(self, x: Tensor) -> None:
        if self.shift is None:
            self.dtype, self.shift = x.dtype, 8 * (x.element_size() - 1)
        key = self.flip(x.view(self.integer()).long())                          # (n,D)
        byte = (key >> self.shift) - self.base                                  # 0..255 if all before it agree
        agree = (byte >= 0) & (byte < 256)
        self.counts.scatter_add_(0, byte.clamp(0, 255), agree.int())

    def close(self, middle: Tensor) -> Tensor:
        """End a pass. Returns middle (D,), updated: how many values that agree lie below the median."""
        below = add_up(self.counts).cumsum(0)                                   # (256,D)
        byte = (below <= middle).sum(0)                                         # (D,)
        middle = middle - below.gather(0, (byte - 1).clamp(min=0)[None])[0].where(byte > 0, 0)
        self.base += byte
        if self.shift == 0:
            self.value = self.flip(self.base).to(self.integer()).view(self.dtype).double()
        self.base, self.shift = self.base * 256, self.shift - 8
        self.counts.zero_()
        return middle

    def integer(self) -> torch.dtype:
        return {2: torch.int16, 4: torch.int32, 8: torch.int64}[self.dtype.itemsize]

    def flip(self, key: Tensor) -> Tensor:
        return key ^ ((key >> 63) & torch.iinfo(self.integer()).max)


class Stream:
    """Mean and covariance of tokens whose outliers are dropped, or replaced by the median.

    Pass 0 keeps the norm of every token and their mean. Pass 1 adds up the moments of all but the
    outliers about that mean, so that nothing cancels. The medians take a pass for every byte of
    the dtype, those two included: 2 for bfloat16; for float32 4 if there are outliers, else 2."""
    def __init__(self, dim: int, device, drop: bool = False):
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)         # Σ f, then Σ (f − centre)
        self.scatter = None                                                     # Σ (f − centre)(f − centre)ᵀ
        self.norms = array("d")             # one small tensor a batch would fragment the heap
        self.median = None if drop else Median(dim, device)
        self.drop = drop

    def add(self, x: Tensor, step: int) -> None:
        """Add tokens x (n,D). Every pass must see the same tokens in the same dtype."""
        f = x.double()
        norms = f.norm(dim=1)                                                   # (n,)
        if step == 0:
            self.norms.extend(norms.tolist())
            self.sum += f.sum(0)
        elif step == 1:
            f = f[(norms - self.middle).abs() <= self.width]
            self.sum += (f - self.centre).sum(0)
            self.scatter += gram(f, self.centre)
        if self.median is not None:
            self.median.add(x)

    def close(self, name: str, step: int) -> None:
        """End a pass, on all ranks together. Raises ValueError if the tokens cannot be used."""
        if step == 0:
            norms = gather(torch.tensor(self.norms, dtype=torch.float64)).to(self.sum.device)
            check_tokens(name, norms)
            self.n, self.norms = len(norms), norms.sort().values
            self.middle, self.width = outlier_bounds(norms)
            self.far = int(((norms - self.middle).abs() > self.width).sum())
            self.centre = add_up(self.sum) / self.n
            self.sum, self.scatter = torch.zeros_like(self.sum), self.sum.new_zeros(len(self.sum), len(self.sum))
            self.rank = torch.full_like(self.sum, (self.n - 1) // 2, dtype=torch.int64)
            if self.far == 0:
                self.median = None
        elif step == 1:
            add_up(self.sum)
            add_up(self.scatter)
        if self.median is not None:
            self.rank = self.median.close(self.rank)
            if self.median.value is not None:
                self.replace_outliers(self.median.value)
                self.median = None

    def replace_outliers(self, value: Tensor) -> None:
        """Count `value` (D,) once for every outlier."""
        shift = value - self.centre
        self.sum += self.far * shift
        self.scatter += self.far * torch.outer(shift, shift)

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """((D,), (D,D)) of the tokens, after the last pass."""
        n = self.n - self.far if self.drop else self.n
        mean = self.sum / n
        return self.centre + mean, (self.scatter - n * torch.outer(mean, mean)) / (n - 1)       # eq. (4)
