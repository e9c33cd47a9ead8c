"""Several processes as one: who they are; a model that each holds whole (DDP) or in part (FSDP2).

    stage 1    DDP            every rank holds the whole model; gradients are averaged
    stage 2    fully_shard    every rank holds 1/count of each tensor (its rows: a DTensor). A block
                              is whole only while it computes; gradients go to their rows' rank
    hsdp       both           the ranks of a node share the rows; nodes average their gradients

The wrapped module is `Objective`: model and loss in one. Its root unit holds the embedding table
and the head and is whole from the start of the forward pass to the end of the backward pass: a loss
may use their weights as ordinary tensors.
"""
import contextlib
import os
import resource
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from common.flags import UserError

# Of a GPU's memory: the most that unsharded gradients may take between micro-batches.
GRADIENT_SHARE = 0.2


# ---------------------------------------------------------------------------------------- processes
def choose_device(device: str, dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Return the device and the dtype of computing. auto: the GPU, bfloat16, where there is one."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but PyTorch sees no CUDA device here: use --device cpu, "
                        "or auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return torch.device(device), getattr(torch, dtype)


@dataclass
class Ranks:
    """This process among those that torchrun started; a single one without torchrun."""
    rank: int
    count: int
    device: torch.device
    dtype: torch.dtype                      # of computing
    mesh: DeviceMesh | None = None          # (ranks) that share one model, or (nodes, ranks)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: list) -> Tensor:
        """Sum numbers over ranks, one by one. Returns float64 (len(values),) on the device."""
        numbers = [torch.as_tensor(v, dtype=torch.float64) for v in values]
        total = torch.stack([n.to(self.device, non_blocking=True) for n in numbers])
        if self.count > 1:
            dist.all_reduce(total)
        return total

    def gather(self, value) -> list:
        """Return every rank's value, on every rank."""
        if self.count == 1:
            return [value]
        out = [None] * self.count
        dist.all_gather_object(out, value)
        return out

    def wait(self) -> None:
        """Block until every rank has called this."""
        if self.count > 1:
            dist.barrier()


def rank_count() -> int:
    """Return the number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def start(device: torch.device, dtype: torch.dtype, minutes: float, gloo: bool = False) -> Ranks:
    """Join the other processes of torchrun. minutes: the longest that a rank waits for another.
    gloo: use CPU communication on GPUs too, for programs that only meet at a barrier."""
    rank, count = int(os.environ.get("RANK", 0)), rank_count()
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if count > 1:
        # NCCL is told its GPU, or it would guess one, and waits longer than `alarm` below.
        if gloo or device.type == "cpu":
            dist.init_process_group("gloo", timeout=timedelta(minutes=minutes))
        else:
            wait = timedelta(minutes=minutes + 2)
            dist.init_process_group("nccl", timeout=wait, device_id=device)
    return Ranks(rank, count, device, dtype)


def leave(ranks: Ranks) -> Ranks:
    """Leave the other processes; every rank must call. Returns this process as a single one."""
    if ranks.count > 1:
        dist.barrier()
        dist.destroy_process_group()
    return replace(ranks, count=1, mesh=None)


def finish(ranks: Ranks) -> None:
    """Leave together. Call last: with several ranks the process ends here. It skips Python's
    shutdown, in which a thread of gloo may abort it (seen about once in 40 runs)."""
    if dist.is_initialized():
        leave(ranks)
    if rank_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def over(ranks: Ranks, sharded: bool, hybrid: bool = False) -> Ranks:
    """Return the ranks for a model that they share (sharded), that the ranks of each node share
    (hybrid), or that each holds whole."""
    mesh = None
    if hybrid:
        node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.count))             # set by torchrun
        if node in (1, ranks.count):
            raise UserError("--parallel hsdp is for several nodes of several ranks, not "
                            f"{ranks.count // node} × {node}: use --parallel fsdp")
        shape = ranks.count // node, node
        mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=("nodes", "ranks"))
    elif sharded and ranks.count > 1:
        mesh = init_device_mesh(ranks.device.type, (ranks.count,), mesh_dim_names=("ranks",))
    return replace(ranks, mesh=mesh)


@contextlib.contextmanager
def explain_lost_ranks(ranks: Ranks, advice: str = "run the same command again") -> Iterator[None]:
    """Turn PyTorch's error for a lost process into one line: a rank that ends stops the others."""
    try:
        yield
    except RuntimeError as e:
        text = " ".join(str(e).split())
        if "DataLoader worker" in text:
            raise UserError(f"a process that prepares batches died ({text[:120]}): if memory ran "
                            f"out, use fewer --workers; {advice}") from None
        timed_out = "imed out" in text or "imeout" in text
        lost = "Connection" in text or "connection" in text or "NCCL error" in text
        if ranks.count == 1 or not (timed_out or lost):
            raise
        what = "was silent for --timeout minutes" if timed_out else "ended"
        raise UserError(f"another rank {what}: its own message, if it left one, says why; {advice} "
                        f"({text[:100]})") from None


@contextlib.contextmanager
def alarm(ranks: Ranks, minutes: float) -> Iterator:
    """Give a function to call once a step. On GPUs, the process ends with one line if it is not
    called for `minutes`: NCCL's time-out aborts without advice. (For gloo: explain_lost_ranks.)"""
    alive, done = threading.Event(), threading.Event()

    def watch() -> None:
        while alive.wait(60 * minutes):
            if done.is_set():
                return
            alive.clear()
        print(f"[rank {ranks.rank}] error: no step ended within --timeout minutes: another rank "
              "or the storage is silent; --resume continues from the newest checkpoint",
              file=sys.stderr, flush=True)
        os._exit(2)

    if ranks.count > 1 and ranks.device.type == "cuda":
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield alive.set
    finally:
        done.set()
        alive.set()


def peak_gib(device: torch.device) -> float:
    """Return the most memory in use so far, in GiB: of the GPU, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20           # KiB on Linux


# --------------------------------------------------------------------------------- sharding a model
def shard(module: nn.Module, ranks: Ranks, root: bool = False) -> None:
    """Make `module` a unit of FSDP. Sharded on the meta device, it is never whole on any rank.

    A block's weights are gathered in the dtype of computing, as autocast would cast them. The root
    unit is gathered as stored, until the backward pass ends. Gradients are reduced in float32."""
    low = None if root else ranks.dtype
    policy = MixedPrecisionPolicy(low, torch.float32, cast_forward_inputs=False)
    fully_shard(module, mesh=ranks.mesh, reshard_after_forward=not root, mp_policy=policy)
    for part in module.modules():           # else --compile makes a graph for every layer
        part._is_fsdp_managed_module = False


def wrap(objective: nn.Module, ranks: Ranks) -> nn.Module:
    """Return the module to call: the objective as FSDP's root unit, or DDP around it."""
    if ranks.mesh is not None:
        shard(objective, ranks, root=True)
        return objective
    if ranks.count > 1:
        # Every rank read the same files, so there is nothing to broadcast at the start.
        return DistributedDataParallel(objective, init_sync=False, gradient_as_bucket_view=True)
    return objective


def placed(tensor: Tensor, like: Tensor, device, dtype: torch.dtype) -> Tensor:
    """Return a copy of `tensor`. Where `like` is a DTensor: this rank's rows, as a DTensor."""
    if not isinstance(like, DTensor):
        return tensor.to(device, dtype, copy=True)
    mesh = like.device_mesh
    rank, parts = mesh.get_local_rank("ranks"), tensor.chunk(mesh["ranks"].size())
    part = parts[rank] if rank < len(parts) else tensor[:0]     # few rows: the last ranks hold none
    return DTensor.from_local(part.to(device, dtype, copy=True), mesh, like.placements,
                              run_check=False, shape=tensor.shape, stride=tensor.stride())


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor with all its rows. For a DTensor every rank must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return the part of the tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def gathered(objective: nn.Module) -> Iterator[None]:
    """Keep the root unit whole, to call objective.model outside a step. Every rank must enter."""
    sharded = isinstance(objective, FSDPModule)
    if sharded:
        objective.unshard()
    try:
        yield
    finally:
        if sharded:
            objective.reshard()


# ------------------------------------------------------------------------------------------- a step
def reduce_once(trained: list[Tensor], ranks: Ranks) -> bool:
    """True if gradients are reduced over ranks once a step, not after every micro-batch. With FSDP
    they stay unsharded until then, 4 bytes a trained parameter: not every GPU has room for that."""
    if ranks.mesh is None or ranks.device.type == "cpu":
        return True
    memory = torch.cuda.get_device_properties(ranks.device).total_memory
    return 4 * sum(p.numel() for p in trained) < GRADIENT_SHARE * memory


@contextlib.contextmanager
def sync_gradients(objective: nn.Module, when: bool) -> Iterator[None]:
    """Wrap the forward and backward pass of a micro-batch. when: reduce gradients over ranks."""
    if isinstance(objective, FSDPModule):
        objective.set_requires_gradient_sync(when)
    if isinstance(objective, DistributedDataParallel) and not when:
        with objective.no_sync():
            yield
    else:
        yield


def clip_gradients(trained: list[Tensor], ranks: Ranks, max_norm: float) -> Tensor:
    """Scale the gradients down to a 2-norm of at most max_norm. Returns the norm before that, the
    same on every rank, on the device: nothing is read back here."""
    gradients = [local(p.grad) for p in trained if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if ranks.mesh is not None:
        square = norm.double().square()     # nodes hold the same rows: each is counted once
        dist.all_reduce(square, group=ranks.mesh.get_group("ranks"))
        norm = square.sqrt()
    norm = norm.float()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1)
    for gradient in gradients:
        gradient.mul_(scale.to(gradient.dtype))
    return norm
