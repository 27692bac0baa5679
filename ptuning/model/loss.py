"""The loss: labels to targets, and their cross-entropy without all logits in memory at once.

The logits of all tokens would take (tokens x vocabulary) floats. The frozen output head is applied
to a chunk of hidden states at a time; the gradient with respect to them, softmax minus one-hot
times the head, is formed in the same pass, so the backward pass only scales it.
Source of the idea: Cut Your Losses in Large-Vocabulary Language Models, section 3,
https://arxiv.org/abs/2411.09009
Shapes: B rows, S tokens of this call, N tokens with a label, E hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ptuning.model.cpu.linear import Linear
from ptuning.model.positions import FlatLayout, find_layout, mask_of_call

CHUNK_ELEMENTS = 2**26  # float32 logits held at once: 256 MiB, 514 tokens of ChatGLM's 130,528
CPU_CHUNK_ELEMENTS = 2**22  # 16 MiB, which stay in the processor's cache between the steps
CPU_CHUNK_TOKENS = 128  # but not fewer at a time, for the matrix product's sake
IGNORED_LABEL = -100  # torch's own ignore_index


def shift_left(
    input_ids: Tensor, labels: Tensor | None, shift_labels: Tensor | None
) -> Tensor | None:
    """Return the label (B, S) of each token's next token; None without labels.

    shift_labels are such labels already.
    """
    for name, given in (("labels", labels), ("shift_labels", shift_labels)):
        if given is not None and given.shape != input_ids.shape:
            raise ValueError(
                f"{name} is {tuple(given.shape)} for input_ids {tuple(input_ids.shape)}; give one "
                f"label for each token, {IGNORED_LABEL} where there is none."
            )
    if shift_labels is not None or labels is None:
        return shift_labels
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)  # (B, S)


def without_padding(next_labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return next_labels (B, S) with -100 at padding."""
    mask = mask_of_call(attention_mask, next_labels.shape[1])
    return next_labels if mask is None else next_labels.masked_fill(mask == 0, IGNORED_LABEL)


def labelled_layout(
    next_labels: Tensor, attention_mask: Tensor | None
) -> tuple[FlatLayout, Tensor]:
    """Return the layout of rows in which labelled tokens are needed, and their labels (N,)."""
    mask = mask_of_call(attention_mask, next_labels.shape[1])
    if mask is None:
        mask = torch.ones_like(next_labels)
    layout = find_layout(mask, next_labels != IGNORED_LABEL)
    return layout, next_labels.flatten()[layout.tokens][layout.needed]  # (N,)


def mean_loss(
    hidden_states: Tensor,
    head: torch.nn.Module,
    targets: Tensor,
    num_items: int | Tensor | None,
    *,
    may_ignore: bool,
    **options: Any,
) -> Tensor:
    """Return the mean of `summed_loss`, or the sum divided by num_items."""
    targets = targets.to(hidden_states.device)
    total = summed_loss(hidden_states, head, targets, may_ignore=may_ignore, **options)
    if num_items is None:
        return total / ((targets != IGNORED_LABEL).sum() if may_ignore else len(targets))
    if isinstance(num_items, Tensor):
        num_items = num_items.to(total.device)
    return total / num_items


def summed_loss(
    hidden_states: Tensor,
    head: torch.nn.Module,
    targets: Tensor,
    *,
    chunk_tokens: int | None = None,
    label_smoothing: float = 0.0,
    may_ignore: bool = False,
) -> Tensor:
    """Return the summed cross-entropy, float32, of targets (N,) given hidden_states (N, E).

    A frozen plain linear head without bias takes the chunked path; any other head (trained,
    quantised) the ordinary one. chunk_tokens None chooses by the device. label_smoothing is the
    share of each target that is spread evenly over the vocabulary. may_ignore: targets may be -100,
    which count nothing.
    """
    is_plain = type(head) is Linear and head.bias is None and not head.weight.requires_grad
    if not is_plain:
        return functional.cross_entropy(
            head(hidden_states).float(),
            targets,
            reduction="sum",
            label_smoothing=label_smoothing,
        )
    assert isinstance(head, Linear), "asked above"
    if chunk_tokens is None:
        on_cpu = head.weight.device.type == "cpu"
        chunk_tokens = chunk_tokens_on(head.weight.shape[0], on_cpu=on_cpu)
    total: Tensor = _ChunkedLoss.apply(
        hidden_states, head, targets, chunk_tokens, label_smoothing, may_ignore
    )
    return total


def token_losses(
    hidden_states: Tensor, head: torch.nn.Module, targets: Tensor, chunk_tokens: int | None = None
) -> Tensor:
    """Return each target's cross-entropy (N,), float32, given hidden_states (N, E).

    The logits are formed chunk by chunk, for any head; under autograd they would all be kept.
    """
    if chunk_tokens is None:
        assert isinstance(head.weight, Tensor), "one row for each of the vocabulary, also packed"
        on_cpu = hidden_states.device.type == "cpu"
        chunk_tokens = chunk_tokens_on(len(head.weight), on_cpu=on_cpu)
    chunks = zip(hidden_states.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    return torch.cat(
        [
            functional.cross_entropy(head(states).float(), wanted, reduction="none")
            for states, wanted in chunks
        ]
    )


def chunk_tokens_on(vocab_size: int, *, on_cpu: bool) -> int:
    """Return how many tokens' logits are formed at once."""
    if on_cpu:
        return max(CPU_CHUNK_TOKENS, CPU_CHUNK_ELEMENTS // vocab_size)
    return max(1, CHUNK_ELEMENTS // vocab_size)


class _ChunkedLoss(torch.autograd.Function):
    """Summed cross-entropy and its input gradient, chunk by chunk; the head gets none."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden_states: Tensor,
        head: Linear,
        targets: Tensor,
        chunk_tokens: int,
        label_smoothing: float,
        may_ignore: bool,
    ) -> Tensor:
        total = hidden_states.new_zeros((), dtype=torch.float32)
        wants_gradient = hidden_states.requires_grad
        gradient = torch.empty_like(hidden_states) if wants_gradient else None
        for start in range(0, len(targets), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = head.product(hidden_states[part])  # (chunk, V)
            logprobs = logits.log_softmax(dim=-1, dtype=torch.float32)
            del logits
            wanted = targets[part, None]  # (chunk, 1)
            counts = wanted != IGNORED_LABEL if may_ignore else 1
            if may_ignore:
                wanted = wanted.clamp(min=0)
            total -= (1 - label_smoothing) * (logprobs.gather(1, wanted) * counts).sum()
            if label_smoothing:
                total -= label_smoothing * (logprobs.mean(dim=-1, keepdim=True) * counts).sum()
            if gradient is not None:
                slope = logprobs.exp_()  # softmax, in place
                if label_smoothing:
                    slope -= label_smoothing / slope.shape[1]
                target_slope = slope.new_full((1, 1), label_smoothing - 1)
                slope.scatter_add_(1, wanted, target_slope.expand_as(wanted))
                if may_ignore:
                    slope *= counts
                gradient[part] = head.product_back(slope.to(head.weight.dtype))
                del slope
            del logprobs  # or the next chunk's logits would be formed beside it
        ctx.save_for_backward(*([] if gradient is None else [gradient]))
        return total

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradient * grad_outputs[0].to(gradient.dtype), None, None, None, None, None
