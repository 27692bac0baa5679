"""Cross-entropy of the answer tokens without ever holding (tokens x vocabulary) floats.

The frozen output head is applied to a chunk of hidden states at a time. The gradient of the loss
with respect to the hidden states is formed in the same pass, softmax minus one-hot times the head,
so the backward pass only scales it.
Source of the idea: Cut Your Losses in Large-Vocabulary Language Models, section 3,
https://arxiv.org/abs/2411.09009
Shapes: N answer tokens, E hidden size, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional

CHUNK_ELEMENTS = 2**26  # float32 logits held at once: 256 MiB, 514 tokens of ChatGLM's 130,528


class _ChunkedLoss(torch.autograd.Function):
    """Summed cross-entropy and its input gradient, chunk by chunk; the head gets none."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden_states: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk_tokens: int,
    ) -> Tensor:
        total = hidden_states.new_zeros((), dtype=torch.float32)
        wants_gradient = hidden_states.requires_grad
        gradient = torch.empty_like(hidden_states) if wants_gradient else None
        for start in range(0, len(targets), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = functional.linear(hidden_states[part], weight).float()  # (chunk, V)
            wanted = targets[part, None]
            normaliser = logits.logsumexp(dim=-1, keepdim=True)
            total += (normaliser - logits.gather(1, wanted)).sum()
            if gradient is not None:
                slope = logits.sub_(normaliser).exp_()  # softmax, in place
                slope.scatter_add_(1, wanted, slope.new_full((1, 1), -1.0).expand_as(wanted))
                gradient[part] = slope.to(weight.dtype) @ weight
        ctx.save_for_backward(*([] if gradient is None else [gradient]))
        return total

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradient * grad_outputs[0].to(gradient.dtype), None, None, None


def summed_loss(
    hidden_states: Tensor,
    head: torch.nn.Module,
    targets: Tensor,
    *,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return the summed cross-entropy, float32, of targets (N,) given hidden_states (N, E).

    A frozen plain linear head without bias takes the chunked path; any other head (trained,
    quantised) the ordinary one. chunk_tokens None keeps a chunk's logits in CHUNK_ELEMENTS.
    """
    weight = getattr(head, "weight", None)
    is_plain = type(head) is torch.nn.Linear and head.bias is None
    if not is_plain or weight is None or weight.requires_grad:
        return functional.cross_entropy(head(hidden_states).float(), targets, reduction="sum")
    chunk_tokens = chunk_tokens or max(1, CHUNK_ELEMENTS // weight.shape[0])
    total: Tensor = _ChunkedLoss.apply(hidden_states, weight, targets, chunk_tokens)
    return total
