"""The model: vision encoder → projector → decoder language model.

    pixel_values (B,3,H,W) ─ ViT ─→ (B,N,Dv) ─ Projector ─→ image_embeds (B,N,D) ┐
    input_ids    (B,T)     ─ embed_tokens ─────────────────→ (B,T,D) ────────────┴→ Decoder → hidden_states (B,T,D)

Modules have the parameter names of released Hugging Face checkpoints: loading and saving need no
translation. Only what is used is computed: no logits (methods/ce.py makes those it needs), no
attention maps unless asked for, no layer of the vision encoder beyond the one that is read.

Shape letters: B samples · T sequence positions · N image tokens · D decoder width · Dv vision width
· H heads · K key/value heads · d head width · S cached positions · M query rows to be watched.
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.positions import KVCache, attention_to_image, rescale, true_positions, visible
from methods.lora import linear
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
    class_token: bool = True                     # CLIP has one, and a norm in front; SigLIP has a bias on patches
    drop_first_patch: bool = False               # TinyLLaVA drops SigLIP's first patch as if it were a class token

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def image_tokens(self) -> int:
        return self.num_patches - (1 if self.drop_first_patch else 0)


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
    rope_scaling: dict | None = None             # Llama-3.1's: the arguments of common.positions.rescale
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    norm: str = "rms"                            # "layer": Phi-2
    norm_plus_one: bool = False                  # Gemma multiplies by 1 + weight
    hidden_act: str = "silu"
    gated: bool = True                           # the MLP; not in Phi-2
    bias: bool = False                           # on every linear map of a layer: Phi-2
    qkv_bias: bool = False                       # on q_proj, k_proj and v_proj: Qwen2
    head_bias: bool = False
    parallel: bool = False                       # attention and MLP side by side after one norm: Phi-2
    partial_rotary_factor: float = 1.0           # the share of a head's width that is rotated
    sliding_window: int | None = None            # a token sees itself and the window − 1 tokens before it
    embed_scale: float = 1.0                     # factor on word embeddings: sqrt(hidden_size) in Gemma
    moca: bool = False                           # an affine map of the image tokens after every layer: methods/moca.py
    lora_rank: int = 0                           # of an update beside every linear map of a layer: methods/lora.py
    lora_alpha: float = 0.0                      # the update is scaled by alpha / rank

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads


ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu, "silu": F.silu,
               "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


# ----------------------------------------------------------------------------------- vision encoder
class ViTEmbeddings(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(c.hidden_size)) if c.class_token else None
        # A convolution whose stride is its size is one linear map, applied to each patch.
        self.patch_embedding = nn.Conv2d(3, c.hidden_size, c.patch_size, stride=c.patch_size, bias=not c.class_token)
        self.position_embedding = nn.Embedding(c.num_patches + (1 if c.class_token else 0), c.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        pixel_values = pixel_values.to(self.patch_embedding.weight.dtype)   # a frozen tower may be bf16
        x = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)                   # (B,N,Dv)
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1).to(x.dtype), x], dim=1)
        return x + self.position_embedding.weight           # (B,N or 1+N,Dv); row 0: class token


class ViTAttention(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.num_heads = c.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(c.hidden_size, c.hidden_size) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)                 # (B,H,1+N,d)
                   for p in (self.q_proj, self.k_proj, self.v_proj))
        x = F.scaled_dot_product_attention(q, k, v)         # no mask: every patch sees every other
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
        x = x + self.self_attn(self.layer_norm1(x))         # norms are on the branches; x itself
        return x + self.mlp(self.layer_norm2(x))            # is a sum that no layer rescales


class ViT(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = ViTEmbeddings(config)
        if config.class_token:
            self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # CLIP's own spelling
        layers = nn.ModuleList(ViTLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": layers})                # a name of the checkpoints
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)   # unused here; saved back

    def hidden_state(self, pixel_values: Tensor, layer: int) -> Tensor:
        """transformers' `hidden_states[layer]`: 0 the embeddings, -1 the last output. (B,N or 1+N,Dv)."""
        x = self.embeddings(pixel_values)
        if self.config.class_token:
            x = self.pre_layrnorm(x)
        layers = self.encoder["layers"]
        count = layer if layer >= 0 else len(layers) + 1 + layer        # -2: all layers but the last
        for block in layers[:count]:
            x = block(x)
        return x

    def forward(self, pixel_values: Tensor, layer: int = -2) -> Tensor:
        """Patch features (B,N,Dv). LLaVA reads the last layer but one and drops the class token."""
        first = 1 if self.config.class_token or self.config.drop_first_patch else 0
        return self.hidden_state(pixel_values, layer)[:, first:]


# ---------------------------------------------------------------------------------------- projector
class Projector(nn.Module):
    """N linear maps with GELU between them: LLaVA-1.5's two-layer MLP, or LLaVA's single map."""
    def __init__(self, vision_size: int, hidden_size: int, layers: int = 2):
        super().__init__()
        self.linear_1 = nn.Linear(vision_size, hidden_size)
        for n in range(2, layers + 1):
            self.add_module(f"linear_{n}", nn.Linear(hidden_size, hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        for name, layer in self.named_children():
            x = layer(x if name == "linear_1" else F.gelu(x))
        return x


# ------------------------------------------------------------------------------------------ decoder
class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, plus_one: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.plus_one = eps, plus_one

    def forward(self, x: Tensor) -> Tensor:
        if self.plus_one:               # Gemma stores weight − 1, and multiplies before it rounds
            return (F.rms_norm(x.float(), x.shape[-1:], eps=self.eps) * (1 + self.weight.float())).to(x.dtype)
        y = F.rms_norm(x, x.shape[-1:], eps=self.eps)          # in float32, rounded once: one kernel on a GPU
        return self.weight.to(x.dtype) * y.to(x.dtype)         # this order of casts is what the checkpoints expect


class LayerNorm(nn.LayerNorm):
    """PyTorch's, for an input and weights of any two dtypes. Computes in float32, returns the input's dtype."""
    def forward(self, x: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        y = F.layer_norm(x.to(exact), self.normalized_shape, self.weight.to(exact), self.bias.to(exact), self.eps)
        return y.to(x.dtype)


def make_norm(c: DecoderConfig) -> nn.Module:
    if c.norm == "layer":
        return LayerNorm(c.hidden_size, eps=c.rms_norm_eps)
    return RMSNorm(c.hidden_size, c.rms_norm_eps, c.norm_plus_one)


def rotary(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype, scaling=None) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotation angles, (…,T,d), computed in float32. scaling: DecoderConfig.rope_scaling."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    # Pair i turns by position · theta^(−2i/d). In bfloat16, positions 256 and 257 would be the same.
    frequencies = rescale(1.0 / theta ** exponents, scaling)                               # (d/2,)
    angles = positions[..., None].float() * frequencies                                    # (…,T,d/2)
    angles = torch.cat([angles, angles], dim=-1)             # both numbers of a pair turn together
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + r/2) of the first r dimensions, r the width of cos: the layout of
    Hugging Face weights. (Meta's own weights pair 2i with 2i + 1.)"""
    width = cos.shape[-1]
    if width < x.shape[-1]:                                  # Phi-2: the others are not rotated
        return torch.cat([rotate(x[..., :width], cos, sin), x[..., width:]], dim=-1)
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.head_dim, self.window = c.head_dim, c.sliding_window
        self.q_proj = linear(c.hidden_size, c.num_attention_heads * c.head_dim, c, c.qkv_bias)
        self.k_proj = linear(c.hidden_size, c.num_key_value_heads * c.head_dim, c, c.qkv_bias)
        self.v_proj = linear(c.hidden_size, c.num_key_value_heads * c.head_dim, c, c.qkv_bias)
        self.o_proj = linear(c.num_attention_heads * c.head_dim, c.hidden_size, c)

    def forward(self, x: Tensor, rope, mask=None, cache=None) -> tuple[Tensor, Tensor, Tensor]:
        """(B,T,D) → what attention adds (B,T,D), and the rotated queries (B,H,T,d) and keys (B,K,T,d)."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)                  # (B,H or K,T,d)
                   for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rope), rotate(k, *rope)
        gqa = q.shape[1] != k.shape[1]              # K < H: query heads in groups share keys and values
        if cache is not None:
            keys, values, rows, positions, end = cache                      # (B,K,S,d) twice, (b,)
            keys[rows[:, None], :, positions] = k.transpose(1, 2)           # (b,T,K,d): indices first
            values[rows[:, None], :, positions] = v.transpose(1, 2)
            if end is not None:                             # a continuation; a prompt sees itself
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
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))   # SwiGLU; in Gemma GeGLU


class DecoderLayer(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.input_layernorm = make_norm(c)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = None if c.parallel else make_norm(c)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, rope, mask=None, cache=None, attend=None, moca: MoCa | None = None,
                image_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B,T,D) → (B,T,D), and the attention from rows to image columns if attend = (rows, columns), else None."""
        x, q, k = self.compute(x, rope, mask, cache, moca, image_mask)
        # Keep last: the map needs no gradient, so recomputation in the backward stops before it.
        return x, None if attend is None else attention_to_image(q, k, *attend, window=self.self_attn.window)

    def compute(self, x: Tensor, rope, mask, cache, moca, image_mask) -> tuple[Tensor, Tensor, Tensor]:
        """(B,T,D) → (B,T,D), rotated queries and keys: what --compile compiles."""
        normed = self.input_layernorm(x)
        y, q, k = self.self_attn(normed, rope, mask, cache)
        if self.post_attention_layernorm is None:
            x = x + y + self.mlp(normed)
        else:
            x = x + y
            x = x + self.mlp(self.post_attention_layernorm(x))
        # Last, on the sum: the next layer, `watch` and the final norm all see calibrated tokens.
        if moca is not None:
            x = moca(x, image_mask)
        return x, q, k


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
            self.lm_head.weight = self.model["embed_tokens"].weight     # its gradients are summed
        if config.moca:
            self.add_moca()
        self.recomputed = 0          # layers, from the first, whose activations are recomputed and not kept

    def add_moca(self) -> None:
        """Add MoCa after every layer, the identity before training."""
        self.config.moca = True
        self.moca = nn.ModuleList(MoCa(self.config.hidden_size) for _ in self.model["layers"])

    def embed(self, input_ids: Tensor) -> Tensor:
        """Word embeddings (B,T,D), scaled if the family scales them."""
        x = self.model["embed_tokens"](input_ids)
        if torch.is_autocast_enabled(x.device.type):      # the residual stream is in the dtype of computing
            x = x.to(torch.get_autocast_dtype(x.device.type))
        scale = self.config.embed_scale                   # rounded to x's dtype, as in transformers
        return x if scale == 1 else x * torch.tensor(scale, dtype=x.dtype)

    def forward(self, inputs_embeds: Tensor, **options) -> Tensor:
        """inputs_embeds (B,T,D) → hidden states after the final norm, (B,T,D). Options: see `run_layers`."""
        return self.model["norm"](self.run_layers(inputs_embeds, **options))

    def run_layers(self, inputs_embeds: Tensor, watch=None, watch_layers: int | None = None, attend=None,
                   image_mask: Tensor | None = None, cache: KVCache | None = None, rows: Tensor | None = None,
                   positions: Tensor | None = None, end: int | None = None) -> Tensor:
        """inputs_embeds (B,T,D) → what the last layer returns, (B,T,D), before the final norm.
        image_mask (B,T): where MoCa acts; None: nowhere.
        watch(i, h, attention): called after each layer i = 1..watch_layers (None: all) with its output, detached, and
        with its attention to the image if `attend`, arguments of `attention_to_image`, asks for it.
        cache: keeps the keys and values of these tokens. A prompt fills the first slots of the cache's `rows` (None:
        all). A continuation gives `positions` (B,T) and `end`: its tokens see the slots before `end`."""
        c, h = self.config, inputs_embeds
        if watch_layers is None:
            watch_layers = 0 if watch is None else c.num_hidden_layers
        positions = torch.arange(h.shape[1], device=h.device) if positions is None else positions
        rope = rotary(positions, int(c.head_dim * c.partial_rotary_factor), c.rope_theta, h.dtype, c.rope_scaling)
        if positions.dim() == 2:
            rope = tuple(t[:, None] for t in rope)                           # (B,1,T,r), else (T,r)

        # No mask is plain causal attention, the fastest kernel. In a cache, position i sees the slots
        # j ≤ i: padding that a shorter prompt left there stays hidden until it is overwritten.
        mask = None
        if end is not None:
            mask = visible(positions[:, None, :, None] - torch.arange(end, device=h.device), c.sliding_window)
        elif c.sliding_window is not None and h.shape[1] > c.sliding_window:
            mask = visible(positions[:, None] - positions, c.sliding_window)                # (T,T)
        rows = torch.arange(len(h), device=h.device) if rows is None else rows
        for i, layer in enumerate(self.model["layers"]):
            # MoCa runs inside the layer, so its activations are recomputed with the layer's.
            moca = self.moca[i] if c.moca and image_mask is not None else None
            slots = (cache.keys[i], cache.values[i], rows, positions, end) if cache is not None else None
            args = h, rope, mask, slots, attend if i < watch_layers else None, moca, image_mask
            if i < self.recomputed and torch.is_grad_enabled():     # its input is kept; no dropout
                h, attention = checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False)
            else:
                h, attention = layer(*args)
            if i < watch_layers:
                watch(i + 1, h.detach(), attention)         # for targets and statistics: no gradient
        return h


# ---------------------------------------------------------------------------------------- the whole
class Output(NamedTuple):
    hidden_states: Tensor      # (B,T,D) after the final norm
    image_embeds: Tensor       # (B,N,D) the projector's output
    text_embeds: Tensor        # (B,T,D) embed_tokens(input_ids); placeholders hold the embedding of their id
    before_norm: Tensor        # (B,T,D) the last layer's output, the final norm's input
    patches: Tensor            # (B,N,Dv) the projector's input


class Llava(nn.Module):
    def __init__(self, vision_tower: ViT, projector: Projector, language_model: Decoder, vision_layer: int = -2):
        super().__init__()
        self.vision_tower = vision_tower
        self.multi_modal_projector = projector
        self.language_model = language_model
        self.vision_layer = vision_layer
        # A Q-Former makes as many image tokens as it has queries; other projectors one a patch.
        self.image_tokens = getattr(projector, "queries", vision_tower.config.image_tokens)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """(B,3,H,W) → patches (B,N,Dv), the projector's input. A frozen vision tower builds no graph."""
        patches = self.vision_tower(pixel_values, self.vision_layer)                        # (B,N,Dv)
        return patches.to(next(self.multi_modal_projector.parameters()).dtype)  # trained: float32

    def embed_images(self, pixel_values: Tensor) -> Tensor:
        """(B,3,H,W) → (B,N,D)."""
        return self.multi_modal_projector(self.encode_images(pixel_values))

    def merge(self, text_embeds: Tensor, image_embeds: Tensor, image_mask: Tensor) -> Tensor:
        """Put image_embeds (B,N,D) into text_embeds (B,T,D) at the true positions of image_mask (B,T), in order. A row
        of text keeps its zero image in the graph: every rank's must hold the same weights, or DDP and FSDP hang."""
        which = (image_mask.cumsum(1) - 1).clamp(min=0)                                     # (B,T)
        image = image_embeds.to(text_embeds.dtype).gather(1, which[..., None].expand_as(text_embeds))
        return torch.where(image_mask[..., None], image, text_embeds)                       # (B,T,D)

    def forward(self, batch, watch=None, attention_from: Tensor | None = None,
                watch_layers: int | None = None) -> Output:
        """batch: input_ids (B,T), image_mask (B,T), pixel_values (B,3,H,W), right-padded.
        watch, watch_layers: see run_layers. attention_from (B,M): positions whose attention to the image watch gets."""
        lm = self.language_model
        patches = self.encode_images(batch.pixel_values)                                    # (B,N,Dv)
        image_embeds = self.multi_modal_projector(patches)                                  # (B,N,D)
        text_embeds = lm.embed(batch.input_ids)                                             # (B,T,D)
        attend = None
        if attention_from is not None:                      # from these rows to the image's columns
            attend = attention_from, true_positions(batch.image_mask, image_embeds.shape[1])
        inputs_embeds = self.merge(text_embeds, image_embeds, batch.image_mask)
        h = lm.run_layers(inputs_embeds, watch, watch_layers, attend, batch.image_mask)
        return Output(lm.model["norm"](h), image_embeds, text_embeds, h, patches)

    @torch.inference_mode()
    def generate(self, input_ids: Tensor, pixel_values: Tensor | None, image_mask: Tensor, max_new_tokens: int = 64,
                 eos_token_id: int | None = None) -> list[int]:
        """Answer one prompt greedily. Returns ids without the end token. evaluation/generate.py: many prompts at once.
        input_ids (T,); image_mask (T,) bool, the image positions; pixel_values (1,3,H,W) or None."""
        lm, mask = self.language_model, image_mask[None]                                    # (1,T)
        h = lm.embed(input_ids[None])                                                       # (1,T,D)
        if image_mask.any():
            h = self.merge(h, self.embed_images(pixel_values), mask)

        # The first pass reads the prompt, each later one a token. All leave keys and values behind.
        cache = KVCache(lm.config, 1, len(input_ids) + max_new_tokens, h.dtype, h.device)
        h = lm(h, cache=cache, image_mask=mask)
        answer = []
        for position in range(len(input_ids), len(input_ids) + max_new_tokens):
            token = lm.lm_head(h[:, -1]).argmax(-1)                                         # (1,)
            if token.item() == eos_token_id:
                break
            answer.append(token.item())
            at = token.new_full((1, 1), position)
            h = lm(lm.embed(token[:, None]), cache=cache, positions=at, end=position + 1)   # (1,1,D)
        return answer


if __name__ == "__main__":
    raise SystemExit("model.py is a library. Train it: python train.py. Ask it: python evaluate.py --ckpt DIR")
