"""Wrong solutions of VISTA: (the mistake, as feedback; the item it breaks; text of the solution, its replacement; …).
And right ones that are written differently: (how, module, code that follows the project's)."""

T = "    t = text_mask.cumsum(1)[sample, position].to(exact)"
F = '    f = {"t/m": t / m, "t": t, "1": torch.ones_like(t)}[weighting]'
END = "    return (f * d / m).sum(), text_mask.any(1).sum()"
MEAN = '        d = d.mean(-1) if reduce == "mean" else d.sum(-1)'
X = "x, S = text_embeds[sample, position].to(exact), visual_state.to(exact)[sample]"
M = "    m = text_mask.sum(1)[sample].to(exact)"
COSINE = "        d = 1 - F.cosine_similarity(x, S, dim=-1)"
DTYPE = "    exact = torch.promote_types(text_embeds.dtype, torch.float32)"

WRONG = [
    ("f(t) starts at 0: the paper counts from 1", "weights", T, T + "\n    t = t - 1"),
    ("t counts padding and gaps too: count text tokens alone", "weights", T, "    t = (position + 1).to(exact)"),
    ("f(t) is 0 at the first token and 1 at the last: it is t/m, not (t − 1)/(m − 1)", "weights", F,
     F.replace("t / m", "(t - 1) / (m - 1).clamp(min=1)")),
    ("f(t) falls along the answer: later tokens weigh more, not less", "weights", F,
     F.replace("t / m", "(m - t + 1) / m")),
    ("f(t) is missing: every token weighs the same", "weights", F, F.replace("t / m", "torch.ones_like(t)")),
    ("f(t) is squared", "weights", F, F.replace("t / m", "(t / m) ** 2")),
    ("f(t) is normalised to sum 1: the paper divides by m and by nothing else", "average", F,
     F.replace("torch.ones_like(t)", "torch.ones_like(t) / m")),
    ("t/(m+1): the last token weighs 1", "weights", F, F.replace("t / m", "t / (m + 1)")),
    ("t divided by the length of the sequence, padding included: divide by the sample's own m", "weights", F,
     F.replace("t / m", "t / text_mask.shape[1]")),
    ("the sum over the width: ours is the mean", "distance", MEAN, "        d = d.sum(-1)"),
    ("the norm without its square", "distance", MEAN, MEAN + "\n        d = d.sqrt()"),
    ("the absolute difference for the squared one", "distance", "d = (x - S).pow(2)", "d = (x - S).abs()"),
    ("half of the squared distance: there is no 1/2 in eq. (10)", "distance", "d = (x - S).pow(2)",
     "d = (x - S).pow(2) / 2"),
    ("distance of unit vectors: eq. (10) does not normalise", "distance", "d = (x - S).pow(2)",
     "d = (F.normalize(x, dim=-1) - F.normalize(S, dim=-1)).pow(2)"),
    ("S_n of the wrong sample", "samples", "visual_state.to(exact)[sample]",
     "visual_state.to(exact)[(sample + 1) % len(visual_state)]"),
    ("the token before the text token", "weights", "text_embeds[sample, position]",
     "text_embeds[sample, position - 1]"),
    ("the token after the text token", "weights", "text_embeds[sample, position]",
     "text_embeds[sample, (position + 1) % text_embeds.shape[1]]"),
    ("1/m is missing: a long answer would weigh more", "average", END, END.replace("f * d / m", "f * d")),
    ("divided by m²", "average", END, END.replace("f * d / m", "f * d / m / m")),
    ("divided by the sequence length instead of m", "average", END, END.replace("/ m)", "/ text_mask.shape[1])")),
    ("divided by m − 1", "average", END, END.replace("/ m)", "/ (m - 1).clamp(min=1))")),
    ("the mean over samples: the total is their sum, training divides", "samples", END,
     END.replace("(f * d / m).sum()", "(f * d / m).sum() / text_mask.any(1).sum().clamp(min=1)")),
    ("one m for the whole batch: each sample has its own", "samples", M, "    m = text_mask.sum().to(exact)"),
    ("t runs on from sample to sample", "samples", T, "    t = torch.arange(1, len(sample) + 1).to(exact)", M,
     "    m = text_mask.sum(1)[sample].to(exact)"),
    ("S_n of the first sample for every sample", "samples", "visual_state.to(exact)[sample]",
     "visual_state.to(exact)[:1].expand(len(sample), -1)"),
    ("the mean of all tokens for the sum over samples", "samples", END,
     END.replace("(f * d / m).sum()", "(f * d).mean()")),
    ("samples without text are counted", "nothing_to_align", END,
     END.replace("text_mask.any(1).sum()", "torch.tensor(len(text_mask))")),
    ("the count is that of tokens: samples are counted", "nothing_to_align", END,
     END.replace("text_mask.any(1).sum()", "text_mask.sum()")),
    ("a batch without text gives a number that is not in the graph", "nothing_to_align", T,
     "    if not text_mask.any():\n        return torch.zeros(()), torch.tensor(0)\n" + T),
    ("0 / 0: a batch without text gives NaN", "nothing_to_align", END,
     END.replace("(f * d / m).sum()", "(f * d / m).sum() * text_mask.sum() / text_mask.sum()")),
    ("x_t is detached: its gradient is kept", "gradients", X, X.replace("text_embeds[", "text_embeds.detach()[")),
    ("S_n is detached: it is what the loss trains", "gradients", X,
     X.replace("visual_state.to", "visual_state.detach().to")),
    ("the gradient is stopped at the total", "gradients", END,
     END.replace("(f * d / m).sum()", "(f * d / m).sum().detach()")),
    ("cosine without 1 −: similar vectors must cost little", "cosine", COSINE, COSINE.replace("1 - ", "")),
    ("a scalar product for the cosine: divide by both lengths", "cosine", COSINE, "        d = 1 - (x * S).sum(-1)"),
    ("1 − |cos|: opposite directions are far, not near", "cosine", COSINE,
     COSINE.replace("F.cosine_similarity(x, S, dim=-1)",
     "F.cosine_similarity(x, S, dim=-1).abs()")),
    ("cosine over the tokens instead of the width", "cosine", COSINE, COSINE.replace("dim=-1", "dim=0") + ".mean()"),
    ("bfloat16 is summed in bfloat16", "half_precision", DTYPE, "    exact = text_embeds.dtype"),
    ("everything is computed in float16, which overflows and rounds", "half_precision", DTYPE,
     "    exact = text_embeds.dtype if text_embeds.dtype == torch.float64 else torch.float16"),
    ('weighting="t" is divided by m as "t/m" is', "weightings", F, F.replace('"t": t,', '"t": t / m,')),
    ('weighting="t" counts from 0', "weightings", F, F.replace('"t": t,', '"t": t - 1,')),
    ("the answer of the public test, written down", "everything", END,
     "    return torch.full_like((f * d / m).sum(), 10 / 16), text_mask.any(1).sum()"),
    ("inputs are changed in place", "inputs_unchanged", DTYPE,
     DTYPE + "\n    if not text_embeds.requires_grad:\n"
     "        text_embeds.mul_(text_mask[..., None])\n        visual_state.mul_(0.5)"),
]

RIGHT = [
    ("one token at a time", "vista", '''
def alignment_loss(text_embeds, text_mask, visual_state, weighting="t/m", distance="l2", reduce="mean"):
    total, count = text_embeds.sum().float() * 0 + visual_state.sum().float() * 0, 0
    if text_embeds.dtype == torch.float64:
        total = total.double()
    for x, mask, s in zip(text_embeds, text_mask, visual_state):
        m = int(mask.sum())
        count += m > 0
        for t, token in enumerate(x[mask], 1):
            a, b = token.to(total.dtype), s.to(total.dtype)
            f = t / m
            if weighting == "t":
                f = t
            elif weighting == "1":
                f = 1
            if distance == "cosine":
                d = 1 - (a @ b) / a.norm() / b.norm()
            else:
                d = ((a - b) ** 2).sum()
                if reduce == "mean":
                    d = d / len(a)
            total = total + f * d / m
    return total, torch.tensor(count)
'''),
    ("einsum over a dense matrix of weights", "vista", '''
def alignment_loss(text_embeds, text_mask, visual_state, weighting="t/m", distance="l2", reduce="mean"):
    x, s, mask = text_embeds.double(), visual_state.double()[:, None], text_mask.double()
    m = mask.sum(1, keepdim=True).clamp(min=1)
    t = mask.cumsum(1) * mask
    f = {"t/m": t / m, "t": t, "1": mask}[weighting]
    if distance == "cosine":
        d = 1 - torch.einsum("btd,bod->bt", F.normalize(x, dim=-1), F.normalize(s, dim=-1))
    else:
        d = torch.einsum("btd,btd->bt", x - s, x - s) / (x.shape[-1] if reduce == "mean" else 1)
    return torch.einsum("bt,bt,bt->", f, d, (mask / m)), (mask.sum(1) > 0).sum()
'''),
    ("a sum of squares expanded, per sample, in float64", "vista", '''
def alignment_loss(text_embeds, text_mask, visual_state, weighting="t/m", distance="l2", reduce="mean"):
    total = (text_embeds[:0].sum() + 0 * visual_state.sum()).double()
    for b in range(len(text_mask)):
        x, s = text_embeds[b, text_mask[b]].double(), visual_state[b].double()
        if len(x) == 0:
            continue
        t = torch.arange(1, len(x) + 1, dtype=torch.float64)
        f = t / len(x) if weighting == "t/m" else t if weighting == "t" else torch.ones_like(t)
        d = (x * x).sum(-1) - 2 * x @ s + s @ s
        if reduce == "mean":
            d = d / x.shape[1]
        if distance == "cosine":
            d = 1 - torch.cosine_similarity(x, s[None])
        total = total + (f * d).mean()
    return total, text_mask.any(1).sum()
'''),
]
