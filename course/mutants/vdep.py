"""Wrong and right solutions of VDEP; see vista.py for the format."""
P = "    predicted = hidden_states[:, :hidden_states.shape[1] - shift].to(exact)"
X = "    target = image_embeds[:, shift:].detach().to(exact)"
SQ = "    squares = (predicted - target).pow(2)"
D = '    d = squares.mean(-1) if reduce == "mean" else squares.sum(-1)'
INV = "        d = d / (1 + d)"
SIG = "        d = 2 * d.sigmoid() - 1"
TOTAL = "    total = d.mean(-1).sum()"
RETURN = "    return total, torch.full((), len(d), device=d.device)"
EXACT = "    exact = torch.promote_types(hidden_states.dtype, torch.float32)"

WRONG = [
    ("position i is compared with token i: it is to predict the next one", "next_token", P,
     "    predicted = hidden_states[:, :-1].to(exact) if shift else hidden_states.to(exact)", X,
     "    target = (image_embeds[:, :-1] if shift else image_embeds).detach().to(exact)"),
    ("position i predicts token i − 1: the direction of reading is reversed", "next_token", P,
     "    predicted = hidden_states[:, shift:].to(exact)", X,
     "    target = image_embeds[:, :image_embeds.shape[1] - shift].detach().to(exact)"),
    ("position i predicts token i + 2", "next_token", P,
     "    predicted = hidden_states[:, :hidden_states.shape[1] - shift].to(exact)", X,
     "    target = image_embeds.roll(-shift, 1)[:, shift:].detach().to(exact)"),
    ("the targets wrap around: the last position predicts the first token", "next_token", P,
     "    predicted = hidden_states.to(exact)", X, "    target = image_embeds.roll(-shift, 1).detach().to(exact)"),
    ("the last target is left out", "next_token", TOTAL,
     "    d = d[:, :-1] if shift and d.shape[1] > 1 else d\n" + TOTAL),
    ("the first prediction is left out", "next_token", TOTAL,
     "    d = d[:, 1:] if shift and d.shape[1] > 1 else d\n" + TOTAL),
    ("the last position alone: that is VISTA's state", "next_token", TOTAL,
     "    d = d[:, -1:] if shift else d\n" + TOTAL),
    ("tokens in reversed order", "next_token", X, "    target = image_embeds[:, shift:].flip(1).detach().to(exact)"),
    ("shift=0 still drops the last position", "same_token", P, "    predicted = hidden_states[:, :-1].to(exact)", X,
     "    target = (image_embeds[:, 1:] if shift else image_embeds[:, :-1]).detach().to(exact)"),
    ("shift=0 is ignored", "same_token", EXACT, EXACT + "\n    shift = 1"),
    ("shift=0 with the slice [:-0], which is empty", "same_token", P,
     "    predicted = hidden_states[:, :-shift].to(exact)"),
    ("the literal sum over the width: ours is the mean", "distance", D,
     D.replace("squares.mean(-1)", "squares.sum(-1)")),
    ("the norm without its square", "distance", D, D + "\n    d = d.sqrt()"),
    ("half of the square", "distance", SQ, SQ + "\n    squares = squares / 2"),
    ("the absolute difference for the squared one", "distance", SQ, "    squares = (predicted - target).abs()"),
    ("distance of unit vectors: the scale of the target counts", "distance", SQ,
     "    squares = (torch.nn.functional.normalize(predicted, dim=-1) - torch.nn.functional.normalize(target, "
     "dim=-1)).pow(2)"),
    ("smooth L1 for the square", "distance", SQ,
     "    squares = torch.nn.functional.smooth_l1_loss(predicted, target, reduction='none')"),
    ("the mean over D − 1, as of a variance", "distance", D,
     D + "\n    d = d * squares.shape[-1] / (squares.shape[-1] - 1)"),
    ("1 − cos for the squared distance", "distance", D,
     "    d = 1 - torch.cosine_similarity(predicted, target, dim=-1)"),
    ("the sum over positions for their mean", "positions", TOTAL, TOTAL.replace("d.mean(-1)", "d.sum(-1)")),
    ("divided by N: N − 1 positions predict", "positions", TOTAL,
     TOTAL.replace("d.mean(-1)", "(d.sum(-1) / (d.shape[1] + shift))")),
    ("the largest of the positions", "next_token", TOTAL, TOTAL.replace("d.mean(-1)", "d.amax(-1)")),
    ("the median of the positions", "next_token", TOTAL, TOTAL.replace("d.mean(-1)", "d.median(-1).values")),
    ("the mean over samples: training divides", "samples", TOTAL, TOTAL.replace(".sum()", ".mean()")),
    ("the first sample alone", "samples", TOTAL, TOTAL.replace(".sum()", "[:1].sum()")),
    ("targets of another sample", "samples", X, X.replace("image_embeds[", "image_embeds.roll(1, 0)[")),
    ("the count is that of positions: samples are counted", "samples", RETURN,
     "    return total, torch.tensor(d.numel())"),
    ("the count is 1", "samples", RETURN, "    return total, torch.tensor(1)"),
    ("softmax over the batch as weights", "samples", TOTAL, "    total = (d.mean(-1) * d.mean(-1).softmax(0)).sum()"),
    ("detach is missing: the projector would make what is easy to predict", "target", X, X.replace(".detach()", "")),
    ("the prediction is detached, not the target", "target", X, X.replace(".detach()", ""), P,
     P.replace(".to(exact)", ".detach().to(exact)")),
    ("both are detached: nothing is trained", "target", P, P.replace(".to(exact)", ".detach().to(exact)")),
    ("the target goes in place: image_embeds is cut from the graph of the caller", "target", X,
     "    target = image_embeds[:, shift:].to(exact)\n    target = target + 0 * predicted"),
    ("1 / (1 + d), which falls as d grows", "inverse", INV, "        d = 1 / (1 + d)"),
    ("the literal 1/d, which pushes h away from its target", "inverse", INV, "        d = 1 / d"),
    ("inverse of the mean over positions is left as l2", "inverse", INV, "        pass"),
    ("σ(d), which is 1/2 at d = 0", "sigmoid", SIG, "        d = d.sigmoid()"),
    ("tanh(d): 2 σ(d) − 1 is tanh(d/2)", "sigmoid", SIG, "        d = d.tanh()"),
    ("σ(−d), which falls", "sigmoid", SIG, "        d = 1 - 2 * d.sigmoid()"),
    ('reduce="sum" is ignored', "literal_sum", D, "    d = squares.mean(-1)"),
    ('reduce="sum" after the saturating distance', "literal_sum", D, "    d = squares.mean(-1)", TOTAL,
     "    if reduce == 'sum':\n        d = d * squares.shape[-1]\n" + TOTAL),
    ("bfloat16 is squared and summed in bfloat16", "half_precision", EXACT, "    exact = hidden_states.dtype"),
    ("float16, which rounds to 3 digits", "half_precision", EXACT,
     "    exact = torch.float64 if hidden_states.dtype == torch.float64 else torch.float16"),
    ("the difference is rounded to bfloat16 before it is squared", "half_precision", SQ,
     "    squares = (predicted - target).to(hidden_states.dtype).to(exact).pow(2)"),
    ("the public test's answer, written down", "everything", TOTAL, "    total = hidden_states.sum() * 0 + 0.5"),
]

RIGHT = [
    ("one position at a time", "vdep", '''
def reconstruction_loss(hidden_states, image_embeds, distance="l2", reduce="mean", shift=1):
    B, N, D = hidden_states.shape
    h, x = hidden_states, image_embeds.detach()
    if h.dtype != torch.float64:
        h, x = h.float(), x.float()
    total = 0 * h.sum()
    for b in range(B):
        for i in range(N - shift):
            d = ((h[b, i] - x[b, i + shift]) ** 2).sum()
            if reduce == "mean":
                d = d / D
            if distance == "inverse":
                d = 1 - 1 / (1 + d)
            if distance == "sigmoid":
                d = torch.tanh(d / 2)
            total = total + d / (N - shift)
    return total, torch.tensor(B)
'''),
    ("einsum, in float64", "vdep", '''
def reconstruction_loss(hidden_states, image_embeds, distance="l2", reduce="mean", shift=1):
    N = hidden_states.shape[1]
    e = hidden_states[:, :N - shift].double() - image_embeds[:, shift:].data.double()
    d = torch.einsum("bnd,bnd->bn", e, e) / (e.shape[-1] if reduce == "mean" else 1)
    d = {"l2": d, "inverse": d / (d + 1), "sigmoid": (1 - (-d).exp()) / (1 + (-d).exp())}[distance]
    return torch.einsum("bn->", d) / (N - shift), torch.as_tensor(hidden_states.size(0))
'''),
    ("the library's mse, sample by sample", "vdep", '''
def reconstruction_loss(hidden_states, image_embeds, distance="l2", reduce="mean", shift=1):
    with torch.no_grad():
        targets = image_embeds.clone().to(torch.promote_types(image_embeds.dtype, torch.float32))
    total = hidden_states.to(targets.dtype).sum() * 0
    for h, x in zip(hidden_states.unbind(0), targets.unbind(0)):
        d = torch.nn.functional.mse_loss(h[:len(h) - shift].to(x.dtype), x[shift:], reduction="none")
        d = getattr(d, reduce)(dim=1)
        if distance == "inverse":
            d = d.div(d + 1)
        elif distance == "sigmoid":
            d = 2 / (1 + torch.exp(-d)) - 1
        total = total + d.mean()
    return total, torch.tensor(hidden_states.shape[0])
'''),
]
