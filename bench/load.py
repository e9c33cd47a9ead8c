"""Loading a sharded checkpoint: ours against torch.load of every shard and load_state_dict. Seconds, GB/s, peak memory.

    python -m bench.load                  a synthetic LLaMA of 1.5 GB in bfloat16, in 4 shards, safetensors and .bin

Each side runs in a process of its own. `resident` counts mapped file pages too, `anonymous` only memory that is the
process's own; both are peaks, sampled every 2 ms, beyond what the process had after its imports.
"""
import json
import multiprocessing
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from hub.released import load_llm
from model import Decoder, DecoderConfig

CONFIG = dict(vocab_size=32000, hidden_size=2048, intermediate_size=5504, num_hidden_layers=12, num_attention_heads=16)
SHARDS = 4


def write(folder: Path) -> int:
    """The checkpoint in both formats; returns its bytes."""
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in Decoder(DecoderConfig(**CONFIG)).named_parameters()}
    names = list(shapes)
    for kind in ("safetensors", "bin"):
        (folder / kind).mkdir()
        (folder / kind / "config.json").write_text(json.dumps({"model_type": "llama", **CONFIG}))
        index, step = {}, -(-len(names) // SHARDS)
        for i in range(SHARDS):
            part = {n: torch.randn(shapes[n]).bfloat16() for n in names[i * step:(i + 1) * step]}
            file = ("model" if kind == "safetensors" else "pytorch_model") + f"-{i + 1:05}-of-{SHARDS:05}.{kind}"
            save_file(part, folder / kind / file) if kind == "safetensors" else torch.save(part, folder / kind / file)
            index |= dict.fromkeys(part, file)
        name = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
        (folder / kind / f"{name}.index.json").write_text(json.dumps({"weight_map": index}))
    return sum(s.numel() for s in shapes.values()) * 2


def ours(folder: Path):
    return load_llm(folder, torch.bfloat16)


def plain(folder: Path):
    state = {}
    for shard in sorted(folder.glob("*.bin")):
        state |= torch.load(shard, weights_only=True)
    torch.set_default_dtype(torch.bfloat16)
    model = Decoder(DecoderConfig(**CONFIG))
    model.load_state_dict(state)
    return model


def memory() -> dict[str, int]:
    lines = dict(line.split(":") for line in open("/proc/self/status") if line.startswith(("VmRSS", "RssAnon")))
    return {"resident": int(lines["VmRSS"].split()[0]) * 1024, "anonymous": int(lines["RssAnon"].split()[0]) * 1024}


def measure(load, folder: Path, queue) -> None:
    before, peak, done = memory(), {"resident": 0, "anonymous": 0}, threading.Event()

    def sample():
        while not done.wait(0.002):
            for k, v in memory().items():
                peak[k] = max(peak[k], v - before[k])
    watcher = threading.Thread(target=sample)
    watcher.start()
    start = time.perf_counter()
    model = load(folder)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    queue.put((seconds, peak, model.lm_head.weight.float().sum().item()))


if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        size = write(Path(folder))
        print(f"{size / 1e9:.2f} GB in {SHARDS} shards, page cache warm; peaks as multiples of that")
        for name, load, kind in [("plain, .bin", plain, "bin"), ("ours, .bin", ours, "bin"),
                                 ("ours, safetensors", ours, "safetensors")]:
            queue = spawn.Queue()
            process = spawn.Process(target=measure, args=(load, Path(folder) / kind, queue))
            process.start()
            seconds, peak, _ = queue.get()
            process.join()
            rate, resident = size / seconds / 1e9, peak["resident"] / size
            print(f"{name:18} {seconds:6.2f} s  {rate:5.2f} GB/s   resident {resident:.2f} ×"
                  f"   anonymous {peak['anonymous'] / size:.2f} ×")
