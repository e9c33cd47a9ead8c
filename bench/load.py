"""Load a sharded checkpoint: our reader, compared with torch.load and load_state_dict.

    python -m bench.load                  a random LLaMA of 1.5 GB in bfloat16, in 4 shards, safetensors and .bin

Each side runs in a process of its own. `resident` counts mapped file pages too, `anonymous` only
memory of the process alone. Both are peaks beyond what it had after its imports.
"""
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.common import in_own_process, sampled_peak
from common.files import read_json
from common.flags import option, parse, run
from hub.released import load_llm
from model import Decoder, DecoderConfig

SHARDS = 4


@dataclass
class Shape:
    """Compare our reader of checkpoints with torch.load and load_state_dict."""
    width: int = option(2048, "of the language model", least=1)
    inner: int = option(5504, "width of its MLP", least=1)
    layers: int = option(12, "of the language model", least=1)
    vocabulary: int = option(32000, "words", least=1)


def write(folder: Path, config: dict) -> int:
    """Write the checkpoint in both formats. Returns its bytes."""
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in Decoder(DecoderConfig(**config)).named_parameters()}
    names, per_shard = list(shapes), -(-len(shapes) // SHARDS)
    for kind, stem in [("safetensors", "model"), ("bin", "pytorch_model")]:
        (folder / kind).mkdir()
        (folder / kind / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
        index = {}
        for i in range(SHARDS):
            mine = names[i * per_shard:(i + 1) * per_shard]
            part = {n: torch.randn(shapes[n]).bfloat16() for n in mine}
            file = f"{stem}-{i + 1:05}-of-{SHARDS:05}.{kind}"
            if kind == "safetensors":
                save_file(part, folder / kind / file)
            else:
                torch.save(part, folder / kind / file)
            index |= dict.fromkeys(part, file)
        (folder / kind / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": index}))
    return sum(s.numel() for s in shapes.values()) * 2


def ours(folder: Path) -> Decoder:
    return load_llm(folder, torch.bfloat16)


def plain(folder: Path) -> Decoder:
    config = read_json(folder / "config.json")
    del config["model_type"]
    state = {}
    for shard in sorted(folder.glob("*.bin")):
        state |= torch.load(shard, weights_only=True)
    torch.set_default_dtype(torch.bfloat16)
    model = Decoder(DecoderConfig(**config))
    model.load_state_dict(state)
    return model


def measure(load, folder: Path) -> tuple[float, dict[str, float]]:
    """Return (seconds, peak MiB by field)."""
    with sampled_peak("VmRSS", "RssAnon") as peak:
        start = time.perf_counter()
        model = load(folder)
        seconds = time.perf_counter() - start
    model.lm_head.weight.float().sum()             # the weights are there, whatever is mapped
    return seconds, peak


def main() -> None:
    s = parse(Shape)
    config = dict(vocab_size=s.vocabulary, hidden_size=s.width, intermediate_size=s.inner,
                  num_hidden_layers=s.layers, num_attention_heads=16)
    with tempfile.TemporaryDirectory() as folder:
        size = write(Path(folder), config)
        print(f"{size / 1e9:.2f} GB in {SHARDS} shards, page cache warm; peaks as multiples of that")
        for name, load, kind in [("plain, .bin", plain, "bin"), ("ours, .bin", ours, "bin"),
                                 ("ours, safetensors", ours, "safetensors")]:
            seconds, peak = in_own_process(measure, load, Path(folder) / kind)
            resident, anonymous = (peak[field] * 2**20 / size for field in ("VmRSS", "RssAnon"))
            print(f"{name:18} {seconds:6.2f} s  {size / seconds / 1e9:5.2f} GB/s   resident {resident:.2f} ×"
                  f"   anonymous {anonymous:.2f} ×", flush=True)


if __name__ == "__main__":
    run(main)
