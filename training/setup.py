"""What a stage trains, from which folders, on which samples."""
import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from common.files import files_digest
from common.flags import UserError, flag
from common.parallel import Ranks, shard
from data import IGNORE, Batch, Format, Samples, encode, eos_id
from hub.check import image_problems
from hub.checkpoint import checkpoint_folder, is_released, is_whole, released_tower
from hub.configs import decoder_config, load_processor, read_config, vision_config
from hub.connectors import make_connector, name_of, read_connector
from hub.pairs import held_out
from hub.released import load_llm, load_moca, load_projector, load_vision, start_qformer
from hub.samples import SampleFile, read_samples
from hub.tensors import weight_files
from hub.tokenizer import load_tokenizer
from hub.usage import read_usage
from losses import LOSSES, Objective
from methods.lora import lora_start
from model import Decoder, DecoderConfig, DecoderLayer, Llava, Projector, VisionConfig, ViT
from training.settings import RANDOM, START, TrainConfig, starts_qformer, stores_all


# ----------------------------------------------------------------------------------- before the run
def check_folders(cfg: TrainConfig) -> None:
    """Raise UserError if a folder cannot be what its flag says. Reads no weights."""
    vision_config(cfg.vision)
    layers = decoder_config(cfg.llm).num_hidden_layers
    if cfg.basic_k and cfg.basic_k > layers:
        raise UserError(f"--basic-k {cfg.basic_k}, but {cfg.llm} has {layers} layers")
    if cfg.projector in (None, RANDOM) or starts_qformer(cfg):
        return
    path = start_folder(cfg)
    if not is_foreign(path) and is_whole(path):
        for other in (Path(cfg.vision).resolve(), Path(cfg.llm).resolve()):
            if other != path.resolve():
                raise UserError(f"{path} trained more than its projector, which {other} would "
                                f"leave behind: add --vision {path} --llm {path}")


def is_foreign(folder: Path) -> bool:
    """True for a projector not trained here: LLaVA's mm_projector.bin, or a released LLaVA."""
    return (folder / "mm_projector.bin").is_file() or is_released(folder)


def start_folder(cfg: TrainConfig) -> Path:
    """Return the folder that --projector means: a stage-1 checkpoint, or a released LLaVA."""
    if starts_qformer(cfg) or is_foreign(Path(cfg.projector)):
        return Path(cfg.projector)
    path = checkpoint_folder(cfg.projector)
    stage = read_config(path, "stage")["stage"]
    if stage != "pretrain":
        raise UserError(f"{path} is a {stage} checkpoint; --projector takes a pretrain checkpoint")
    return path


def check_objective(cfg: TrainConfig) -> None:
    """Try the objective on a tiny model. Raises UserError for a term without a count in LOSSES."""
    layers = decoder_config(cfg.llm).num_hidden_layers
    with torch.random.fork_rng(devices=[]):
        model = Llava(ViT(VisionConfig(8, 8, 2, 1, 4, 2)), Projector(8, 8),
                      Decoder(DecoderConfig(8, 8, 8, layers, 1)))
    ids = torch.tensor([[1, 0, 0, 0, 0, 2, 3]])           # four image tokens, then two words
    image, yes = ids == 0, torch.ones(1, dtype=torch.bool)
    labels, pixels = ids.masked_fill(image, IGNORE), torch.zeros(1, 3, 4, 4)
    batch = Batch(ids, labels, image, ids >= 0, pixels, yes, yes)
    with torch.no_grad():
        names = [term.name for term in Objective(model, cfg)(batch)]
    missing = [name for name in names if name not in LOSSES[cfg.loss].counts]
    if missing:
        raise UserError(f"losses.LOSSES[{cfg.loss!r}] has no count for {', '.join(missing)}: say "
                        "there what this term is divided by")


# ---------------------------------------------------------------------------------------- the model
def is_trained(name: str, cfg: TrainConfig, vision_layers: int, llm_layers: int) -> bool:
    """True if the parameter of this name in `Llava` is trained.

    half is what the MIR paper's code does in stage 1: the upper half of the vision encoder's layers
    (ShareGPT4V's choice), the lower half of the language model's, nothing outside of layers. Never
    trained: the vision encoder's last layer and the norm after it, which are not used."""
    part, rest = name.split(".", 1)
    found = re.search(r"\.layers\.(\d+)\.", rest)
    layer = int(found[1]) if found else None
    if part == "vision_tower":
        if rest.startswith("post_layernorm") or layer == vision_layers - 1:
            return False
        if cfg.unlock_vision == "half":
            return layer is not None and layer >= vision_layers // 2
        return cfg.unlock_vision == "all"
    if part == "language_model":
        if rest.startswith("moca.") and cfg.moca:
            return True
        if cfg.unlock_llm == "lora":
            return "lora_" in rest
        if cfg.unlock_llm == "half":
            return layer is not None and layer < llm_layers // 2
        return cfg.unlock_llm == "all"
    return True                                           # the projector


def tower_config(cfg: TrainConfig) -> VisionConfig:
    if is_released(cfg.vision):
        tower, _ = released_tower(Path(cfg.vision), None)
    else:
        tower = vision_config(cfg.vision)
    return replace(tower, drop_first_patch=cfg.drop_first_patch or tower.drop_first_patch)


def llm_config(cfg: TrainConfig, folder: str | Path) -> DecoderConfig:
    config = decoder_config(folder)
    if cfg.unlock_llm == "lora" and not config.lora_rank:
        return replace(config, lora_rank=cfg.lora_rank, lora_alpha=cfg.lora_alpha)
    return config


def compile_block(block: nn.Module, **options) -> None:
    """Compile a layer once for all lengths. FSDP's hooks and attention maps stay outside."""
    name = "compute" if isinstance(block, DecoderLayer) else "forward"
    setattr(block, name, torch.compile(getattr(block, name), dynamic=name == "compute", **options))


def build(cfg: TrainConfig, ckpt: Path | None, ranks: Ranks) -> Llava:
    """Build the model of a stage from released folders, or from the checkpoint to resume.

    Trained parameters are float32 and require gradients; frozen ones are in the dtype of computing.
    Which are trained is decided on the meta device, before anything is read. If ranks share the
    model, its blocks are sharded there too."""
    whole = ckpt is not None and stores_all(cfg)
    vision_folder, llm_folder = (ckpt, ckpt) if whole else (cfg.vision, cfg.llm)
    v, t = tower_config(cfg), llm_config(cfg, llm_folder)

    def trained(part: str, name: str) -> bool:
        return is_trained(f"{part}.{name}", cfg, v.num_hidden_layers, t.num_hidden_layers)

    def dtype(part: str, name: str) -> torch.dtype:
        return torch.float32 if trained(part, name) else ranks.dtype

    def prepare(part: str, module: nn.Module) -> None:
        for name, p in module.named_parameters():
            p.requires_grad_(trained(part, name))
        for block in (module.encoder if part == "vision_tower" else module.model)["layers"]:
            if cfg.compile:
                compile_block(block)
            if ranks.mesh is not None:
                shard(block, ranks)

    def new(name: str, shape: torch.Size) -> torch.Tensor | None:
        return None if whole else lora_start(name, shape, cfg.seed)

    vision = load_vision(vision_folder, partial(dtype, "vision_tower"), ranks.device, v,
                         partial(prepare, "vision_tower"))
    llm = load_llm(llm_folder, partial(dtype, "language_model"), ranks.device, t,
                   partial(prepare, "language_model"), new)
    projector, layer = load_start(cfg, ckpt, llm, v.hidden_size, ranks)
    if cfg.moca and not llm.config.moca:
        llm.add_moca()
    if cfg.moca:
        llm.moca.to(ranks.device, torch.float32).requires_grad_(True)
    llm.recomputed = cfg.gradient_checkpointing
    return Llava(vision, projector, llm, layer)


def load_start(cfg: TrainConfig, ckpt: Path | None, llm: nn.Module, vision_size: int,
               ranks: Ranks) -> tuple[nn.Module, int]:
    """Return the connector of the checkpoint to resume or of --projector, else a random one, and
    the layer of the vision encoder that it reads. Puts MoCa trained beside a stored projector into
    `llm`. Raises UserError if --connector asks for another one."""
    source = ckpt
    if source is None and cfg.projector not in (None, RANDOM) and not starts_qformer(cfg):
        source = start_folder(cfg)
    if source is None:
        torch.manual_seed(cfg.seed)
        projector = make_connector(cfg.connector or "mlp2x", vision_size, llm.config.hidden_size)
        list(projector.children())[-1].weight.data *= cfg.projector_scale
        if starts_qformer(cfg):
            new = start_qformer(projector, cfg.projector)
            if ranks.first:
                print(f"the Q-Former of {cfg.projector}, but for {len(new)} tensors of other "
                      "shapes, which are new")
        return projector.to(ranks.device), -2
    if not (source == ckpt and stores_all(cfg)):
        load_moca(source, llm, torch.float32, ranks.device)
    known = (source / "config.json").is_file()            # not beside mm_projector.bin alone
    layer = read_usage(source, cfg.vision).layer if known else -2
    read = layer % (tower_config(cfg).num_hidden_layers + 1)          # how many layers of the tower
    if cfg.unlock_vision != "none" and read != tower_config(cfg).num_hidden_layers - 1:
        raise UserError(f"--unlock-vision trains towers that are read before their last layer, but {source} reads "
                        f"layer {layer}: leave it out")
    width = llm.config.hidden_size
    projector = load_projector(source, vision_size, width, torch.float32, ranks.device)
    if cfg.connector and read_connector(cfg.connector) != read_connector(name_of(projector)):
        raise UserError(f"--connector {cfg.connector}, but {source} has {name_of(projector)}: "
                        "leave the flag out")
    return projector, layer


def parameter_groups(model: Llava, cfg: TrainConfig) -> list[dict]:
    """Return the trained parameters by peak learning rate. Their order is the same on all ranks."""
    rates = {"vision_tower": cfg.vision_lr, "multi_modal_projector": cfg.projector_lr}
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            peak = rates.get(name.split(".")[0]) or cfg.lr
            groups.setdefault(peak, []).append(p)
    return [{"params": ps, "peak": peak, "lr": peak} for peak, ps in groups.items()]


# -------------------------------------------------------------------------------------- the samples
def read_together(path: str | Path, ranks: Ranks) -> tuple[SampleFile, int]:
    """read_samples on all ranks. The first one of a machine makes the index that others read."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        read_samples(path)
    ranks.wait()
    return read_samples(path)


def load_data(cfg: TrainConfig, out: Path, ranks: Ranks, image_tokens: int) -> tuple[Samples, list[str]]:
    """Return the samples of a stage, checked, and the images that cannot be used: without
    --skip-bad-images, these raise UserError before any step. image_tokens: of an image."""
    path, images = cfg.data, cfg.images
    if path is None:
        path, images = out / "data" / f"{cfg.stage}.json", out / "data" / "images"
    samples, unanswered = read_together(path, ranks)
    if images is None and samples.column("image").any():
        raise UserError(f"{path} names images: add --images with the folder they are in")

    tokenizer = load_tokenizer(cfg.llm, cfg.plain_specials)
    eos_id(tokenizer, cfg.template)                       # raises for another family's template
    processor, vision = load_processor(cfg.vision), tower_config(cfg)
    if processor.crop_size != vision.image_size:
        raise UserError(f"{cfg.vision}: preprocessor_config.json makes images of "
                        f"{processor.crop_size} pixels, but config.json wants {vision.image_size}: "
                        "they belong to two models")
    pad = cfg.stage == "finetune"
    text = Format(cfg.template, image_tokens, cfg.max_length, pad, cfg.after_special)
    data = Samples(samples, images or ".", tokenizer, processor, text, cfg.vdep_joint)

    # Every image is opened once before the first step.
    found = ranks.gather(image_problems(samples, images or ".") if ranks.first else None)[0]
    bad = [f"{images}/{name}: {why}" for name, why in found.items()]
    if bad and not cfg.skip_bad_images:
        more = "; …" if len(bad) > 5 else ""
        raise UserError(f"{len(bad)} images cannot be used ({'; '.join(bad[:5])}{more}): repair "
                        "them, or leave their samples out with --skip-bad-images")
    spoiled = samples.with_image(list(found))
    samples.keep(~spoiled)
    if not len(data):
        raise UserError(f"{path}: no samples left ({unanswered} have no answer, {spoiled.sum()} no "
                        "usable image)")
    check_targets(data)
    if ranks.first:
        report_data(cfg, path, len(data), unanswered, int(spoiled.sum()), len(bad))
    return data, bad


def fingerprints(cfg: TrainConfig, data: Samples, ckpt: Path | None) -> dict[str, str]:
    """Return name → hash of what a stage reads: other files on --resume or on a rank change losses.
    Of a folder: its weights and the JSON beside them. What the stage starts from (START) is
    compared between ranks alone, as a run makes new ones."""
    folders = {flag("vision"): cfg.vision, flag("llm"): cfg.llm}
    if ckpt or cfg.projector not in (None, RANDOM):
        folders[START] = ckpt or start_folder(cfg)
    found = {f"the --data of {cfg.stage}": data.samples.fingerprint()}
    for name, folder in folders.items():
        files = set(weight_files(Path(folder)))           # TinyLLaVA's lie in folders of their own
        for path in Path(folder).iterdir():
            if path.suffix in (".json", ".model") or path.name == "merges.txt":
                files.add(path)
        found[name] = files_digest(sorted(files))
    return found


def check_targets(data: Samples) -> None:
    """Raise UserError if --max-length leaves no sample an answer. Encodes samples until one has."""
    f = data.format
    for i in range(len(data)):
        labels = encode(data.samples[i]["conversations"], data.tokenizer, f.template,
                        f.image_tokens, f.max_length, f.after_special)[1]
        if (labels != IGNORE).any():
            return
    raise UserError(f"--max-length {f.max_length} leaves no sample an answer to train on; an image "
                    f"takes {f.image_tokens} positions")


def report_data(cfg: TrainConfig, path: Path, usable: int, unanswered: int, spoiled: int, bad: int) -> None:
    notes = [f"{cfg.stage}: {usable} samples from {path}"]
    if unanswered:
        notes.append(f"{unanswered} without an answer left out")
    if spoiled:
        notes.append(f"{spoiled} left out for {bad} bad images")
    print(", ".join(notes))
    if usable < cfg.global_batch:
        print(f"warning: {usable} samples are fewer than a global batch: "
              f"{cfg.global_batch - usable} of its {cfg.global_batch} places hold fillers that "
              "train nothing; a smaller --global-batch has none")


def mir_pairs(cfg: TrainConfig, data: Samples, out: Path) -> list[Batch]:
    """Return the pairs that --mir-every measures on; an empty list without it."""
    if not cfg.mir_every:
        return []
    images = cfg.images or out / "data" / "images"
    return held_out(data, Path(cfg.mir_data or out / "data" / "val.jsonl"), images)
