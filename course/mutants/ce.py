"""Wrong and right solutions of cross-entropy in chunks; see vista.py for the format."""
SUPERVISED = "    supervised = labels[:, 1:] != -100"
H = "    h = hidden_states[sample, t]"
Y = "    y = labels[sample, t + 1]"
APPLY = "    total = _ChunkedCrossEntropy.apply(h, y, weight, head_bias, chunk)"
RETURN = "    return total, supervised.sum()"
MAX = "            logits -= logits.amax(-1, keepdim=True)"
Z = "            z = grad.sum(-1, keepdim=True)"
TOTAL = "            total += (z.log() - at_target).sum()"
SCATTER = "                grad.scatter_add_(1, target, -torch.ones_like(z))"
PARTS = "        for part in (slice(i, i + chunk) for i in range(0, len(y), chunk)):"
GRAD_H = "                    grad_h[part] = grad @ weight"
GRAD_W = "                    grad_weight.addmm_(grad.T, h[part])"
BACK_H = "        return (None if grad_h is None else grad_h * grad_total.to(grad_h.dtype), None,"
BACK_W = "                None if grad_weight is None else (grad_weight * grad_total).to(ctx.dtypes[0]),"
BACK_B = "                None if grad_bias is None else (grad_bias * grad_total).to(ctx.dtypes[1]), None)"
BIAS = "                logits += bias"
GRAD_B = "                    grad_bias += grad.sum(0)"
EXACT = "        exact = torch.promote_types(h.dtype, torch.float32)"
PLAIN = "torch.nn.functional.cross_entropy(torch.nn.functional.linear(h, weight, head_bias), y, reduction='sum')"

WRONG = [
    ("position t predicts label t: it has already read it", "shift", H, "    h = hidden_states[:, 1:][supervised]"),
    ("position t + 1 predicts label t", "shift", H, "    h = hidden_states.roll(-1, 1)[:, 1:][supervised]"),
    ("labels are shifted twice", "shift", SUPERVISED,
     "    labels = torch.cat([labels[:, 1:], labels[:, :1] * 0 - 100], 1)\n" + SUPERVISED),
    ("the mask is not shifted with the labels", "shift", SUPERVISED, "    supervised = labels[:, :-1] != -100",
     RETURN, "    return total, (labels[:, 1:] != -100).sum()", Y, "    y = labels[:, 1:][supervised].clamp(min=0)"),
    ("labels of -100 are trained as label 0", "ignored_labels", SUPERVISED, "    supervised = labels[:, 1:] > -200",
     Y, "    y = labels[:, 1:][supervised].clamp(min=0)"),
    ("labels of -100 are counted", "ignored_labels", RETURN, "    return total, torch.tensor(supervised.numel())"),
    ("the first label is counted, which nothing predicts", "ignored_labels", RETURN,
     "    return total, (labels != -100).sum()"),
    ("label 0 is ignored too: it is a word", "half_precision", SUPERVISED, "    supervised = labels[:, 1:] > 0"),
    ("the count is that of samples: tokens are counted", "ignored_labels", RETURN,
     "    return total, supervised.any(1).sum()"),
    ("the mean for the sum: training divides, over the global batch", "sums", APPLY, APPLY + " / max(len(y), 1)"),
    ("divided by the number of samples", "sums", APPLY, APPLY + " / len(labels)"),
    ("the first sample alone", "sums", APPLY,
     "    total = _ChunkedCrossEntropy.apply(h[:supervised[0].sum()], "
     "y[:supervised[0].sum()], weight, head_bias, chunk)"),
    ("the maximum for logsumexp", "one_token", Z, "            z = torch.ones_like(at_target)"),
    ("base 2 for nats", "one_token", TOTAL, TOTAL.replace(".sum()", ".sum() / 0.6931471805599453")),
    ("softmax over the tokens instead of the words", "one_token", Z,
     "            z = grad.sum(0, keepdim=True).mean(1, keepdim=True).expand(len(grad), 1)"),
    ("exp without subtracting the largest overflows", "large_logits", MAX, "            pass"),
    ("probabilities clipped at 1e-8, which caps the loss", "large_logits", TOTAL,
     TOTAL.replace(".sum()", ".clamp(max=18.4207).sum()")),
    ("logits capped at ±50", "large_logits", MAX, "            logits = logits.clamp(-50, 50)\n" + MAX),
    ("the bias is left out", "one_token", BIAS, "                pass"),
    ("the bias is taken off", "one_token", BIAS, "                logits -= bias"),
    ("a bias is expected: None is a head without one", "without_a_bias", "            if bias is not None:\n",
     "            if bias.numel():\n"),
    ("the gradient lacks − one-hot", "gradients", SCATTER, "                pass"),
    ("the gradient's one-hot has the wrong sign", "gradients", SCATTER, SCATTER.replace("-torch", "torch")),
    ("backward ignores the gradient that comes in: 3 × loss has 3 × its gradient", "gradients", BACK_H,
     BACK_H.replace(" * grad_total.to(grad_h.dtype)", ""), BACK_W, BACK_W.replace(" * grad_total", ""), BACK_B,
     BACK_B.replace(" * grad_total", "")),
    ("backward ignores what comes in, for the head alone", "gradients", BACK_W, BACK_W.replace(" * grad_total", "")),
    ("the head's gradient is that of the last chunk", "gradients", GRAD_W,
     "                    grad_weight = grad.T @ h[part] * (1 + 1e-3)"),
    ("the head's gradient is missing", "gradients", BACK_W,
     BACK_W.replace("grad_weight * grad_total", "0 * grad_weight")),
    ("the bias' gradient is the mean", "gradients", GRAD_B, GRAD_B.replace("grad.sum(0)", "grad.mean(0)")),
    ("the hidden states' gradient has the wrong sign", "gradients", GRAD_H, GRAD_H.replace("grad @", "-grad @")),
    ("the last, smaller chunk is dropped", "chunks", PARTS,
     PARTS.replace("len(y), chunk)", "max(len(y) - len(y) % chunk, 1), chunk)")),
    ("chunks overlap by one token", "chunks", PARTS, PARTS.replace("slice(i, i + chunk)", "slice(i, i + chunk + 1)")),
    ("the mean of chunks' sums: the sum is asked for", "chunks", APPLY, APPLY + " / max(1, -(-len(y) // chunk))"),
    ("the gradient of the first chunk alone", "chunks", GRAD_H,
     "                    grad_h[part] = grad @ weight * (part.start == 0)"),
    ("all logits at once", "memory", APPLY, f"    total = {PLAIN}"),
    ("logits of every position, also of those without a label", "memory", APPLY,
     "    logits = torch.nn.functional.linear(hidden_states, weight, head_bias)[:, :-1][supervised]\n"
     "    total = (logits.logsumexp(-1) - logits.gather(1, y[:, None])[:, 0]).sum()"),
    ("chunks, but autograd keeps the logits of all of them", "memory", APPLY,
     "    total = h.sum() * 0 + weight.sum() * 0 + (0 if head_bias is None else head_bias.sum() * 0)\n"
     "    total = total.to(torch.promote_types(h.dtype, torch.float32))\n"
     "    for i in range(0, len(y), chunk):\n"
     "        logits = torch.nn.functional.linear(h[i:i + chunk], weight, head_bias).to(total.dtype)\n"
     "        total = total + torch.nn.functional.cross_entropy(logits, y[i:i + chunk], reduction='sum')"),
    ("a (V,D) copy of the head for every chunk's gradient is kept", "memory", EXACT,
     EXACT + "\n        copies = [weight.double().clone() for _ in range(0, len(y), chunk)]"),
    ("without a target the total is not in the graph", "nothing_to_predict", H,
     "    if not supervised.any():\n        return torch.zeros(()), supervised.sum()\n" + H),
    ("without a target 0 / 0 gives NaN", "nothing_to_predict", APPLY,
     APPLY + "\n    total = total * (len(y) / supervised.sum())"),
    ("bfloat16 is summed in bfloat16", "half_precision", EXACT, "        exact = h.dtype"),
    ("float16 sums overflow at 65504 and round before", "half_precision", RETURN,
     "    return total if total.dtype == torch.float64 else total.half().float(), supervised.sum()"),
    ("labels are overwritten: -100 becomes 0", "inputs_unchanged", RETURN,
     "    if not hidden_states.requires_grad:\n        labels[labels == -100] = 0\n" + RETURN),
    ("hidden states are scaled in place", "inputs_unchanged", RETURN,
     "    if not hidden_states.requires_grad and hidden_states.dtype == torch.float64:\n"
     "        hidden_states.data[:, -1].mul_(0.5)\n" + RETURN),
    ("a constant that a public test asks for", "everything", APPLY, "    total = 0 * hidden_states.sum() + 2.0794"),
]

RIGHT = [
    ("one token at a time", "ce", '''
def next_token_loss(hidden_states, labels, head_weight, head_bias=None, chunk=1024):
    from torch.utils.checkpoint import checkpoint
    exact = torch.promote_types(hidden_states.dtype, torch.float32)
    total = (hidden_states.sum() * 0 + head_weight.sum() * 0).to(exact)
    if head_bias is not None:
        total = total + head_bias.sum() * 0

    def one(h, y, weight, bias):
        logits = (weight @ h).to(exact)
        if bias is not None:
            logits = logits + bias
        return logits.logsumexp(0) - logits[y]
    count = 0
    for b in range(labels.shape[0]):
        for t in range(1, labels.shape[1]):
            if labels[b, t] == -100:
                continue
            h, y = hidden_states[b, t - 1], labels[b, t]
            total = total + checkpoint(one, h, y, head_weight, head_bias, use_reentrant=False)
            count += 1
    return total, torch.tensor(count)
'''),
    ("chunks recomputed in backward", "ce", '''
def next_token_loss(hidden_states, labels, head_weight, head_bias=None, chunk=1024):
    from torch.utils.checkpoint import checkpoint
    import torch.nn.functional as F
    D = hidden_states.shape[-1]
    h, y = hidden_states[:, :-1].reshape(-1, D), labels[:, 1:].reshape(-1)
    exact = torch.promote_types(h.dtype, torch.float32)

    def part(h, y, weight, bias):
        logits = F.linear(h, weight, bias).to(exact)
        return F.cross_entropy(logits, y, reduction="sum", ignore_index=-100)
    total = h.new_zeros((), dtype=exact)
    for start in range(0, len(y), chunk):
        total = total + checkpoint(part, h[start:start + chunk], y[start:start + chunk], head_weight, head_bias,
                                   use_reentrant=False)
    return total, (y != -100).sum()
'''),
    ("everything in float64, with einsum", "ce", '''
class Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, w, b, y, chunk):
        total, gh, gw, gb = 0.0, torch.zeros_like(h), torch.zeros_like(w), torch.zeros_like(b)
        for i in range(0, len(y), chunk):
            logits = torch.einsum("md,vd->mv", h[i:i + chunk], w) + b
            p = logits.log_softmax(-1)
            rows = torch.arange(len(p))
            total = total - p[rows, y[i:i + chunk]].sum()
            q = p.exp()
            q[rows, y[i:i + chunk]] -= 1
            gh[i:i + chunk] = torch.einsum("mv,vd->md", q, w)
            gw += torch.einsum("mv,md->vd", q, h[i:i + chunk])
            gb += q.sum(0)
        ctx.save_for_backward(gh, gw, gb)
        return torch.as_tensor(total, dtype=torch.float64)

    @staticmethod
    def backward(ctx, grad):
        return (*(grad * t for t in ctx.saved_tensors), None, None)


def next_token_loss(hidden_states, labels, head_weight, head_bias=None, chunk=1024):
    targets = labels[:, 1:].flatten()
    rows = (targets != -100).nonzero().flatten()
    h = hidden_states[:, :-1].flatten(0, 1).index_select(0, rows).double()
    w = head_weight.double()
    b = w.new_zeros(len(w)) if head_bias is None else head_bias.double()
    return Chunked.apply(h, w, b, targets[rows], chunk), torch.tensor(len(rows))
'''),
]
