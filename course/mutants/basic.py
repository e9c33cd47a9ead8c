"""Wrong and right solutions of BASIC; see vista.py for the format."""
INDEX = "    i = torch.arange(1, k + 1, dtype=torch.float64)"
W = '    w = {"increasing": i, "constant": torch.ones_like(i), "decreasing": i.flip(0)}[scheme] ** 2'
WN = "    return w / w.sum()"
A = "    a = attention.masked_fill(~text_mask[..., None], 0).sum(1)"
AN = "    return a / a.sum(1, keepdim=True).clamp(min=torch.finfo(a.dtype).tiny)"
DIFF = "    difference = F.normalize(v.to(exact), dim=-1) - F.normalize(v_hat.detach().to(exact), dim=-1)"
DA = "    a = degree.detach().to(exact)\n"
DAS = "    return (a * difference.pow(2).sum(-1)).sum(), (a > 0).any(1).sum()"
LOG = "            log_p, log_q = z_hat.log_softmax(-1), z.log_softmax(-1)"
KL = "            kl = torch.linalg.vecdot(p, log_p.sub_(log_q))"
ADD = "            total += a[part] @ kl"
GRAD = "                grad[part] = ((difference.to(low) @ embedding) * a[part, None]).to(v.dtype)"
BACK = "        return None if grad is None else grad * grad_total.to(grad.dtype), None, None, None, None"
LOOP = "        for start in range(0, len(v), chunk):"
APPLY = "        total = _ChunkedDivergence.apply(*patches, a, embedding.detach().to(low), chunk)"
COUNT = "    return total, (degree > 0).any(1).sum()"


def autograd(target: str = ".detach()", table: str = ".detach()", weight: str = ".detach()") -> str:
    """The divergence by autograd, without chunks."""
    return (f"        log_p, log_q = ((x @ embedding{table}.T).log_softmax(-1) for x in (v_hat{target}, v))\n"
            f"        total = (degree{weight} * (log_p.exp() * (log_p - log_q)).sum(-1)).sum()")


WRONG = [
    ("i for i²", "increasing_weights", W, W.replace(" ** 2", "")),
    ("i³ for i²", "increasing_weights", W, W.replace("** 2", "** 3")),
    ("i counts from 0: the first layer would be left out", "increasing_weights", INDEX,
     "    i = torch.arange(k, dtype=torch.float64) + (k == 1)"),
    ("i counts from 2", "increasing_weights", INDEX, "    i = torch.arange(2, k + 2, dtype=torch.float64)"),
    ("the weights do not sum to 1", "increasing_weights", WN, "    return w"),
    ("softmax for i² / Σ j²", "increasing_weights", WN, "    return w.softmax(0)"),
    ("divided by the largest, not by the sum", "increasing_weights", WN, "    return w / w.max()"),
    ("divided by k²", "increasing_weights", WN, "    return w / k ** 2"),
    ("decreasing is increasing", "other_weights", W, W.replace("i.flip(0)", "i")),
    ("decreasing is 1 / i²: it is the increasing weights, reversed", "other_weights", W,
     W.replace("i.flip(0)", "1 / i")),
    ("constant is i: equal weights are meant", "other_weights", W, W.replace("torch.ones_like(i)", "i")),
    ("softmax over the image tokens for a share", "degree", AN,
     "    return a.softmax(1) * text_mask.any(1, keepdim=True)"),
    ("attention is not normalised", "degree", AN, "    return a"),
    ("divided by the number of text rows: Σ_i a_i = 1 is wanted", "degree", AN,
     "    return a / text_mask.sum(1, keepdim=True).clamp(min=1)"),
    ("normalised over the batch: over each sample's image tokens", "degree", AN, "    return a / a.sum()"),
    ("normalised over samples", "degree", AN, "    return a / a.sum(0, keepdim=True)"),
    ("each row is normalised before the average", "degree", A,
     "    attention = attention / attention.sum(-1, keepdim=True)\n" + A),
    ("the last text row alone", "degree", A,
     A.replace(".sum(1)", "[:, -1]") + "\n    a = torch.where(text_mask.any(1, keepdim=True), a, 0)"),
    ("the largest row for the sum of rows", "degree", A, A.replace(".sum(1)", ".amax(1)")),
    ("padding rows count", "degree_of_text_rows", A, "    a = attention.sum(1) * text_mask.any(1, keepdim=True)"),
    ("the mask the wrong way round", "degree", A, A.replace("~text_mask", "text_mask")),
    ("a sample without text gives NaN: 0 / 0", "degree_of_text_rows", AN, "    return a / a.sum(1, keepdim=True)"),
    ("a sample without text gives equal degrees", "degree_of_text_rows", AN,
     "    a = torch.where(text_mask.any(1, keepdim=True), a, 1.0)\n" + AN),
    ("vectors are not normalised: directions are compared", "direction", DIFF,
     "    difference = v.to(exact) - v_hat.detach().to(exact)"),
    ("the target alone is normalised", "direction", DIFF,
     DIFF.replace("F.normalize(v.to(exact), dim=-1)", "v.to(exact)")),
    ("normalised over patches instead of the width", "direction", DIFF, DIFF.replace("dim=-1", "dim=1")),
    ("ℓ1 norm for ℓ2", "direction", DIFF, DIFF.replace("dim=-1)", "dim=-1, p=1)")),
    ("the mean over the width: eq. (6) is a squared norm", "direction", DAS, DAS.replace("sum(-1))", "mean(-1))")),
    ("the norm without its square", "direction", DAS,
     DAS.replace("difference.pow(2).sum(-1)", "difference.norm(dim=-1)")),
    ("1 − cos, which is half of it", "direction", DAS,
     DAS.replace("difference.pow(2).sum(-1)", "difference.pow(2).sum(-1) / 2")),
    ("the degree is left out of the direction loss", "direction_total", DAS,
     DAS.replace("a * diff", "(a > 0) * diff")),
    ("the mean over patches", "direction_total", DAS, DAS.replace(")).sum(), (a", ")).mean(), (a")),
    ("the mean over samples: the total is a sum", "direction_total", DAS,
     DAS.replace(").sum(), (a", ").sum() / len(a), (a")),
    ("samples without a degree are counted", "direction_total", DAS,
     DAS.replace("(a > 0).any(1).sum()", "torch.tensor(len(a))")),
    ("patches are counted: samples are", "direction_total", DAS,
     DAS.replace("(a > 0).any(1).sum()", "(a > 0).sum()")),
    ("KL the wrong way round: the target comes first", "divergence", LOG,
     LOG.replace("z_hat.log_softmax(-1), z.log_softmax(-1)",
     "z.log_softmax(-1), z_hat.log_softmax(-1)")),
    ("cross-entropy for KL: the target's entropy is left in", "divergence", KL,
     "            kl = -(p * log_q).sum(-1)"),
    ("base 2 for nats", "divergence", ADD, ADD.replace("@ kl", "@ kl / 0.6931471805599453")),
    ("the mean over the vocabulary", "divergence", ADD, ADD.replace("@ kl", "@ kl / len(embedding)")),
    ("a symmetric divergence", "divergence", KL,
     "            kl = ((p - log_q.exp()) * (log_p - log_q)).sum(-1) / 2"),
    ("squared difference of probabilities for KL", "divergence", KL,
     "            kl = (p - log_q.exp()).pow(2).sum(-1)"),
    ("logits divided by √D, as attention does", "divergence", LOG,
     "            z_hat, z = z_hat / v.shape[1] ** 0.5, z / v.shape[1] ** 0.5\n" + LOG),
    ("unit vectors before the softmax: eq. (7) takes v as it is", "divergence", APPLY,
     APPLY.replace("*patches", "*(F.normalize(p, dim=-1) for p in patches)")),
    ("the degree is left out of the divergence", "divergence_total", ADD, ADD.replace("a[part] @ kl", "kl.sum()")),
    ("the divergence counts all samples", "divergence_total", COUNT, "    return total, torch.tensor(len(degree))"),
    ("the mean over patches of the divergence", "divergence_total", COUNT,
     "    return total / max(1, len(a)), (degree > 0).any(1).sum()"),
    ("the gradient lacks − softmax(v̂ Eᵀ)", "gradients", GRAD,
     GRAD.replace("difference.to(low)", "(difference + p).to(low)")),
    ("the gradient has the wrong sign", "gradients", GRAD, GRAD.replace("difference.to(low)", "-difference.to(low)")),
    ("the gradient lacks the degree", "gradients", GRAD, GRAD.replace(" * a[part, None]", "")),
    ("backward ignores what comes in", "gradients", BACK, BACK.replace(" * grad_total.to(grad.dtype)", "")),
    ("v is detached", "gradients", DIFF, DIFF.replace("v.to(exact)", "v.detach().to(exact)")),
    ("v̂ is not detached in the direction loss", "constants", DIFF, DIFF.replace("v_hat.detach()", "v_hat")),
    ("the degree is trained by the direction loss", "constants", DA, DA.replace(".detach()", "")),
    ("v̂ is trained by the divergence", "constants", APPLY, autograd(target="")),
    ("the word embeddings are trained by the divergence", "constants", APPLY, autograd(table="")),
    ("the degree is trained by the divergence", "constants", APPLY, autograd(weight="")),
    ("all probabilities at once", "memory", APPLY, autograd()),
    ("the last chunk is dropped", "chunks", LOOP,
     LOOP.replace("len(v), chunk", "max(1, len(v) - len(v) % chunk), chunk")),
    ("the mean over chunks", "chunks", COUNT,
     "    return total / max(1, -(-len(a) // chunk)), (degree > 0).any(1).sum()"),
    ("the gradient of the first chunk alone", "chunks", GRAD,
     GRAD.replace("a[part, None]", "a[part, None] * (start == 0)")),
    ("float16 probabilities, which underflow", "divergence", LOG,
     LOG + "\n            log_p = log_p.half().to(exact)"),
]

RIGHT = [
    ("loops, and chunks recomputed in backward", "basic", '''
from torch.utils.checkpoint import checkpoint


def layer_weights(k, scheme="increasing"):
    w = [1.0 if scheme == "constant" else float(i * i) for i in range(1, k + 1)]
    if scheme == "decreasing":
        w = w[::-1]
    return torch.tensor([x / sum(w) for x in w], dtype=torch.float64)


def supervision_degree(attention, text_mask):
    out = torch.zeros_like(attention[:, 0])
    for b in range(len(attention)):
        if text_mask[b].any():
            seen = attention[b][text_mask[b]].mean(0)
            out[b] = seen / seen.sum()
    return out


def direction_loss(v, v_hat, degree):
    cos = torch.cosine_similarity(v, v_hat.detach(), dim=-1)
    return (degree.detach() * (2 - 2 * cos)).sum(), (degree.sum(1) > 0).sum()


def semantic_loss(v, v_hat, degree, embedding, chunk=128):
    a, E = degree.detach().flatten(), embedding.detach()
    def part(v, v_hat, a):
        p, q = ((x @ E.T).log_softmax(-1) for x in (v_hat, v))
        return (a * F.kl_div(q, p, reduction="none", log_target=True).sum(-1)).sum()
    v, v_hat = v.flatten(0, 1), v_hat.detach().flatten(0, 1)
    total = v.sum() * 0
    for i in range(0, len(v), chunk):
        total = total + checkpoint(part, v[i:i + chunk], v_hat[i:i + chunk], a[i:i + chunk], use_reentrant=False)
    return total, (degree > 0).any(1).sum()
'''),
    ("einsum, degrees through a softmax of logarithms", "basic", '''
def layer_weights(k, scheme="increasing"):
    i = torch.linspace(1, k, k, dtype=torch.float64)
    i = {"increasing": i, "decreasing": k + 1 - i, "constant": i * 0 + 1}[scheme]
    return i.square() / i.square().sum()


def supervision_degree(attention, text_mask):
    a = torch.einsum("bmn,bm->bn", attention, text_mask.to(attention.dtype))
    return torch.nan_to_num(a / torch.einsum("bn->b", a)[:, None])


def direction_loss(v, v_hat, degree):
    with torch.no_grad():
        u = v_hat / torch.einsum("bnd,bnd->bn", v_hat, v_hat).sqrt()[..., None]
        a = degree.clone()
    w = v / v.norm(dim=-1, keepdim=True)
    return torch.einsum("bn,bnd,bnd->", a, w - u, w - u), torch.count_nonzero(a.amax(1))
'''),
    ("float64 throughout, by another autograd function", "basic", '''
class Both(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, v_hat, a, E, chunk):
        total, out = torch.zeros((), dtype=torch.float64), []
        for x, t, w in zip(v.split(chunk), v_hat.split(chunk), a.split(chunk)):
            p, q = (t @ E.T).softmax(-1), (x @ E.T).softmax(-1)
            kl = torch.special.xlogy(p, p).sum(-1) - (p * (x @ E.T).log_softmax(-1)).sum(-1)
            total += (w * kl).sum()
            out.append(w[:, None] * ((q - p) @ E))
        ctx.save_for_backward(torch.cat(out))
        return total

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0], None, None, None, None


def semantic_loss(v, v_hat, degree, embedding, chunk=128):
    parts = [t.double().flatten(0, 1) for t in (v, v_hat.detach())]
    total = Both.apply(*parts, degree.detach().double().flatten(), embedding.detach().double(), chunk)
    return total, torch.tensor(sum(bool(row.any()) for row in degree > 0))
'''),
]
