"""Train the two backbones shipped beside this file: a tiny CLIP (toy/clip), a tiny LLaMA (toy/llm).

    python -m toy.backbones

They are saved as released checkpoints are, so that the toy runs the code that real weights run:
config.json, model.safetensors (fp16, Hugging Face names), preprocessor_config.json, tokenizer.json
in Llama-2's style. Both see all 16 shape-colour pairs. The LLaMA sees no picture: it learns the
words, and to look things up in what it has read.

About 1 minute for the CLIP and 13 for the LLaMA on one core. The CLIP reaches an in-batch top-1 of
.85. What the LLaMA reads correctly is printed at the end: everything, in the shipped one (seed 0).
Stopped at 1500 steps it binds nothing (row, column and colour at 70 %, "adversarial" at chance),
and stage 2 with it comes no further than a mean of 80 %.
"""
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from tqdm import tqdm

from common.flags import option, parse, run
from model import Decoder, DecoderConfig, VisionConfig, ViT, ViTAttention, ViTLayer
from toy import world

SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")   # Vicuna v1
BOS, EOS = 1, 2


# ---------------------------------------------------------------------------------------- tokenizer
def make_tokenizer(rng, documents=3000):
    """Train a BPE tokenizer as Llama-2's: a word of the toy is one token, as is the prompt."""
    texts = [SYSTEM, *world.REQUESTS, "USER: ASSISTANT:"] * documents
    for kind in (paraphrases, facts, chat):
        for _ in range(documents):
            texts.append("".join(text for text, _ in kind(rng)).removeprefix(SYSTEM))
    texts = [" " + text.replace("\n", " ").replace("</s>", " ") for text in texts]
    # What follows </s> or a newline has no space before it. Counted more often than with a space,
    # so that "USER" forms before "▁USER" does, and both are pieces.
    texts += ["USER", "Which", "What", "Is", "How"] * 30 * documents
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    words = Regex("▁?[A-Za-z']+|[^A-Za-z'▁]|▁")                     # merges stay in words
    learner.pre_tokenizer = pre_tokenizers.Split(words, "isolated")
    learner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=2000, show_progress=False))
    learnt = json.loads(learner.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    pieces += sorted(learnt["vocab"], key=learnt["vocab"].get)
    merges = [tuple(m) for m in learnt["merges"]]
    parts = learner.encode(" " + SYSTEM).tokens
    for i in range(1, len(parts)):              # last merges: the system prompt becomes one token
        merges.append(("".join(parts[:i]), parts[i]))
        pieces.append("".join(parts[:i + 1]))

    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges,
                                     unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                                 normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                           decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B",
                                                             [("<s>", BOS)])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True)
                                  for t in pieces[:3]])
    return tokenizer


# ------------------------------------------------------------------------------- text for the LLaMA
def chat(rng, count=None, turns=8):
    """A scene in words, then questions, in the template of stage 2: [(text, True to learn it)]."""
    scene = world.draw_scene(rng, count)
    parts = [(f"{SYSTEM} USER: {world.long_caption(scene, rng)} \n", False)]
    for i in range(turns):
        question, answer = world.ask(scene, rng.choice(world.CATEGORIES), rng, avoid=())
        user = "USER: " if i > 0 else ""
        parts += [(f"{user}{question} ASSISTANT:", False), (f" {answer}</s>", True)]
    return parts


def paraphrases(rng, count=None):
    """A caption that says everything, then two more of the scene, long or short, reordered."""
    scene = world.draw_scene(rng, count)
    parts = [(world.long_caption(scene, rng), False)]
    return parts + [(f"\n{world.caption(scene, rng)}\n", True) for _ in range(2)]


def facts(rng, count=None, number=12):
    """A scene in words, then terse facts, noun first: many of the look-ups that questions need."""
    scene = world.draw_scene(rng, count)
    things = {shape: (row, column, colour) for row, column, colour, shape in scene}
    parts = [(world.long_caption(scene, rng), False)]
    for _ in range(number):
        shape, colour = rng.choice(world.SHAPES), rng.choice(list(world.COLOURS))
        ask, answer = f" {shape}", " No,"
        if shape in things:
            row, column, true_colour = things[shape]
            if rng.random() < .3:               # " red circle" → " Yes,"
                colour = rng.choice([colour, true_colour])
                ask, answer = f" {colour} {shape}", " Yes," if colour == true_colour else " No,"
            else:                               # " circle" → " red top left,"
                answer = f" {true_colour} {row} {column},"
        parts += [(ask, False), (answer, True)]
    return parts


def text_batch(tokenizer, rng, size, count):
    """Return ids and weights, (B,T): 1 for what follows from the scene, .1 else, 0 for padding."""
    documents = [rng.choice((paraphrases, chat, facts, facts))(rng, count) for _ in range(size)]
    encodings = tokenizer.encode_batch(["".join(text for text, _ in parts) for parts in documents])
    user, prefixed = tokenizer.token_to_id("USER"), tokenizer.token_to_id("▁USER")
    rows = []
    for parts, encoding in zip(documents, encodings):
        weight = []                             # of each character
        for text, learn in parts:
            weight += [1. if learn else .1] * len(text)
        weights = [weight[max(end, 1) - 1] for _, end in encoding.offsets]
        # as LLaVA's: no space after </s>
        ids = [user if token == prefixed and last == EOS else token
               for last, token in zip([0] + encoding.ids, encoding.ids)]
        rows.append((torch.tensor(ids), torch.tensor(weights)))
    return tuple(nn.utils.rnn.pad_sequence(column, batch_first=True) for column in zip(*rows))


# --------------------------------------------------------------------------------------------- CLIP
class CausalAttention(ViTAttention):
    """The text tower's attention: a word sees those before it."""
    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                   for p in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)                      # (B,H,T,d)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class TextTower(nn.Module):
    """CLIP's text tower; embedding, positions and names as in transformers."""
    def __init__(self, c):
        super().__init__()
        self.embeddings = nn.ModuleDict({
            "token_embedding": nn.Embedding(c["vocab_size"], c["hidden_size"]),
            "position_embedding": nn.Embedding(c["max_position_embeddings"], c["hidden_size"])})
        layer = VisionConfig(c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"],
                             c["num_attention_heads"])
        blocks = nn.ModuleList(ViTLayer(layer) for _ in range(layer.num_hidden_layers))
        for block in blocks:
            block.self_attn = CausalAttention(layer)
        self.encoder = nn.ModuleDict({"layers": blocks})
        self.final_layer_norm = nn.LayerNorm(c["hidden_size"])
        self.eos = c["eos_token_id"]

    def forward(self, ids):  # (B,T), padded with eos
        places = self.embeddings["position_embedding"].weight[:ids.shape[1]]                # (T,D)
        x = self.embeddings["token_embedding"](ids) + places
        for block in self.encoder["layers"]:
            x = block(x)
        first = (ids == self.eos).int().argmax(-1)
        return self.final_layer_norm(x)[torch.arange(len(x)), first]                        # (B,D)


class CLIP(nn.Module):
    def __init__(self, config):
        super().__init__()
        vision, size = config["vision_config"], config["projection_dim"]
        fields = {k: vision[k] for k in VisionConfig.__dataclass_fields__ if k in vision}
        self.vision_model = ViT(VisionConfig(**fields))
        self.text_model = TextTower(config["text_config"])
        self.visual_projection = nn.Linear(vision["hidden_size"], size, bias=False)
        self.text_projection = nn.Linear(config["text_config"]["hidden_size"], size, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / .07)))

    def embed_images(self, pixel_values):
        x = self.vision_model.post_layernorm(self.vision_model.hidden_state(pixel_values, -1)[:, 0])
        return F.normalize(self.visual_projection(x), dim=-1)                               # (B,P)

    def embed_texts(self, ids):
        return F.normalize(self.text_projection(self.text_model(ids)), dim=-1)              # (B,P)


MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]       # CLIP's


def pixels(images):
    """PIL images → (B,3,H,W), normalised as CLIP does."""
    x = torch.from_numpy(np.stack([np.asarray(image) for image in images])).float() / 255
    return ((x - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)


def clip_ids(tokenizer, captions):
    """Encode captions for the text tower: toy/llm's ids, then an end token, the highest id."""
    end = tokenizer.get_vocab_size()
    rows = [torch.tensor(e.ids + [end]) for e in tokenizer.encode_batch(captions)]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=end)             # (B,T)


def clip_config(tokenizer):
    end = tokenizer.get_vocab_size()
    text = {"model_type": "clip_text_model", "hidden_act": "quick_gelu", "hidden_size": 64,
            "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_position_embeddings": 32, "vocab_size": end + 1, "bos_token_id": BOS,
            "eos_token_id": end, "pad_token_id": end, "layer_norm_eps": 1e-5,
            "attention_dropout": 0.0, "projection_dim": 64}
    vision = {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", "hidden_size": 96,
              "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4,
              "image_size": world.SIZE, "patch_size": world.CELL,
              "num_channels": 3, "layer_norm_eps": 1e-5, "attention_dropout": 0.0,
              "projection_dim": 64}
    return {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 64,
            "logit_scale_init_value": 2.6592, "text_config": text, "vision_config": vision,
            "torch_dtype": "float16"}


def train_clip(tokenizer, rng, steps=450, batch=128, lr=1.5e-3):
    config = clip_config(tokenizer)
    clip = CLIP(config)
    places = clip.vision_model.embeddings.position_embedding.weight
    nn.init.normal_(places, std=1.)             # with .02 the model learns no places
    nn.init.normal_(clip.vision_model.embeddings.class_embedding, std=.1)
    nn.init.normal_(clip.text_model.embeddings["token_embedding"].weight, std=.5)
    nn.init.normal_(clip.text_model.embeddings["position_embedding"].weight, std=.3)
    for _ in (bar := tqdm(optimise(clip, steps, lr, weight_decay=.1), "CLIP", steps)):
        scenes = [world.draw_scene(rng) for _ in range(batch)]
        captions = [world.caption(s, rng) for s in scenes]
        images = clip.embed_images(pixels([world.render(s, rng) for s in scenes]))          # (B,P)
        texts = clip.embed_texts(clip_ids(tokenizer, captions))                             # (B,P)
        logits = clip.logit_scale.clamp(max=math.log(100)).exp() * images @ texts.T          # (B,B)
        target = torch.arange(batch)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        loss.backward()
        top1 = (logits.argmax(1) == target).float().mean()
        bar.set_postfix(loss=f"{loss.item():.2f}", top1=f"{top1:.2f}")
    return clip, config


def optimise(model, steps, lr, weight_decay):
    """Yield step numbers; the caller runs backward. AdamW, clip 1, 3 % warm-up, cosine to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, (.9, .95), weight_decay=weight_decay)
    for step in range(steps):
        yield step
        nn.utils.clip_grad_norm_(model.parameters(), 1.)
        warm_up, cosine = (step + 1) / (.03 * steps), .5 + .5 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, warm_up, cosine)
        optimizer.step()
        optimizer.zero_grad()


# -------------------------------------------------------------------------------------------- LLaMA
def train_llama(tokenizer, rng, steps=4000, batch=32, lr=3e-3):
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
              "vocab_size": tokenizer.get_vocab_size(), "hidden_size": 96, "intermediate_size": 256,
              "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
              "hidden_act": "silu", "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
              "rope_theta": 10000.0, "rope_scaling": None, "attention_bias": False,
              "tie_word_embeddings": False, "initializer_range": 0.02, "bos_token_id": BOS,
              "eos_token_id": EOS, "use_cache": True, "torch_dtype": "float16"}
    fields = {k: config[k] for k in DecoderConfig.__dataclass_fields__ if k in config}
    llama = Decoder(DecoderConfig(**fields))
    for name, p in llama.named_parameters():
        if p.dim() == 2:                        # words of .02 would drown after a layer
            nn.init.normal_(p, std=.5 if "embed_tokens" in name else .02)
    for layer in llama.model["layers"]:         # W_k = W_q: like finds like, as looking up needs
        nn.init.normal_(layer.self_attn.q_proj.weight, std=96 ** -.5)
        layer.self_attn.k_proj.weight.data.copy_(layer.self_attn.q_proj.weight)
    for step in (bar := tqdm(optimise(llama, steps, lr, weight_decay=.01), "LLaMA", steps)):
        count = None                            # of objects: any. Easy scenes come first.
        if step < .1 * steps:
            count = 1
        elif step < .2 * steps:
            count = rng.randint(1, 2)
        ids, weights = text_batch(tokenizer, rng, batch, count)
        logits = llama.lm_head(llama(llama.model["embed_tokens"](ids[:, :-1])))  # (B,T,V)
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (loss * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        loss.backward()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return llama, config


@torch.no_grad()
def reading(llama, tokenizer, number=200):
    """Measure the accuracy of answers about fresh scenes in words, {category: fraction}."""
    rng, right = random.Random(-1), {}
    for category in world.CATEGORIES:
        hits = 0
        for i in range(number):
            scene = world.draw_scene(rng, i % 3 + 1)
            question, answer = world.ask(scene, category, rng, avoid=())
            text = f"{SYSTEM} USER: {world.long_caption(scene, rng)} \n{question} ASSISTANT:"
            ids = torch.tensor([tokenizer.encode(text).ids])                                # (1,T)
            logits = llama.lm_head(llama(llama.model["embed_tokens"](ids))[:, -1])          # (1,V)
            hits += logits.argmax().item() == tokenizer.token_to_id("▁" + answer)
        right[category] = hits / number
    return right


# -------------------------------------------------------------------------------------------- files
def save(folder, module, config, **files):
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().half().contiguous() for name, p in module.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for name, content in {"config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")


@dataclass
class BackboneFlags:
    """Train the toy's two backbones and write them as released checkpoints are."""
    out: str | None = option(None, "folder for clip/ and llm/ (unset: this repository's toy/)")
    seed: int = option(0, "of the weights and the texts")
    only: Literal["clip", "llm"] | None = option(None, "make this one alone (unset: both)")


def main():
    flags = parse(BackboneFlags)
    out = Path(flags.out or Path(__file__).parent)
    rng = random.Random(flags.seed)
    tokenizer = make_tokenizer(rng)
    torch.manual_seed(flags.seed)
    if flags.only != "llm":
        clip, config = train_clip(tokenizer, rng)
        size = {"height": world.SIZE, "width": world.SIZE}
        save(out / "clip", clip, config, preprocessor_config={
            "image_processor_type": "CLIPImageProcessor",
            "feature_extractor_type": "CLIPFeatureExtractor", "do_convert_rgb": True,
            "do_resize": True, "size": {"shortest_edge": world.SIZE}, "resample": 3,
            "do_center_crop": True, "crop_size": size, "do_rescale": True,
            "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": MEAN, "image_std": STD})
    rng = random.Random(flags.seed)
    torch.manual_seed(flags.seed)
    if flags.only != "clip":
        llama, config = train_llama(tokenizer, rng)
        print("reads correctly:", reading(llama, tokenizer))
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        save(out / "llm", llama, config,
             generation_config={"_from_model_config": True, "bos_token_id": BOS,
                                "eos_token_id": EOS},
             tokenizer_config={"tokenizer_class": "LlamaTokenizer", "legacy": False,
                               "add_bos_token": True, "add_eos_token": False,
                               "clean_up_tokenization_spaces": False, "model_max_length": 256,
                               "padding_side": "right", **special},
             special_tokens_map=special)
        tokenizer.save(str(out / "llm" / "tokenizer.json"))


if __name__ == "__main__":
    run(main)
