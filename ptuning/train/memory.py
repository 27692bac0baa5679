"""Peak memory of training and answering, in bytes, from sizes alone: no tensor is allocated.

The terms of a layer are the tensors that its backward pass needs, so they follow
`ptuning.model.chatglm`, `attention` and `cpu.varlen_attention`. tests/train/test_memory.py counts
them in a real pass, and compares a GPU's peaks with those of steps on fake tensors.
Letters: B rows, S tokens of the longest row, T tokens of all rows, P prefix, L layers, E hidden
size, I inner size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ptuning.engine.engine import MAX_PREFILL_TOKENS, MAX_PREFILL_TOKENS_CPU
from ptuning.model.checkpoint.layout import linear_shapes
from ptuning.model.config import ChatGLMConfig
from ptuning.model.cpu.varlen_attention import group_rows, round_up_keys
from ptuning.model.loss import chunk_tokens_on
from ptuning.model.quantization.torch_backend import MAX_DEVICE_BLOCK_BYTES, MAX_FUSED_ROWS

FLOAT32 = 4  # bytes; prefix, optimizer state and softmax are float32 whatever the base's dtype
SCALE_BYTES = 2  # of a quantised weight's row, float16
ADAM_BYTES = 2 * FLOAT32  # two moments for each trained parameter
LOGIT_COPIES = 2  # float32 tensors of a chunk that coexist: the logits and their log-softmax
# Temporaries of a layer in widths of E per token, next to 2 I around the inner activation: query,
# key, value and a sum in the forward pass, their gradients in the backward pass.
WORKING_WIDTHS = 4
HEAP_BLOCK = 32 * 2**20  # glibc keeps freed blocks up to this size in its heap
# Heap fragmentation as a share of the activations in such blocks: 8 to 20 % were measured.
FRAGMENTATION = 1 / 8


@dataclass(frozen=True)
class ModelSize:
    """A model's sizes, how it is stored, and what is tuned; bits are 0 for weights in dtype."""

    num_layers: int
    hidden_size: int
    inner_size: int
    vocab_size: int
    num_heads: int
    dtype: torch.dtype  # of the base
    on_cpu: bool
    weight_bits: int = 0
    embedding_bits: int = 0
    prepacked: bool = False  # frozen float weights have a second, prepacked copy
    block_bytes: int = MAX_DEVICE_BLOCK_BYTES  # of a weight dequantised at once on a GPU
    workspace_bytes: int = 0  # of cuBLAS
    prefix_length: int = 0
    projects_prefix: bool = False
    tuning: str = "ptuning"  # or "lora", "full"
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()
    layer_dropout: float = 0.0  # of the top layer

    @property
    def unit(self) -> int:
        """Bytes of one element in the base's dtype."""
        return self.dtype.itemsize

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """A layer's linear layers, (rows, columns) of each weight."""
        shapes = linear_shapes(self.hidden_size, self.inner_size)
        return {name.rpartition(".")[2]: shape for name, shape in shapes.items()}

    @property
    def layer_weights(self) -> int:
        """Parameters of all layers' linear layers, without biases."""
        return self.num_layers * sum(rows * columns for rows, columns in self.linears.values())

    @property
    def prefix_bytes(self) -> int:
        """The prefix's keys and values in the base's dtype, as the layers read them."""
        return self.prefix_length * 2 * self.num_layers * self.hidden_size * self.unit

    @property
    def trained(self) -> int:
        """Trained parameters."""
        hidden, width = self.hidden_size, 2 * self.num_layers * self.hidden_size
        if self.tuning == "full":
            small = sum(rows for rows, _ in self.linears.values()) + 4 * hidden
            embedding = self.vocab_size * hidden
            return self.layer_weights + self.num_layers * small + embedding + 2 * hidden
        if self.tuning == "lora":
            widths = (sum(self.linears[name]) for name in self.lora_targets)
            return self.num_layers * self.lora_rank * sum(widths)
        if not self.projects_prefix:
            return self.prefix_length * width
        return self.prefix_length * hidden + hidden * hidden + hidden + (hidden + 1) * width


def size_of(config: ChatGLMConfig, dtype: torch.dtype, *, on_cpu: bool, **others: Any) -> ModelSize:
    """Return the sizes in a config.json; others are fields of ModelSize that replace its values."""
    fields: dict[str, Any] = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "inner_size": config.inner_hidden_size,
        "vocab_size": config.vocab_size,
        "num_heads": config.num_attention_heads,
        "weight_bits": int(config.quantization_bit or 0),
        "embedding_bits": int(config.embedding_quantization_bit or 0),
        "prefix_length": int(config.pre_seq_len or 0),
        "projects_prefix": bool(config.prefix_projection),
    }
    return ModelSize(dtype=dtype, on_cpu=on_cpu, **(fields | others))


class Batch(NamedTuple):
    """The tokens of one forward pass, padding not counted."""

    lengths: tuple[int, ...]  # of each row
    answer_tokens: int

    @property
    def tokens(self) -> int:
        """T: tokens of all rows."""
        return sum(self.lengths)


def largest_batch(lengths: np.ndarray, context_lengths: np.ndarray, num_rows: int) -> Batch:
    """Return the batch of the longest rows.

    With every layer checkpointed, a batch of more answer tokens may need slightly more.

    >>> largest_batch(np.array([5, 9, 7]), np.array([2, 3, 3]), 2)
    Batch(lengths=(9, 7), answer_tokens=10)
    """
    longest = np.argsort(-lengths, kind="stable")[:num_rows]
    answers = lengths[longest] - context_lengths[longest]
    return Batch(tuple(int(n) for n in lengths[longest]), int(answers.sum()))


class Memory(NamedTuple):
    """Peak memory in bytes: the loaded model, and the other terms by their printed names."""

    weights: int
    trained: int  # parameters outside the base, and the prefix in the base's dtype while it stays
    terms: dict[str, int]

    @property
    def on_top(self) -> int:
        """What comes on top of the loaded model."""
        return sum(self.terms.values())

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights + self.trained + self.on_top


# ---- The loaded model ----


def weight_bytes(size: ModelSize) -> int:
    """Return the base's weights; the output head shares the embedding's."""
    per_layer = 4 * size.hidden_size * size.unit  # two norms
    for rows, columns in size.linears.values():
        per_layer += _stored_bytes(rows, columns, size.weight_bits, size.unit)
        per_layer += rows * size.unit  # bias
    embedding = _stored_bytes(size.vocab_size, size.hidden_size, size.embedding_bits, size.unit)
    norm = 2 * size.hidden_size * size.unit
    copies = prepacked_bytes(size) if size.prepacked else 0
    return size.num_layers * per_layer + embedding + norm + copies


def _stored_bytes(rows: int, columns: int, bits: int, unit: int) -> int:
    if not bits:
        return rows * columns * unit
    return rows * columns * bits // 8 + rows * SCALE_BYTES


def prepacked_bytes(size: ModelSize) -> int:
    """Return what copies of the frozen float weights take (`ptuning.model.cpu.linear`)."""
    if size.tuning == "full" or size.weight_bits:
        return 0
    head = 0 if size.embedding_bits else size.vocab_size * size.hidden_size
    return (size.layer_weights + head) * size.unit


def trained_bytes(size: ModelSize, *, with_prefix: bool) -> int:
    """Return the trained parameters outside the base, and the prefix in the base's dtype.

    Training on a GPU does not always hold the latter: `_peak_bytes` counts it when it does.
    """
    parameters = 0 if size.tuning == "full" else size.trained * FLOAT32
    return parameters + (size.prefix_bytes if with_prefix else 0)


# ---- A training step ----


def layer_bytes(size: ModelSize, batch: Batch) -> int:
    """Return the activations that one layer saves for its backward pass."""
    tokens, rows, hidden = batch.tokens, len(batch.lengths), size.hidden_size
    inputs = 2 * tokens * hidden  # of the two norms
    inner = tokens * size.inner_size  # the activation's input, or its slope
    masks = 2 * rows * size.prefix_length * hidden  # of the prefix's dropout, one byte each
    if size.tuning == "full":  # every linear map saves its input for its weight's gradient
        inner += tokens * size.inner_size
        inputs += 3 * tokens * hidden
    elif size.tuning == "lora":  # each adapter saves its input after dropout, and the mask
        widths = sum(size.linears[name][1] for name in size.lora_targets)
        inputs += tokens * widths
        masks += tokens * widths
    if size.layer_dropout:  # of both sublayers' outputs
        masks += 2 * tokens * hidden
    if size.on_cpu:
        return size.unit * (inputs + inner + _varlen_attention_elements(size, batch)) + masks
    # Fused attention on the padded grid: queries, output, keys and values behind the prefix, and
    # the softmax's normalisers.
    longest = max(batch.lengths)
    attention = 2 * rows * longest * hidden + 2 * rows * (size.prefix_length + longest) * hidden
    normalisers = rows * size.num_heads * longest * FLOAT32
    return size.unit * (inputs + inner + attention) + masks + normalisers


def _varlen_attention_elements(size: ModelSize, batch: Batch) -> int:
    """Count what attention saves on a CPU: queries, keys and values with the prefix, weights."""
    saved = 0
    for members in group_rows(batch.lengths, num_heads=size.num_heads):
        longest = batch.lengths[members[0]]
        num_keys = round_up_keys(size.prefix_length + longest)
        saved += len(members) * (longest + 2 * num_keys) * size.hidden_size
        saved += len(members) * size.num_heads * longest * num_keys
    return saved


def activation_bytes(size: ModelSize, batch: Batch, *, checkpointed_layers: int = 0) -> int:
    """Return what all layers save; the first `checkpointed_layers` save their input alone."""
    num_saving = size.num_layers - checkpointed_layers
    layer_input = batch.tokens * size.hidden_size * size.unit
    saved = num_saving * layer_bytes(size, batch) + checkpointed_layers * layer_input
    if not checkpointed_layers and size.tuning != "full":
        saved -= layer_input  # of the first norm: with a frozen embedding it needs no gradient
    if num_saving:  # the last layer computes only the answer tokens after its attention
        unread = batch.tokens - batch.answer_tokens
        saved -= unread * (size.hidden_size + size.inner_size) * size.unit
        saved -= unread * 2 * size.hidden_size if size.layer_dropout else 0
    return saved


def chunks_loss(size: ModelSize) -> bool:
    """Return whether the loss is computed in chunks: the head is neither trained nor quantised."""
    return size.tuning != "full" and not size.embedding_bits


def logits_bytes(size: ModelSize, batch: Batch, *, chunk_tokens: int | None = None) -> int:
    """Return the float32 logits of one chunk and what its loss needs in addition.

    chunk_tokens None is the device's default.
    """
    num_tokens = batch.answer_tokens
    if chunks_loss(size):
        default = chunk_tokens_on(size.vocab_size, on_cpu=size.on_cpu)
        num_tokens = min(num_tokens, chunk_tokens or default)
    half = size.unit if size.unit < FLOAT32 else 0
    return num_tokens * size.vocab_size * (LOGIT_COPIES * FLOAT32 + half)


def training_memory(
    size: ModelSize,
    batch: Batch,
    *,
    checkpointed_layers: int = 0,
    accumulates: bool = False,
    chunk_tokens: int | None = None,
) -> Memory:
    """Return the peak of a training step on one batch.

    accumulates: gradients of earlier micro-batches are held (--gradient_accumulation_steps).
    chunk_tokens: tokens per chunk of the loss, None for the device's default.
    """
    pending = size.trained * FLOAT32 if accumulates or size.tuning == "full" else 0
    logits = logits_bytes(size, batch, chunk_tokens=chunk_tokens)
    saved, peak = _peak_bytes(size, batch, checkpointed_layers, logits, pending)
    activations = min(saved, peak)
    shown_logits = min(logits, peak - activations)
    terms = {
        "optimizer": size.trained * ADAM_BYTES + pending,
        "activations": activations,
        "logits chunk": shown_logits,
        "working space": max(0, peak - activations - shown_logits - pending),
        "cuBLAS": 0 if size.on_cpu else size.workspace_bytes,
    }
    return Memory(weight_bytes(size), trained_bytes(size, with_prefix=size.on_cpu), terms)


def _peak_bytes(
    size: ModelSize, batch: Batch, checkpointed_layers: int, logits: int, pending: int
) -> tuple[int, int]:
    """Return the saved activations, and the peak on top of weights, prefix and optimizer state.

    The peak is the largest of several moments: the loss, when all activations are there; the
    recomputation of a checkpointed layer, when those of the other layers are gone; the joining of
    the layers' prefix gradients; the optimizer's step.
    """
    gradients, prefix = size.trained * FLOAT32, size.prefix_bytes
    layer, working = layer_bytes(size, batch), _working_bytes(size, batch.tokens)
    saved = activation_bytes(size, batch, checkpointed_layers=checkpointed_layers)
    inputs = checkpointed_layers * batch.tokens * size.hidden_size * size.unit
    recomputing = inputs + layer + working if checkpointed_layers else 0
    # The prefix gradients of all layers are concatenated, then converted to float32.
    joining = 0 if size.tuning == "full" else max(3 * prefix, prefix + gradients)
    if size.on_cpu:
        is_in_heap = batch.tokens * size.inner_size * size.unit <= HEAP_BLOCK
        if is_in_heap and checkpointed_layers:
            # One pass leaves its freed blocks where the next cannot use them: about one layer's.
            saved += layer
            recomputing += layer
        elif is_in_heap:
            saved += int(FRAGMENTATION * saved)
        moments = (saved + max(logits, working) + pending, recomputing + pending)
        return saved, max(*moments, joining, 2 * gradients)  # the step has one temporary
    block = _block_bytes(size, batch.tokens)
    held = 0
    if checkpointed_layers:
        # The layers read the prefix again as they are recomputed, and the others' share of its
        # gradient already exists.
        held = prefix
        gathered = prefix * (size.num_layers - checkpointed_layers) // size.num_layers
        recomputing += block + held + gathered
    # Of the answer tokens: the last norm's input and output, the loss's gradient.
    answers = 3 * batch.answer_tokens * size.hidden_size * size.unit
    peak = max(
        saved + prefix + working + block,  # forward
        saved + held + answers + logits,
        saved + held + answers + working + block,  # backward
        recomputing,
        joining,
    )
    return saved, max(peak + pending, gradients)


def _working_bytes(size: ModelSize, tokens: int) -> int:
    """Return a layer's temporaries: in a forward pass without a graph, or in a backward pass."""
    return tokens * (WORKING_WIDTHS * size.hidden_size + 2 * size.inner_size) * size.unit


def _block_bytes(size: ModelSize, tokens: int) -> int:
    """Return the block of a quantised weight that is dequantised at once on a GPU.

    The products of few tokens need none: they dequantise on the fly.
    """
    if size.on_cpu or not size.weight_bits or tokens <= MAX_FUSED_ROWS:
        return 0
    largest = max(rows * columns for rows, columns in size.linears.values())
    return min(size.block_bytes, largest * size.unit)


# ---- Validating and answering ----


def validation_bytes(size: ModelSize, batch: Batch) -> int:
    """Return what a forward pass with a loss and without a graph takes on top of the model."""
    needed = _working_bytes(size, batch.tokens) + logits_bytes(size, batch)
    if size.on_cpu:
        return needed
    return needed + size.prefix_bytes + _block_bytes(size, batch.tokens) + size.workspace_bytes


def cache_bytes(size: ModelSize, num_rows: int, columns: int) -> int:
    """Return the KV cache of rows with `columns` tokens each."""
    return num_rows * columns * 2 * size.num_layers * size.hidden_size * size.unit


def answering_memory(
    size: ModelSize, prompt_lengths: Sequence[int], *, num_rows: int, new_tokens: int
) -> Memory:
    """Return the peak of answering prompts, at most num_rows at a time.

    new_tokens is the length of the longest answer.
    """
    num_rows, longest = min(num_rows, len(prompt_lengths)), max(prompt_lengths)
    cells = MAX_PREFILL_TOKENS_CPU if size.on_cpu else MAX_PREFILL_TOKENS
    prefill_tokens = max(longest, min(cells, num_rows * longest))
    prefill_rows = -(-prefill_tokens // longest)
    # The prompts' keys and values are copied into their slots after the last layer.
    prefill = _working_bytes(size, prefill_tokens) + cache_bytes(size, 1, prefill_tokens)
    prefill += 2 * prefill_rows * (size.prefix_length + longest) * size.hidden_size * size.unit
    prefill += _block_bytes(size, prefill_tokens)
    logits = num_rows * size.vocab_size * size.unit
    terms = {
        "KV cache": cache_bytes(size, num_rows, longest + new_tokens),
        "working space": max(prefill, logits) + (0 if size.on_cpu else size.workspace_bytes),
    }
    return Memory(weight_bytes(size), trained_bytes(size, with_prefix=True), terms)
