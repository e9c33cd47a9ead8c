"""The model: vision encoder → projector → decoder language model.

    pixel_values (B,3,H,W) ─ ViT ─→ (B,N,Dv) ─ Projector ─→ image_embeds (B,N,D) ┐
    input_ids    (B,T)     ─ embed_tokens ─────────────────→ (B,T,D) ────────────┴→ Decoder → hidden_states (B,T,D)

Modules carry the parameter names of the released Hugging Face checkpoints, so that loading and saving need no
translation. Only what is trained or read is computed: no logits (methods/ce.py makes those it needs), no attention
maps unless somebody asks, no layer of the vision encoder beyond the one that is used.

Shape letters: B samples · T sequence positions · N image tokens · D decoder width · Dv vision width · H heads ·
K key/value heads · d head width · S cached positions · M marked query rows.
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from lora import linear
from methods.moca import MoCa


@dataclass
class VisionConfig:
    """CLIP's or SigLIP's vision tower; fields and defaults as in CLIP's released `vision_config`."""
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"
    class_token: bool = True                     # CLIP: and a norm in front. SigLIP: neither, but a bias on patches
    drop_first_patch: bool = False               # TinyLLaVA drops SigLIP's first patch as if it were a class token

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def image_tokens(self) -> int:
        return self.num_patches - self.drop_first_patch


@dataclass
class DecoderConfig:
    """LLaMA and its relatives; fields and defaults as in LLaMA's released `config.json`, then what the others need."""
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None       # None: as many as query heads
    head_dim: int | None = None                  # None: hidden_size / heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    norm: str = "rms"                            # "layer": Phi-2
    norm_plus_one: bool = False                  # Gemma multiplies by 1 + weight
    hidden_act: str = "silu"
    gated: bool = True                           # the MLP; not in Phi-2
    bias: bool = False                           # of every linear map in a layer: Phi-2
    head_bias: bool = False
    parallel: bool = False                       # attention and MLP side by side, under one norm: Phi-2
    partial_rotary_factor: float = 1.0           # the share of a head's width that is rotated
    sliding_window: int | None = None            # a token sees itself and the window − 1 before it
    embed_scale: float = 1.0                     # of word embeddings: sqrt(hidden_size) in Gemma
    moca: bool = False                           # an affine map of the image tokens after every layer: methods/moca.py
    lora_rank: int = 0                           # of an update beside every linear map in a layer: lora.py. 0: none
    lora_alpha: float = 0.0                      # the update is scaled by alpha / rank

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads


ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu, "silu": F.silu,
               "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


# ------------------------------------------------------------------------------------------------ vision encoder
class ViTEmbeddings(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(c.hidden_size)) if c.class_token else None
        self.patch_embedding = nn.Conv2d(3, c.hidden_size, c.patch_size, stride=c.patch_size, bias=not c.class_token)
        self.position_embedding = nn.Embedding(c.num_patches + c.class_token, c.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        pixel_values = pixel_values.to(self.patch_embedding.weight.dtype)
        x = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)                   # (B,N,Dv)
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1).to(x.dtype), x], dim=1)
        return x + self.position_embedding.weight                                           # (B,N or 1+N,Dv)


class ViTAttention(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.num_heads = c.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(c.hidden_size, c.hidden_size) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)                 # (B,H,1+N,d)
                   for p in (self.q_proj, self.k_proj, self.v_proj))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(x.transpose(1, 2).flatten(2))                                  # (B,1+N,Dv)


class ViTMLP(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.fc2 = nn.Linear(c.intermediate_size, c.hidden_size)
        self.act = ACTIVATIONS[c.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class ViTLayer(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.self_attn = ViTAttention(c)
        self.layer_norm2 = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.mlp = ViTMLP(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ViT(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = ViTEmbeddings(config)
        if config.class_token:
            self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # CLIP's own spelling
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList(ViTLayer(config) for _ in range(config.num_hidden_layers))})
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)   # unused here; saved back

    def hidden_state(self, pixel_values: Tensor, layer: int) -> Tensor:
        """`hidden_states[layer]` of transformers: 0 is the embeddings, -1 the last layer's output; (B,1+N,Dv) with the
        class token, (B,N,Dv) where there is none."""
        x = self.embeddings(pixel_values)
        if self.config.class_token:
            x = self.pre_layrnorm(x)
        layers = self.encoder["layers"]
        for block in layers[:layer if layer >= 0 else len(layers) + 1 + layer]:
            x = block(x)
        return x

    def forward(self, pixel_values: Tensor, layer: int = -2) -> Tensor:
        """Patch features (B,N,Dv) of LLaVA: the last layer but one, class token dropped."""
        return self.hidden_state(pixel_values, layer)[:, int(self.config.class_token or self.config.drop_first_patch):]


# ------------------------------------------------------------------------------------------------ projector
class Projector(nn.Module):
    """LLaVA-1.5's two-layer MLP."""
    def __init__(self, vision_size: int, hidden_size: int):
        super().__init__()
        self.linear_1 = nn.Linear(vision_size, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


# ------------------------------------------------------------------------------------------------ decoder
class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, plus_one: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.plus_one = eps, plus_one

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.plus_one:
            return (y * (1 + self.weight.float())).to(x.dtype)
        return self.weight.to(x.dtype) * y.to(x.dtype)         # this order of casts is what the checkpoints expect


def make_norm(c: DecoderConfig) -> nn.Module:
    if c.norm == "layer":
        return nn.LayerNorm(c.hidden_size, eps=c.rms_norm_eps)
    return RMSNorm(c.hidden_size, c.rms_norm_eps, c.norm_plus_one)


def rotary(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, (…,T,d), computed in float32; not buffers, so nothing can be left behind on the meta device."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[..., None].float() * (1.0 / theta ** exponents)                     # (…,T,d/2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (i, i + r/2) of the first r dimensions, r the width of cos: the layout of Hugging Face weights
    (Meta's own pair 2i with 2i + 1)."""
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat([rotate(x[..., :width], cos, sin), x[..., width:]], dim=-1)
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


@torch.no_grad()
def attention_to_image(q: Tensor, k: Tensor, rows: Tensor, image_columns: Tensor, window: int | None = None,
                       chunk: int = 64) -> Tensor:
    """Attention probabilities from marked rows to the image positions, averaged over heads.

    q (B,H,T,d) and k (B,K,T,d) after rotation; rows (B,M) positions of the marked queries, image_columns (B,N)
    positions of the image tokens, -1 where there is none (those entries of the result are 0). Softmax over all
    visible keys; returns (B,M,N) float32. Fused attention returns no probabilities, so they are computed here for
    the marked rows alone, `chunk` rows at a time: the (B,H,T,T) tensor never exists."""
    B, H, T, d = q.shape
    k = k.repeat_interleave(H // k.shape[1], dim=1)
    columns = torch.arange(T, device=q.device)
    out = []
    for r in rows.split(chunk, dim=1):                                                      # (B,m)
        q_rows = q.gather(2, r.clamp(min=0)[:, None, :, None].expand(B, H, -1, d))          # (B,H,m,d)
        scores = (q_rows @ k.transpose(2, 3)).float() * d ** -0.5                           # (B,H,m,T)
        distance = r.clamp(min=0)[:, None, :, None] - columns                               # (B,1,m,T)
        scores = scores.masked_fill(~visible(distance, window), -torch.inf)
        p = scores.softmax(-1).mean(1)                                                      # (B,m,T)
        p = p.gather(2, image_columns.clamp(min=0)[:, None].expand(-1, r.shape[1], -1))     # (B,m,N)
        out.append(p * (r >= 0)[:, :, None] * (image_columns >= 0)[:, None])
    return torch.cat(out, dim=1)


def visible(distance: Tensor, window: int | None) -> Tensor:
    """May a query see a key that lies `distance` tokens before it?"""
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


class Attention(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.head_dim, self.window = c.head_dim, c.sliding_window
        self.q_proj = linear(c.hidden_size, c.num_attention_heads * c.head_dim, c)
        self.k_proj = linear(c.hidden_size, c.num_key_value_heads * c.head_dim, c)
        self.v_proj = linear(c.hidden_size, c.num_key_value_heads * c.head_dim, c)
        self.o_proj = linear(c.num_attention_heads * c.head_dim, c.hidden_size, c)

    def forward(self, x: Tensor, rope, mask=None, cache=None) -> tuple[Tensor, Tensor, Tensor]:
        """(B,T,D) → what attention adds (B,T,D), and rotated queries (B,H,T,d) and keys (B,K,T,d)."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)                  # (B,H or K,T,d)
                   for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rope), rotate(k, *rope)
        gqa = q.shape[1] != k.shape[1]
        if cache is not None:
            keys, values, rows, positions, end = cache                                      # (B,K,S,d) twice
            keys[rows[:, None], :, positions] = k.transpose(1, 2)                           # (b,T,K,d) into them
            values[rows[:, None], :, positions] = v.transpose(1, 2)
            if end is not None:
                k, v = keys[:, :, :end], values[:, :, :end]
        # Right padding: a real token never sees a pad, because pads come later. No mask is needed.
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)
        return self.o_proj(y.transpose(1, 2).flatten(2)), q, k


class MLP(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.gate_proj = linear(c.hidden_size, c.intermediate_size, c) if c.gated else None
        self.up_proj = linear(c.hidden_size, c.intermediate_size, c)
        self.down_proj = linear(c.intermediate_size, c.hidden_size, c)
        self.act = ACTIVATIONS[c.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(x)))
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.input_layernorm = make_norm(c)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = None if c.parallel else make_norm(c)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, rope, mask=None, cache=None, asked=None) -> tuple[Tensor, Tensor | None]:
        normed = self.input_layernorm(x)
        y, q, k = self.self_attn(normed, rope, mask, cache)
        if self.post_attention_layernorm is None:
            x = x + y + self.mlp(normed)
        else:
            x = x + y
            x = x + self.mlp(self.post_attention_layernorm(x))
        # Last of all: what activation checkpointing runs again ends before it, for nothing here is needed backward.
        return x, None if asked is None else attention_to_image(q, k, *asked, self.self_attn.window)


class KVCache:
    """Keys and values of every layer, (L,B,K,S,d), written at each row's own positions."""
    def __init__(self, c: DecoderConfig, batch: int, length: int, dtype: torch.dtype, device):
        shape = (c.num_hidden_layers, batch, c.num_key_value_heads, length, c.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def copy(self, row: int, to: list[int], length: int) -> None:
        """The first `length` slots of a row, into other rows."""
        for t in (self.keys, self.values):
            t[:, to, :, :length] = t[:, row:row + 1, :, :length]


class Decoder(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers)),
            "norm": make_norm(config)})
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model["embed_tokens"].weight
        if config.moca:
            self.add_moca()
        self.gradient_checkpointing = False

    def add_moca(self) -> None:
        """MoCa after every layer, the identity at first."""
        self.config.moca = True
        self.moca = nn.ModuleList(MoCa(self.config.hidden_size) for _ in self.model["layers"])

    def embed(self, input_ids: Tensor) -> Tensor:
        """Word embeddings (B,T,D), scaled where the family scales them."""
        x = self.model["embed_tokens"](input_ids)
        if torch.is_autocast_enabled(x.device.type):      # all that follows, and is kept for the backward, is as small
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.config.embed_scale == 1:
            return x
        return x * torch.tensor(self.config.embed_scale, dtype=x.dtype)     # rounded first, as transformers does

    def forward(self, inputs_embeds: Tensor, watch=None, asked=None, cache: KVCache | None = None,
                positions: Tensor | None = None, end: int | None = None,
                image_mask: Tensor | None = None, watched: int | None = None, rows: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm, (B,T,D), of inputs_embeds (B,T,D); `self.lm_head` makes logits of them.

        image_mask (B,T) says where MoCa acts (None: nowhere).
        watch(i, h, attention) is called with the index of each layer 1..watched (None: 1..L), its output (detached,
        before the final norm) and, if asked = (rows, image_columns), its `attention_to_image`. A cache keeps the keys
        and values of these tokens: the first ones of some of its `rows`, or with `end` those at `positions` (B,T) of
        all its rows, which see the slots before `end` as well."""
        h = inputs_embeds
        c = self.config
        watched = 0 if watch is None else c.num_hidden_layers if watched is None else watched
        if positions is None:
            positions = torch.arange(h.shape[1], device=h.device)
        rope = rotary(positions, int(c.head_dim * c.partial_rotary_factor), c.rope_theta, h.dtype)      # (T,r)
        if positions.dim() == 2:
            rope = tuple(t[:, None] for t in rope)                                          # (B,1,T,r)
        mask = None                                       # None: plain causal attention, the fastest kernel
        if end is not None:
            # Slot j is visible from position ≥ j: what a shorter prompt's padding left stays hidden until overwritten.
            mask = visible(positions[:, None, :, None] - torch.arange(end, device=h.device), c.sliding_window)
        elif c.sliding_window is not None and h.shape[1] > c.sliding_window:
            mask = visible(positions[:, None] - positions, c.sliding_window)                # (T,T)
        rows = torch.arange(len(h), device=h.device) if rows is None else rows
        for i, layer in enumerate(self.model["layers"]):
            args = (h, rope, mask, cache and (cache.keys[i], cache.values[i], rows, positions, end),
                    asked if i < watched else None)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h, attention = checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False)
            else:
                h, attention = layer(*args)
            if c.moca and image_mask is not None:
                h = self.moca[i](h, image_mask)
            if i < watched:
                watch(i + 1, h.detach(), attention)
        return self.model["norm"](h)


# ------------------------------------------------------------------------------------------------ the whole
class Output(NamedTuple):
    hidden_states: Tensor      # (B,T,D) after the final norm
    image_embeds: Tensor       # (B,N,D) what the projector made
    text_embeds: Tensor        # (B,T,D) embed_tokens(input_ids); placeholders hold the embedding of their id


class Llava(nn.Module):
    def __init__(self, vision_tower: ViT, projector: Projector, language_model: Decoder, vision_layer: int = -2):
        super().__init__()
        self.vision_tower = vision_tower
        self.multi_modal_projector = projector
        self.language_model = language_model
        self.vision_layer = vision_layer

    def embed_images(self, pixel_values: Tensor) -> Tensor:
        """(B,3,H,W) → (B,N,D). A frozen vision tower builds no graph."""
        trained = any(p.requires_grad for p in self.vision_tower.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            patches = self.vision_tower(pixel_values, self.vision_layer)                    # (B,N,Dv)
        return self.multi_modal_projector(patches.to(self.multi_modal_projector.linear_1.weight.dtype))

    def merge(self, text_embeds: Tensor, image_embeds: Tensor, image_mask: Tensor) -> Tensor:
        """text_embeds (B,T,D) with image_embeds (B,N,D) at the positions of image_mask (B,T). The j-th marked position
        of a row takes its j-th image token. A row without an image reads nothing from its (zero) image, but keeps it in
        the graph with gradient 0: every rank's graph holds the same parameters, or DDP and FSDP hang."""
        which = (image_mask.cumsum(1) - 1).clamp(min=0)                                     # (B,T)
        image = image_embeds.to(text_embeds.dtype).gather(1, which[..., None].expand_as(text_embeds))
        return torch.where(image_mask[..., None], image, text_embeds)                       # (B,T,D)

    def forward(self, batch, watch=None, attention_from: Tensor | None = None, watched: int | None = None) -> Output:
        """batch: input_ids (B,T), image_mask (B,T), pixel_values (B,3,H,W), right-padded.
        watch, attention_from (B,T) bool, the query rows whose attention is wanted, and watched, how many layers: see
        Decoder.forward."""
        image_embeds = self.embed_images(batch.pixel_values)
        text_embeds = self.language_model.embed(batch.input_ids)                            # (B,T,D)
        asked = None
        if attention_from is not None:
            asked = marked(attention_from), marked(batch.image_mask, image_embeds.shape[1])
        h = self.language_model(self.merge(text_embeds, image_embeds, batch.image_mask), watch, asked,
                                image_mask=batch.image_mask, watched=watched)
        return Output(h, image_embeds, text_embeds)

    def prefill(self, input_ids: list[Tensor], pixel_values: Tensor, image_mask: list[Tensor], image_index: list[int],
                room: int) -> tuple[KVCache, Tensor]:
        """A cache of B prompts, with `room` for as many tokens behind each, and the hidden state (B,D) of their ends.

        Each image is encoded once. What all prompts about it begin with is computed once, in the cache row of the first
        of them, and copied to the others' rows; so is what all prompts without an image begin with."""
        lm, device, B = self.language_model, pixel_values.device, len(input_ids)
        images = self.embed_images(pixel_values) if any(m.any() for m in image_mask) else None          # (I,N,D)

        def embed(rows: list[int], spans: list[slice]) -> tuple[Tensor, Tensor | None]:
            """A span of each of these prompts, with its part of the image, (b,T,D), and image_mask, None if empty."""
            h = lm.embed(pad_sequence([input_ids[r][s] for r, s in zip(rows, spans)], batch_first=True).to(device))
            mask = pad_sequence([image_mask[r][s] for r, s in zip(rows, spans)], batch_first=True)
            if not mask.any():
                return h, None
            mask = mask.to(device)
            return self.merge(h, images[[image_index[r] for r in rows]], mask), mask

        groups = {}
        for r in range(B):
            groups.setdefault(image_index[r] if image_mask[r].any() else None, []).append(r)
        start = [0] * B                                      # of what a row does not share
        for rows in groups.values():
            shared = shared_prefix([input_ids[r] for r in rows], [image_mask[r] for r in rows])
            for r in rows:
                start[r] = shared
        length = [len(ids) for ids in input_ids]
        rest = max(n - s for n, s in zip(length, start))
        end = max(start) + rest                              # padded, no row's slots end later
        dtype = lm.model["embed_tokens"].weight.dtype
        cache = KVCache(lm.config, B, max(end, max(length) + room), dtype, device)
        if max(start) > 0:
            firsts = [rows[0] for rows in groups.values()]
            h, mask = embed(firsts, [slice(start[r]) for r in firsts])
            lm(h, cache=cache, image_mask=mask, rows=torch.tensor(firsts, device=device))
            for first, *others in groups.values():
                cache.copy(first, others, start[first])
        h, mask = embed(range(B), [slice(s, None) for s in start])                          # (B,rest,D)
        start, length = torch.tensor([start, length], device=device)                        # (B,) each
        positions = start[:, None] + torch.arange(rest, device=device)
        h = lm(h, cache=cache, positions=positions, end=end, image_mask=mask)
        return cache, h[torch.arange(B, device=device), length - start - 1]

    @torch.inference_mode()
    def generate(self, input_ids: list[Tensor], pixel_values: Tensor, max_new_tokens: int = 128,
                 image_mask: list[Tensor] | None = None, eos_token_id: int | None = None,
                 image_index=None) -> list[list[int]]:
        """Greedy answers to B prompts of any lengths, as lists of ids without the end token.

        input_ids: 1-d tensors; image_mask: 1-d bool tensors marking the image positions (None: text only);
        pixel_values (I,3,H,W); image_index (B,): which of those each prompt is about (None: its own, I = B). Prompts
        are padded on the right: each row writes its new tokens over its own padding. An answer depends on neither the
        other prompts nor their order, up to the rounding of sums: two logits that are equal to 1e-5 may change places.
        """
        lm, device, B = self.language_model, pixel_values.device, len(input_ids)
        image_mask = image_mask or [torch.zeros_like(ids, dtype=torch.bool) for ids in input_ids]
        image_index = list(range(B)) if image_index is None else torch.as_tensor(image_index).tolist()
        cache, h = self.prefill(input_ids, pixel_values, image_mask, image_index, max_new_tokens)
        answers = [lm.lm_head(h).argmax(-1)]                                                # (B,) each
        length = torch.tensor([len(ids) for ids in input_ids], device=device)               # (B,)
        end = max(len(ids) for ids in input_ids)
        done = torch.zeros(B, dtype=torch.bool, device=device)
        for step in range(1, max_new_tokens):
            if eos_token_id is not None:
                done |= answers[-1] == eos_token_id
                if done.all():
                    break
            h = lm(lm.embed(answers[-1][:, None]), cache=cache, positions=(length + step - 1)[:, None], end=end + step)
            answers.append(lm.lm_head(h[:, 0]).argmax(-1))
        rows = torch.stack(answers, dim=1).tolist()                                         # (B, new)
        return [row[:row.index(eos_token_id)] if eos_token_id in row else row for row in rows]


def shared_prefix(input_ids: list[Tensor], image_mask: list[Tensor]) -> int:
    """The number of tokens that all prompts about one image begin with; fewer than any of them has, for an answer
    begins with the logits of the last, and with the image whole or not at all."""
    n = min(len(ids) for ids in input_ids) - 1
    same = torch.ones(n, dtype=torch.bool, device=input_ids[0].device)
    for ids, mask in zip(input_ids, image_mask):
        same &= (ids[:n] == input_ids[0][:n]) & (mask[:n] == image_mask[0][:n])
    n = int(same.cumprod(0).sum())
    cut = image_mask[0][:n].any() and image_mask[0][n:].any()
    return int(image_mask[0].int().argmax()) if cut else n


def marked(mask: Tensor, width: int | None = None) -> Tensor:
    """Positions of the True entries of each row of mask (B,T), in order, filled up with -1: (B, width or the most)."""
    width = int(mask.sum(1).max()) if width is None else width
    order = mask.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    order = order.masked_fill(~mask.gather(1, order), -1)
    return F.pad(order, (0, width - order.shape[1]), value=-1)
