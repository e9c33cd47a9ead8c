"""Fixtures that several test files share."""
import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers

from common.flags import run

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)                        # the inputs are tiny: a second thread would cost more than it gives

# Pieces of Llama-2's vocabulary with their ids, as far as the examples of LLaVA-1.5's tokenization reach.
LLAMA_PIECES = {
    "USER": 11889, "▁US": 3148, "ER": 1001, ":": 29901, "▁": 29871, "What": 5618, "▁is": 338, "▁this": 445, "?": 29973,
    "▁A": 319, "SS": 1799, "IST": 9047, "ANT": 13566, "▁cat": 6635, ".": 29889, "▁chat": 13563, "▁between": 1546,
    "▁a": 263, "▁curious": 12758, "▁user": 1404, "▁and": 322, "▁an": 385, "▁artificial": 23116, "▁intelligence": 21082,
    "▁assistant": 20255, "▁The": 450, "▁gives": 4076, "▁helpful": 8444, ",": 29892, "▁detailed": 13173, "▁pol": 1248,
    "ite": 568, "▁answers": 6089, "▁to": 304, "▁the": 278, "'": 29915, "s": 29879, "▁questions": 5155, "US": 3308,
    "▁Why": 3750, "▁Because": 7311, "▁on": 373, "▁mat": 1775}


@pytest.fixture(scope="session")
def llama_tokenizer() -> Tokenizer:
    """Llama-2's tokenizer, cut down to those pieces: each is built by merging its characters from the left."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{b:02X}>": 3 + b for b in range(256)}, **LLAMA_PIECES}
    merges = []
    for piece in sorted(LLAMA_PIECES, key=lambda p: not p.startswith("▁")):
        for part in [piece[0]] + [piece[:n] for n in range(2, len(piece) + 1)]:
            if len(part) > 1 and (part[:-1], part[-1]) not in merges:
                merges.append((part[:-1], part[-1]))
            for p in (part, part[-1]):
                vocab.setdefault(p, 40000 + len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


def launch(*command: str, ranks: int = 1, **options) -> subprocess.CompletedProcess:
    """Runs a script of the repository as a user would, on one thread a process."""
    start = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                 f"--nproc_per_node={ranks}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*start, *map(str, command)], cwd=ROOT, capture_output=True, text=True, env=env, timeout=170,
                          **options)


def call(script: str, *arguments) -> subprocess.CompletedProcess:
    """The same inside this process: what starting Python and PyTorch takes is most of a short run."""
    module = importlib.import_module({"hub": "hub.__main__"}.get(script, script.removesuffix(".py")))
    out, err, code = io.StringIO(), io.StringIO(), 0
    before = sys.argv, os.getcwd()
    sys.argv = [script, *map(str, arguments)]
    os.chdir(ROOT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run(module.main)
    except SystemExit as e:
        code = e.code
    finally:
        sys.argv = before[0]
        os.chdir(before[1])
    return subprocess.CompletedProcess([script, *arguments], code, out.getvalue(), err.getvalue())


def losses_of(out: Path, stage: str) -> list[float]:
    """The loss of each step of a run."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["stage"] == stage and "loss" in line]


@pytest.fixture(scope="session")
def small_world(tmp_path_factory) -> Path:
    """A small toy data set: 96 pictures, 6 pictures a question file."""
    from toy import world
    out = tmp_path_factory.mktemp("world")
    world.make(out, seed=1, images=96, conversations=1, scenes=6)
    return out
