"""Wrong and right solutions of MoCa and of its place in the forward; see vista.py for the format."""
U = "        self.u = nn.Parameter(torch.ones(hidden_size))"
V = "        self.v = nn.Parameter(torch.zeros(hidden_size))"
EXACT = "        exact = torch.promote_types(hidden_states.dtype, torch.float32)"
MAP = "        calibrated = torch.addcmul(self.v.to(exact), self.u.to(exact), hidden_states.to(exact))"
OUT = "        return torch.where(image_mask[..., None], calibrated.to(hidden_states.dtype), hidden_states)"
NORMED = "        normed = self.input_layernorm(x)\n        y, q, k"
ATTN = "        y, q, k = self.self_attn(normed, rope, mask, cache)"
PARALLEL = "            x = x + y + self.mlp(normed)"
FIRST = "            x = x + y\n"
SECOND = "            x = x + self.mlp(self.post_attention_layernorm(x))"
MOCA = "        if moca is not None:\n            x = moca(x, image_mask)\n"
MAPS = "None if attend is None else attention_to_image(q, k, *attend, window=self.self_attn.window)"
NONE = "return x, None if attend is None else attention"

WRONG = [
    ("f + v without u", "affine", MAP,
     "        calibrated = hidden_states.to(exact) + self.v.to(exact) + 0 * self.u"),
    ("u · f without v", "affine", MAP,
     "        calibrated = hidden_states.to(exact) * self.u.to(exact) + 0 * self.v"),
    ("u · (f + v)", "affine", MAP,
     "        calibrated = self.u.to(exact) * (hidden_states.to(exact) + self.v.to(exact))"),
    ("v · f + u: the two are mixed up", "affine", MAP,
     MAP.replace("self.v.to(exact), self.u.to(exact)", "self.u.to(exact), self.v.to(exact)")),
    ("f − v", "affine", MAP, MAP.replace("(self.v.to", "(-self.v.to")),
    ("(1 + u) · f + v: u starts at 1", "affine", MAP, MAP.replace("self.u.to(exact)", "1 + self.u.to(exact)")),
    ("the mean of u for all dimensions", "affine", MAP, MAP.replace("self.u.to(exact)", "self.u.mean().to(exact)")),
    ("a norm before the map: eq. (5) has none", "affine", MAP,
     MAP.replace("hidden_states.to(exact))",
     "torch.nn.functional.layer_norm(hidden_states.to(exact), self.u.shape))")),
    ("added to the input: it takes its place", "affine", OUT,
     OUT.replace("calibrated.to", "(hidden_states + calibrated).to")),
    ("the first image token of a row alone", "affine", OUT,
     "        image_mask = image_mask & (image_mask.cumsum(1) == 1)\n" + OUT),
    ("the last image token of a row is left out", "affine", OUT,
     "        image_mask = image_mask & (image_mask.cumsum(1) < image_mask.sum(1, keepdim=True))\n" + OUT),
    ("the mask is shifted by one position", "affine", OUT, "        image_mask = image_mask.roll(1, 1)\n" + OUT),
    ("the mask of the first row for every row", "affine", OUT,
     "        image_mask = image_mask[:1].expand(len(image_mask), -1)\n" + OUT),
    ("the map on text, not on the image", "affine", OUT, OUT.replace("image_mask[", "~image_mask[")),
    ("text is mapped too", "text_unchanged", OUT, "        return calibrated.to(hidden_states.dtype)"),
    ("text is set to 0", "text_unchanged", OUT,
     "        return torch.where(image_mask[..., None], calibrated.to(hidden_states.dtype), 0)"),
    ("text takes a detour through float16", "text_unchanged", OUT,
     OUT.replace(", hidden_states)", ", hidden_states.half().to(hidden_states.dtype))")),
    ("text is detached", "gradients", OUT, OUT.replace(", hidden_states)", ", hidden_states.detach())")),
    ("the input is written to", "text_unchanged", OUT,
     (OUT.replace("return", "out =") +
      "\n        if not hidden_states.requires_grad:\n            hidden_states.data.mul_(0.5)\n        return out")),
    ("u starts at 0: the image is lost", "starts_as_the_identity", U, U.replace("torch.ones", "torch.zeros")),
    ("v starts at 1", "starts_as_the_identity", V, V.replace("torch.zeros", "torch.ones")),
    ("v starts at random", "starts_as_the_identity", V, V.replace("torch.zeros", "0.02 * torch.randn")),
    ("u starts at random around 1", "starts_as_the_identity", U,
     U.replace("torch.ones(hidden_size)", "1 + 0.02 * torch.randn(hidden_size)")),
    ("u is detached: it would never be trained", "gradients", MAP, MAP.replace("self.u.to", "self.u.detach().to")),
    ("v is detached", "gradients", MAP, MAP.replace("self.v.to", "self.v.detach().to")),
    ("the image's hidden states are detached", "gradients", MAP,
     MAP.replace("hidden_states.to", "hidden_states.detach().to")),
    ("the map is computed under no_grad", "gradients", MAP,
     "        with torch.no_grad():\n    " + MAP),
    ("u and v are rounded to bfloat16 first", "precision", EXACT, "        exact = hidden_states.dtype"),
    ("the product is rounded before v is added", "precision", MAP,
     "        calibrated = (self.u.to(exact) * hidden_states.to(exact)).to(hidden_states.dtype) + "
     "self.v.to(hidden_states.dtype)"),
    ("the result keeps float32: the residual stream changes its dtype", "precision", OUT,
     "        return torch.where(image_mask[..., None], calibrated, hidden_states.to(exact))"),
    ("the map before attention", "place", MOCA, "", NORMED, MOCA + NORMED),
    ("the map between attention and MLP", "place", MOCA, "", FIRST,
     FIRST + "            if moca is not None:\n                x = moca(x, image_mask)\n"),
    ("the map twice", "place", MOCA, MOCA + "            x = moca(x, image_mask)\n"),
    ("the map is never applied", "place", MOCA, ""),
    ("the map on every position of the layer", "place", MOCA,
     MOCA.replace("image_mask)", "torch.ones_like(image_mask))")),
    ("the map on text positions", "place", MOCA, MOCA.replace("image_mask)", "~image_mask)")),
    ("the map on the MLP's output alone, before the sum", "place", MOCA, "", SECOND,
     "            y = self.mlp(self.post_attention_layernorm(x))\n"
     "            x = x + (y if moca is None else moca(y, image_mask))"),
    ("the map's result is added to the layer's", "place", MOCA, MOCA.replace("x = moca", "x = x + moca")),
    ("the residual sum after attention is missing", "layer", FIRST, "            x = y\n"),
    ("the residual sum after the MLP is missing", "layer", SECOND, SECOND.replace("x + self", "self")),
    ("the MLP reads the input of the layer", "layer", SECOND, "            x = x + self.mlp(normed)"),
    ("the first norm is used twice", "layer", SECOND, SECOND.replace("post_attention_layernorm", "input_layernorm")),
    ("attention reads the input without its norm", "layer", ATTN, ATTN.replace("normed", "x")),
    ("the MLP reads its input without a norm", "layer", SECOND,
     SECOND.replace("self.post_attention_layernorm(x)", "x")),
    ("norms after the sums, as in the first transformer", "layer", FIRST,
     "            x = self.input_layernorm(x + y)\n"),
    ("the MLP is left out", "layer", SECOND, "            pass"),
    ("a parallel layer in series", "parallel", PARALLEL,
     "            x = x + y\n            x = x + self.mlp(self.input_layernorm(x))"),
    ("a parallel layer without attention", "parallel", PARALLEL, PARALLEL.replace(" + y", "")),
    ("attention maps of keys and queries mixed up", "attention_maps", MAPS, MAPS.replace("(q, k,", "(k * 2, q,")),
    ("rows and columns of the maps are mixed up", "attention_maps", MAPS,
     MAPS.replace("*attend", "attend[1], attend[0]")),
    ("a map is returned that nobody asked for", "attention_maps", NONE,
     NONE.replace("None if attend", "torch.zeros(()) if attend")),
]

RIGHT = [
    ("position by position", "moca", '''
class MoCa(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        self.v = nn.Parameter(torch.zeros(hidden_size))
        self.u = nn.Parameter(torch.zeros(hidden_size) + 1)

    def forward(self, hidden_states, image_mask):
        rows = []
        for h, mask in zip(hidden_states, image_mask):
            tokens = [(self.u * x + self.v).to(x.dtype) if is_image else x for x, is_image in zip(h, mask.tolist())]
            rows.append(torch.stack(tokens))
        return torch.stack(rows)
'''),
    ("indices and a copy, in float64", "moca", '''
def forward(self, hidden_states, image_mask):
    out = hidden_states.clone()
    x = hidden_states[image_mask].double()
    out[image_mask] = (x * self.u.double() + self.v.double()).to(out.dtype)
    return out


MoCa.forward = forward
'''),
    ("the layer with names for everything", "model", '''
def forward(self, x, rope, mask=None, cache=None, attend=None, moca=None, image_mask=None):
    normed = self.input_layernorm(x)
    change, queries, keys = self.self_attn(normed, rope, mask, cache)
    after = x + change
    read = normed if self.post_attention_layernorm is None else self.post_attention_layernorm(after)
    after = after + self.mlp(read)
    if moca is not None:
        after = moca(after, image_mask)
    if attend is None:
        return after, None
    rows, columns = attend
    return after, attention_to_image(queries, keys, rows, columns, window=self.self_attn.window)


DecoderLayer.forward = forward
'''),
]
