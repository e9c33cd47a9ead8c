"""Fixtures that several test files share, and a run of train.py on a small toy world."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from programs import ROOT, call, launch, shell, start, start_server  # noqa: F401, tests import them from here
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, models, normalizers

from toy import world

STEPS = 12                                      # of a run of `command`
# the inputs are tiny: a second thread would cost more than it gives
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def program_server():
    start_server()


@pytest.fixture(scope="session", autouse=True)
def fuzzing(request):
    """Two hundred cases of fuzz.py beside the other tests, which leave a core idle. None if no test asks for them."""
    process = None
    if any(item.name.startswith("test_spoiled_files") for item in request.session.items):
        words = [sys.executable, ROOT / "tests" / "fuzz.py", "--n", "200", "--jobs", "1"]
        process = subprocess.Popen(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    yield process
    if process is not None:
        process.kill()


# Pieces of Llama-2's vocabulary with their ids, as far as the examples of LLaVA-1.5's tokenization reach.
LLAMA_PIECES = {
    "USER": 11889, "▁US": 3148, "ER": 1001, ":": 29901, "▁": 29871, "What": 5618, "▁is": 338,
    "▁this": 445, "?": 29973, "▁A": 319, "SS": 1799, "IST": 9047, "ANT": 13566, "▁cat": 6635,
    ".": 29889, "▁chat": 13563, "▁between": 1546, "▁a": 263, "▁curious": 12758, "▁user": 1404,
    "▁and": 322, "▁an": 385, "▁artificial": 23116, "▁intelligence": 21082, "▁assistant": 20255,
    "▁The": 450, "▁gives": 4076, "▁helpful": 8444, ",": 29892, "▁detailed": 13173, "▁pol": 1248,
    "ite": 568, "▁answers": 6089, "▁to": 304, "▁the": 278, "'": 29915, "s": 29879,
    "▁questions": 5155, "US": 3308, "▁Why": 3750, "▁Because": 7311, "▁on": 373, "▁mat": 1775}


@pytest.fixture(scope="session")
def llama_tokenizer() -> Tokenizer:
    """Llama-2's tokenizer, cut down to those pieces: each
    is built by merging its characters from the left."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{b:02X}>": 3 + b for b in range(256)},
             **LLAMA_PIECES}
    merges = []
    for piece in sorted(LLAMA_PIECES, key=lambda p: not p.startswith("▁")):
        for part in [piece[0]] + [piece[:n] for n in range(2, len(piece) + 1)]:
            if len(part) > 1 and (part[:-1], part[-1]) not in merges:
                merges.append((part[:-1], part[-1]))
            for p in (part, part[-1]):
                vocab.setdefault(p, 40000 + len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True,
                                     fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                                 normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False)
                                  for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


# ---------------------------------------------------------------------------------- what runs leave
def losses_of(out: Path, stage: str) -> list[float]:
    """Return the loss of each step of a run."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["stage"] == stage and "loss" in line]


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def same(a, b) -> bool:
    """True if two values are equal bit for bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ------------------------------------------------------------------------------------ a small world
@pytest.fixture(scope="session")
def small_world(tmp_path_factory) -> Path:
    """A small toy data set: 96 pictures, 6 pictures per question file."""
    out = tmp_path_factory.mktemp("world")
    world.make(out, seed=1, images=96, conversations=1, scenes=6)
    return out


def command(small_world, out, stage="finetune", steps=STEPS, **options) -> list[str]:
    """Return the command line of a run on the small world, with rates at which it learns quickly."""
    defaults = {"stage": stage, "data": small_world / f"{stage}.json",
                "images": small_world / "images", "out": out, "global-batch": 16,
                "projector-scale": 8, "max-steps": steps, "workers": 0, "dtype": "float32"}
    if stage == "pretrain":
        defaults["lr"] = 5e-3
    else:
        defaults |= {"lr": 5e-4, "projector": "random"}
    words = ["train.py"]
    for name, value in {**defaults, **options}.items():
        words += [f"--{name}", str(value)]
    return words


@pytest.fixture(scope="session")
def trained(small_world, tmp_path_factory) -> dict[str, Path]:
    """A run of each stage, by one process with one
    micro-batch a step: what others must equal. Read only."""
    outs = {}
    for stage in ("pretrain", "finetune"):
        outs[stage] = tmp_path_factory.mktemp("trained") / stage
        done = call(*command(small_world, outs[stage], stage))
        assert done.returncode == 0, done.stderr
    return outs
