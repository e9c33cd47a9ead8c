"""Wrong and right solutions of projector, merge and rotary attention; see vista.py for the format."""
PROJ = ("        for name, layer in self.named_children():\n"
        "            x = layer(x if name == \"linear_1\" else F.gelu(x))\n        return x")
EXPO = "    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim"
FREQ = "    frequencies = rescale(1.0 / theta ** exponents, scaling)"
ANGLE = "    angles = positions[..., None].float() * frequencies"
BOTH = "    angles = torch.cat([angles, angles], dim=-1)"
TRIG = "    return angles.cos().to(dtype), angles.sin().to(dtype)"
PART = "        return torch.cat([rotate(x[..., :width], cos, sin), x[..., width:]], dim=-1)"
AB = "    a, b = x.chunk(2, dim=-1)"
TURN = "    return x * cos + torch.cat([-b, a], dim=-1) * sin"
QK = "        q, k = rotate(q, *rope), rotate(k, *rope)"
GQA = "        gqa = q.shape[1] != k.shape[1]"
SDPA = "        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)"
OUT = "        return self.o_proj(y.transpose(1, 2).flatten(2)), q, k"
WHICH = "        which = (image_mask.cumsum(1) - 1).clamp(min=0)"
IMAGE = "        image = image_embeds.to(text_embeds.dtype).gather(1, which[..., None].expand_as(text_embeds))"
WHERE = "        return torch.where(image_mask[..., None], image, text_embeds)"
SCORES = ("        s = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3) / {scale}\n"
          "        s = s.masked_fill(torch.ones(s.shape[-2:]).triu({first}).bool(), {fill})\n"
          "        y = s.{softmax} @ v.repeat_interleave(q.shape[1] // k.shape[1], 1)")


def scores(scale="q.shape[-1] ** 0.5", first="1", fill="-torch.inf", softmax="softmax(-1)"):
    return SCORES.format(scale=scale, first=first, fill=fill, softmax=softmax)


WRONG = [
    ("ReLU for GELU", "projector", PROJ, PROJ.replace("F.gelu", "F.relu")),
    ("the tanh approximation of GELU", "projector", PROJ, PROJ.replace("F.gelu(x)", 'F.gelu(x, approximate="tanh")')),
    ("CLIP's quick GELU", "projector", PROJ, PROJ.replace("F.gelu", 'ACTIVATIONS["quick_gelu"]')),
    ("SiLU for GELU", "projector", PROJ, PROJ.replace("F.gelu", "F.silu")),
    ("no activation: two linear maps are one", "projector", PROJ, "        return self.linear_2(self.linear_1(x))"),
    ("an activation at the end too", "projector", PROJ,
     "        return F.gelu(self.linear_2(F.gelu(self.linear_1(x))))"),
    ("the activation comes first", "projector", PROJ, "        return self.linear_2(self.linear_1(F.gelu(x)))"),
    ("the first map alone", "projector", PROJ, "        return F.gelu(self.linear_1(x)) @ self.linear_2.weight.T"),
    ("2i/d lost its 2: angles fall half as fast", "rotation_angles", EXPO, EXPO + " / 2"),
    ("exponents of 1..d/2: they begin with 0", "rotation_angles", EXPO,
     EXPO.replace("arange(0, head_dim, 2", "arange(2, head_dim + 2, 2")),
    ("theta is fixed at 10000", "rotation_angles", FREQ, FREQ.replace("theta **", "10000.0 **")),
    ("theta^+: later pairs turn faster", "rotation_angles", FREQ,
     FREQ.replace("1.0 / theta ** exponents", "theta ** exponents")),
    ("positions count from 1", "rotation_angles", ANGLE,
     ANGLE.replace("positions[..., None].float()", "(positions[..., None].float() + 1)")),
    ("positions 0..T−1 whatever is given", "rotation_angles", ANGLE,
     ANGLE.replace("positions[..., None]", "torch.arange(len(positions))[:, None]")),
    ("each angle twice in a row: that goes with neighbours as pairs", "rotation_angles", BOTH,
     "    angles = angles.repeat_interleave(2, -1)"),
    ("cos and sin mixed up", "rotation_angles", TRIG, "    return angles.sin().to(dtype), angles.cos().to(dtype)"),
    ("degrees for radians", "rotation_angles", TRIG, "    angles = angles / 57.29577951308232\n" + TRIG),
    ("the angle's sign", "rotation_angles", ANGLE, ANGLE.replace("positions[", "-positions[")),
    ("angles rounded to the dtype before cos", "rotation_precision", BOTH, BOTH + ".to(dtype)"),
    ("float32 whatever dtype is asked for", "rotation_precision", TRIG, "    return angles.cos(), angles.sin()"),
    ("positions in bfloat16", "rotation_precision", ANGLE,
     ANGLE.replace("positions[..., None].float()", "positions[..., None].to(dtype).float()")),
    ("neighbours are pairs: that is the layout of Meta's weights", "rotation", AB,
     "    a, b = x[..., ::2], x[..., 1::2]", TURN,
     "    return x * cos + torch.stack([-b, a], dim=-1).flatten(-2) * sin"),
    ("turned the other way", "rotation", TURN, TURN.replace("[-b, a]", "[b, -a]")),
    ("no minus: not a rotation", "rotation", TURN, TURN.replace("-b", "b")),
    ("the halves are not swapped", "rotation", TURN, TURN.replace("[-b, a]", "[-a, b]")),
    ("the second half's cos is missing", "rotation", TURN,
     "    half = cos.shape[-1] // 2\n"
     "    return torch.cat([a * cos[..., :half] - b * sin[..., :half], b + a * sin[..., :half]], -1)"),
    ("cos alone", "rotation", TURN, "    return x * cos"),
    ("the rest of the head is lost", "partial_rotation", PART, "        return rotate(x[..., :width], cos, sin)"),
    ("the rest of the head is set to 0", "partial_rotation", PART,
     PART.replace("x[..., width:]]", "0 * x[..., width:]]")),
    ("the last dimensions are rotated, not the first", "partial_rotation", PART,
     "        return torch.cat([x[..., :-width], rotate(x[..., -width:], cos, sin)], dim=-1)"),
    ("the rest comes first", "partial_rotation", PART,
     "        return torch.cat([x[..., width:], rotate(x[..., :width], cos, sin)], dim=-1)"),
    ("the first image token everywhere", "merge", WHICH, "        which = image_mask.long() * 0"),
    ("off by one: the first position takes the second token", "merge", WHICH,
     WHICH.replace("cumsum(1) - 1)", "cumsum(1))").replace("min=0)", "min=0, max=image_embeds.shape[1] - 1)")),
    ("image tokens in reversed order", "merge", IMAGE, IMAGE.replace("image_embeds.to", "image_embeds.flip(1).to")),
    ("image tokens of the next sample", "merge", IMAGE,
     IMAGE.replace("image_embeds.to", "image_embeds.roll(1, 0).to")),
    ("one run of positions is taken for granted", "merge", WHICH,
     "        start = image_mask.int().argmax(1, keepdim=True)\n        which = "
     "(torch.arange(image_mask.shape[1]) - start).clamp(0, image_embeds.shape[1] - 1)"),
    ("tokens are counted over the batch, not a row", "merge", WHICH,
     "        which = (image_mask.flatten().cumsum(0).view(image_mask.shape) - 1).clamp(0, image_embeds.shape[1] - 1)"),
    ("the image is added to the placeholders' embeddings", "merge", WHERE,
     WHERE.replace("image, text", "image + text_embeds, text")),
    ("the mean image token everywhere", "merge", IMAGE,
     IMAGE + "\n        image = image_embeds.mean(1, keepdim=True)"),
    ("the image without a graph: the projector would not be trained", "rows_of_text", IMAGE,
     IMAGE.replace("image_embeds.to", "image_embeds.detach().to")),
    ("text is detached", "rows_of_text", WHERE, WHERE.replace("image, text_embeds)", "image, text_embeds.detach())")),
    ("text is lost: zeros around the image", "rows_of_text", WHERE,
     WHERE.replace("image, text_embeds)", "image, 0 * text_embeds)")),
    ("a batch without an image leaves the graph", "rows_of_text", WHICH,
     "        if not image_mask.any():\n            return text_embeds\n" + WHICH),
    ("attention sees the future", "causal_attention", SDPA,
     SDPA.replace("is_causal=mask is None", "is_causal=False")),
    ("a position does not see itself", "causal_attention", SDPA, scores(first="0", fill="-1e9")),
    ("the future is seen by one position", "causal_attention", SDPA, scores(first="2")),
    ("scores are not divided by √d", "causal_attention", SDPA, scores(scale="1")),
    ("scores divided by d", "causal_attention", SDPA, scores(scale="q.shape[-1]")),
    ("scores divided by the root of the model's width", "causal_attention", SDPA, scores(scale="x.shape[-1] ** 0.5")),
    ("the future's scores are 0 instead of −∞", "causal_attention", SDPA, scores(fill="0")),
    ("softmax over the queries", "causal_attention", SDPA, scores(softmax="softmax(-2)", fill="-1e9")),
    ("no softmax", "causal_attention", SDPA, scores(softmax="exp()")),
    ("heads and positions mixed up before o_proj", "causal_attention", OUT,
     OUT.replace("y.transpose(1, 2).flatten(2)", "y.reshape(x.shape[0], x.shape[1], -1)")),
    ("o_proj is left out", "causal_attention", OUT,
     OUT.replace("self.o_proj(y.transpose(1, 2).flatten(2))", "y.transpose(1, 2).flatten(2)")),
    ("the input is added: the layer does that", "causal_attention", OUT,
     OUT.replace("flatten(2))", "flatten(2)) + x")),
    ("keys for values", "causal_attention", SDPA, SDPA.replace("(q, k, v,", "(q, k, k,")),
    ("key heads in turn, 0 1 0 1, instead of groups", "grouped_heads", GQA,
     "        n = q.shape[1] // k.shape[1]\n        seen_k, v, gqa = k.repeat(1, n, 1, 1), v.repeat(1, n, 1, 1), "
     "False", SDPA, SDPA.replace("(q, k,", "(q, seen_k if cache is None else k,")),
    ("keys are repeated in what is returned", "grouped_heads", OUT,
     OUT.replace("q, k", "q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)")),
    ("queries alone are rotated", "rotated", QK, "        q = rotate(q, *rope)"),
    ("keys alone are rotated", "rotated", QK, "        k = rotate(k, *rope)"),
    ("values are rotated too", "rotated", QK, QK + "\n        v = rotate(v, *rope)"),
    ("nothing is rotated", "rotated", QK, "        pass"),
    ("queries are returned as they were before", "rotated", QK, "        plain = q\n" + QK, OUT,
     OUT.replace("q, k", "plain, k")),
]

RIGHT = [
    ("complex numbers and loops", "model", '''
def rotary(positions, head_dim, theta, dtype, scaling=None):
    turns = [[p / theta ** (2 * i / head_dim) for i in range(head_dim // 2)] * 2 for p in positions.tolist()]
    angles = torch.tensor(turns, dtype=torch.float64)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    half = cos.shape[-1] // 2
    z = torch.complex(x[..., :half].double(), x[..., half:2 * half].double())
    z = z * torch.complex(cos[..., :half].double(), sin[..., :half].double())
    return torch.cat([z.real, z.imag, x[..., 2 * half:]], -1).to(x.dtype)


def merge(self, text_embeds, image_embeds, image_mask):
    rows = []
    for text, image, mask in zip(text_embeds, image_embeds, image_mask):
        row, j = [], 0
        for t in range(len(text)):
            row.append(image[j] if mask[t] else text[t])
            j += int(mask[t])
        rows.append(torch.stack(row))
    return torch.stack(rows) + 0 * image_embeds.sum()


Llava.merge = merge
'''),
    ("attention from scores, with einsum", "model", '''
def forward(self, x, rope, mask=None, cache=None):
    B, T, _ = x.shape
    q, k, v = (p(x).view(B, T, -1, self.head_dim).permute(0, 2, 1, 3) for p in (self.q_proj, self.k_proj, self.v_proj))
    q, k = rotate(q, *rope), rotate(k, *rope)
    n = q.shape[1] // k.shape[1]
    scores = torch.einsum("bhtd,bhsd->bhts", q, k.repeat_interleave(n, 1)) / self.head_dim ** 0.5
    see = torch.tril(torch.ones(T, T, dtype=torch.bool)) if mask is None else mask
    p = scores.masked_fill(~see, float("-inf")).softmax(-1)
    y = torch.einsum("bhts,bhsd->bthd", p, v.repeat_interleave(n, 1))
    return self.o_proj(y.reshape(B, T, -1)), q, k


Attention.forward = forward
'''),
    ("scatter for merge, erf for GELU, float64", "model", '''
def project(self, x):
    y = x @ self.linear_1.weight.T + self.linear_1.bias
    y = y * 0.5 * (1 + torch.erf(y / 2 ** 0.5))
    return y @ self.linear_2.weight.T + self.linear_2.bias


def merge(self, text_embeds, image_embeds, image_mask):
    rows = image_mask.any(1)
    picked = torch.cat([image_embeds[b, :int(image_mask[b].sum())] for b in range(len(image_mask))])
    mask = image_mask[..., None].expand_as(text_embeds)
    return text_embeds.masked_scatter(mask, picked.to(text_embeds.dtype)) + 0 * image_embeds.sum() + 0 * rows.sum()


Projector.forward, Llava.merge = project, merge
'''),
]
