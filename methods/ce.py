"""Next-token cross-entropy, the objective of LLaVA-1.5.

Improved Baselines with Visual Instruction Tuning (LLaVA-1.5), arXiv 2310.03744. The same loss is
eq. 2 of VDEP (2502.09093), eq. 1 of VISTA (2505.10917) and eq. 3 of BASIC (2508.06895).

    L = − (1/m) Σ_{t: y_t supervised} log p(y_t | y_<t, image)                                        (1)
    p(· | y_<t, image) = softmax(W h_{t−1} + b)                                                       (2)

    symbol   variable          shape
    h        hidden_states     (B,T,D)   final hidden states, after the norm
    y        labels            (B,T)     -100 where not supervised
    W, b     head_weight, …    (V,D), (V,)
    m        count             ()        supervised tokens

Where the paper is silent
* The average. LLaVA's code averages over the tokens of each micro-batch, so that a token's weight depends on the other
  samples of its micro-batch. Ours: total and count are returned apart, and training divides by the count over the
  global batch. Accumulation steps and ranks change nothing.
* Memory. Positions that are not supervised (the image, the questions, the padding) are in no term of eq. 1. Their
  logits are not computed. The others are computed `chunk` positions at a time, value and gradient in one pass.
"""
import torch
from torch import Tensor


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Σ_p −log softmax(W h_p + b)[y_p]. The gradient is computed with the value, so that no logits are kept."""

    @staticmethod
    def forward(ctx, h: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, chunk: int) -> Tensor:
        need_h, _, need_weight, need_bias, _ = ctx.needs_input_grad
        exact = torch.promote_types(h.dtype, torch.float32)                     # bf16 is summed in float32
        total = h.new_zeros((), dtype=exact)
        grad_h = torch.zeros_like(h) if need_h else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if need_bias else None
        for part in (slice(i, i + chunk) for i in range(0, len(y), chunk)):
            logits = (h[part] @ weight.T).to(exact)                             # (chunk,V)
            if bias is not None:
                logits += bias
            logits -= logits.amax(-1, keepdim=True)                             # the largest is 0: exp cannot overflow
            target = y[part, None]                                              # (chunk,1)
            at_target = logits.gather(1, target)                                # (chunk,1)
            grad = logits.exp_()                                                # in the logits' place
            z = grad.sum(-1, keepdim=True)                                      # (chunk,1)
            total += (z.log() - at_target).sum()                                # eq. (1), (2)
            if need_h or need_weight or need_bias:
                grad /= z                                                       # softmax − onehot
                grad.scatter_add_(1, target, -torch.ones_like(z))
                if need_bias:
                    grad_bias += grad.sum(0)
                grad = grad.to(h.dtype)
                if need_h:
                    grad_h[part] = grad @ weight                                # (chunk,D)
                if need_weight and h.dtype == exact:
                    grad_weight.addmm_(grad.T, h[part])                         # (V,D), and no second one beside it
                elif need_weight:
                    grad_weight += grad.T @ h[part]
        ctx.save_for_backward(grad_h, grad_weight, grad_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor):
        # Chain rule: all was computed in forward, but for the factor d loss / d total. None: y, chunk.
        grad_h, grad_weight, grad_bias = ctx.saved_tensors
        return (None if grad_h is None else grad_h * grad_total.to(grad_h.dtype), None,
                None if grad_weight is None else (grad_weight * grad_total).to(ctx.dtypes[0]),
                None if grad_bias is None else (grad_bias * grad_total).to(ctx.dtypes[1]), None)


def next_token_loss(hidden_states: Tensor, labels: Tensor, head_weight: Tensor, head_bias: Tensor | None = None,
                    chunk: int = 1024, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(total, count): the cross-entropy of the supervised tokens, in nats, summed; their number.

    hidden_states (B,T,D), labels (B,T) with -100 ignored (not shifted: position t−1 predicts label
    t), head_weight (V,D), head_bias (V,). Peak memory is that of `chunk` rows of logits. Without a
    supervised token the total is 0 and still in the graph, so that every rank's head gets a
    gradient. places (2,m): sample and position t−1 of each supervised token, where the caller knows
    them; nonzero() has to wait for a GPU."""
    supervised = labels[:, 1:] != -100                                          # (B,T-1)
    sample, t = supervised.nonzero().T if places is None else places            # (m,) twice
    h = hidden_states[sample, t]                                                # (m,D)
    y = labels[sample, t + 1]                                                   # (m,)
    # The dtype that autocast would choose, cast once and not for every chunk.
    if torch.is_autocast_enabled(h.device.type):
        h = h.to(torch.get_autocast_dtype(h.device.type))
    weight = head_weight.to(h.dtype)
    total = _ChunkedCrossEntropy.apply(h, y, weight, head_bias, chunk)
    return total, supervised.sum()
