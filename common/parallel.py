"""Several processes as one: who they are, and a model that each holds whole (DDP) or in part (FSDP2).

    stage 1    DDP            every rank holds everything; the gradients of what is trained are averaged
    stage 2    fully_shard    every rank holds 1/ranks of each tensor (its rows: a DTensor); a block is whole on a rank
                              only while it computes, and each gradient goes to the rank that holds its rows

The module that is wrapped is `Objective`, model and loss in one: embedding table and head lie in its root unit, which
is whole from the forward's beginning to the backward's end, so a loss may use their weights as ordinary tensors.
"""
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from common.flags import UserError


def choose_device(device: str, dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Where to compute, and in what: `auto` is the GPU if there is one, and bfloat16 where the GPU has it."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but PyTorch sees no CUDA device here: use --device cpu, or auto")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return torch.device(device), getattr(torch, dtype)


HELD_GRADIENTS = 0.2        # share of a GPU's memory that accumulating gradients whole, not sharded, may take


@dataclass
class Ranks:
    """This process among those of torchrun; alone without it."""
    rank: int
    count: int
    device: torch.device
    dtype: torch.dtype                      # of computing
    mesh: DeviceMesh | None = None          # over which the model is cut (FSDP), if it is

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: list) -> Tensor:
        """Element-wise sum over ranks, in float64, on the device: reading it is what waits."""
        t = torch.stack([torch.as_tensor(v, dtype=torch.float64).to(self.device, non_blocking=True) for v in values])
        if self.count > 1:
            dist.all_reduce(t)
        return t

    def gather(self, value) -> list:
        """Every rank's value, on every rank."""
        if self.count == 1:
            return [value]
        out = [None] * self.count
        dist.all_gather_object(out, value)
        return out

    def wait(self) -> None:
        """Until every rank is here."""
        if self.count > 1:
            dist.barrier()


def start(device: torch.device, dtype: torch.dtype, minutes: float) -> Ranks:
    """Joins the other processes of torchrun. minutes: how long a rank waits for another before it gives up."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=minutes))
    return Ranks(rank, ranks, device, dtype)


def over(ranks: Ranks, sharded: bool) -> Ranks:
    """The same ranks, for a model that is cut over them, or for one that each holds whole."""
    mesh = init_device_mesh(ranks.device.type, (ranks.count,)) if sharded and ranks.count > 1 else None
    return replace(ranks, mesh=mesh)


@contextlib.contextmanager
def losses_explained(ranks: Ranks) -> Iterator[None]:
    """What PyTorch raises when another process is lost becomes one line: a rank that ends takes the others with it."""
    try:
        yield
    except RuntimeError as e:
        text = " ".join(str(e).split())
        if "DataLoader worker" in text:
            raise UserError(f"a process that prepares batches died ({text[:120]}): if memory ran out, fewer --workers; "
                            "--resume goes on from the newest checkpoint") from None
        silent = any(word in text for word in ("imed out", "imeout"))
        if ranks.count == 1 or not (silent or any(word in text for word in ("Connection", "connection", "NCCL error"))):
            raise
        what = "was not heard of for --timeout minutes" if silent else "ended"
        raise UserError(f"another rank {what}: its own message, if it left one, says why. --resume goes on from "
                        f"the newest checkpoint ({text[:100]})") from None


# ------------------------------------------------------------------------------------------------ cutting a model
def shard(module: nn.Module, ranks: Ranks, whole: bool = False) -> None:
    """Makes `module` a unit of FSDP. A unit on the meta device is cut before it is filled: no rank ever holds it whole.

    The weights of a block are gathered in the dtype of computing, which is what autocast would make of them. whole: of
    the root unit; it is gathered as it is stored and kept until the backward is through. Sums are float32."""
    policy = MixedPrecisionPolicy(None if whole else ranks.dtype, torch.float32, cast_forward_inputs=False)
    fully_shard(module, mesh=ranks.mesh, reshard_after_forward=not whole, mp_policy=policy)


def wrap(objective: nn.Module, ranks: Ranks) -> nn.Module:
    """The module to call: DDP around the objective, or the objective itself, a root unit, its blocks being cut."""
    if ranks.mesh is not None:
        shard(objective, ranks, whole=True)
        return objective
    if ranks.count > 1:                     # every rank read the same files: nothing to broadcast
        return DistributedDataParallel(objective, init_sync=False, gradient_as_bucket_view=True)
    return objective


def placed(tensor: Tensor, like: Tensor, device, dtype: torch.dtype) -> Tensor:
    """A copy of `tensor`; where `like` is cut over ranks, of this rank's rows, as a DTensor."""
    if not isinstance(like, DTensor):
        return tensor.to(device, dtype, copy=True)
    rank, ranks = like.device_mesh.get_local_rank(), like.device_mesh.size()
    parts = tensor.chunk(ranks)             # may be fewer than ranks: the last ones hold no row
    part = (parts[rank] if rank < len(parts) else tensor[:0]).to(device, dtype, copy=True)
    return DTensor.from_local(part, like.device_mesh, [Shard(0)], run_check=False, shape=tensor.shape,
                              stride=tensor.stride())


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its rows. Of a DTensor, every rank must ask at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def gathered(objective: nn.Module) -> Iterator[None]:
    """Inside, objective.model may be called by itself, outside a step: the root unit is whole. On all ranks at once."""
    sharded = isinstance(objective, FSDPModule)
    if sharded:
        objective.unshard()
    try:
        yield
    finally:
        if sharded:
            objective.reshard()


# ------------------------------------------------------------------------------------------------ a step
def holds_gradients(trained: list[Tensor], ranks: Ranks) -> bool:
    """Are gradients summed over micro-batches before they travel? With FSDP that keeps them whole on every rank: 4
    bytes a trained parameter. Where a GPU has no room for that, they travel after every micro-batch."""
    if ranks.mesh is None or ranks.device.type == "cpu":
        return True
    room = torch.cuda.get_device_properties(ranks.device).total_memory
    return 4 * sum(p.numel() for p in trained) < HELD_GRADIENTS * room


@contextlib.contextmanager
def gradients(objective: nn.Module, travel: bool) -> Iterator[None]:
    """Around the forward and backward of a micro-batch. travel: the gradients are summed over ranks in it."""
    if isinstance(objective, FSDPModule):
        objective.set_requires_gradient_sync(travel)
    quiet = isinstance(objective, DistributedDataParallel) and not travel
    with objective.no_sync() if quiet else contextlib.nullcontext():
        yield


def gradient_norm(trained: list[Tensor], ranks: Ranks) -> Tensor:
    """The 2-norm of all gradients, on the device; the same on every rank."""
    norm = nn.utils.get_total_norm([local(p.grad) for p in trained if p.grad is not None])
    if ranks.mesh is not None:
        norm = norm.double().square()
        dist.all_reduce(norm)
        norm = norm.sqrt()
    return norm.float()


def clip(trained: list[Tensor], norm: Tensor, limit: float) -> None:
    """Scales the gradients down to a norm of `limit` where it is more. Nothing is read back from the device."""
    scale = (limit / (norm + 1e-6)).clamp(max=1)
    for p in trained:
        if p.grad is not None:
            local(p.grad).mul_(scale.to(p.grad.dtype))
