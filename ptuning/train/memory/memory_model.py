"""What a run holds in memory, term by term, from sizes alone: no tensor is made.

The terms of a layer are the tensors that its backward pass needs, so they follow
`ptuning.model.layer`, `attention` and `packed_attention`; tests/train/test_memory_model.py counts
them in a real pass, and compares CUDA's peaks with those of steps on fake tensors. All figures are
bytes.
Letters: B rows, S tokens of the longest row, T tokens of all rows, N answer tokens, P prefix, L
layers, H heads, E hidden size, I inner size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ptuning.model.answer_loss import chunk_tokens_on
from ptuning.model.config import ChatGLMConfig
from ptuning.model.packed_attention import group_rows, round_up_keys
from ptuning.model.quantization.backends.blockwise import MOST_DEVICE_BLOCK_BYTES
from ptuning.model.quantization.backends.triton_backend import MAX_FUSED_ROWS

FLOAT32 = 4  # bytes; prefix, optimiser and softmax are float32 whatever the base is
SCALE_BYTES = 2  # of a quantised weight's row, float16
ADAM_BYTES = 2 * FLOAT32  # two running means for each trained parameter
# Float logits beside each other while the loss of a chunk is formed: themselves and their
# log-softmax.
LOGIT_COPIES = 2
# Widths of E, per token, that a layer's backward pass holds beside what the forward pass kept: the
# gradients on both sides of the inner activation (2 I) and those around it.
BACKWARD_WIDTHS = 4
FORWARD_WIDTHS = 4  # the same in a forward pass that keeps nothing: query, key, value and a sum
HEAP_BLOCK = 32 * 2**20  # glibc keeps freed blocks up to this size for itself
# Of activations in such blocks, what the pieces between them take: 8 to 20 % were measured.
PIECES_SHARE = 1 / 8
PREFILL_TOKENS_CPU, PREFILL_TOKENS = 1024, 16384  # `ptuning.model.engine` reads so many at once


@dataclass(frozen=True)
class ModelSize:
    """A model's sizes and how it is stored; bits are 0 where weights are in the base's dtype."""

    num_layers: int
    hidden_size: int
    inner_size: int
    num_heads: int
    vocab_size: int
    dtype_bytes: int
    weight_bits: int = 0
    embedding_bits: int = 0
    packs: bool = False  # frozen float maps are held a second time, laid out for the processor
    # What products need on a GPU: the largest block of a weight dequantised at once, and cuBLAS's
    # workspace (`ptuning.train.memory.recomputing.gpu_terms`).
    block_bytes: int = MOST_DEVICE_BLOCK_BYTES
    workspace_bytes: int = 0
    prefix_length: int = 0
    projects_prefix: bool = False
    tuning: str = "ptuning"  # or "lora", "full"
    lora_rank: int = 8
    lora_targets: tuple[str, ...] = ("query_key_value",)

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """A layer's linear maps, (rows, columns) of each weight."""
        hidden, inner = self.hidden_size, self.inner_size
        return {
            "query_key_value": (3 * hidden, hidden),
            "dense": (hidden, hidden),
            "dense_h_to_4h": (inner, hidden),
            "dense_4h_to_h": (hidden, inner),
        }

    @property
    def layer_weights(self) -> int:
        """Parameters of all layers' linear maps, biases left out."""
        return self.num_layers * sum(rows * columns for rows, columns in self.linears.values())

    @property
    def prefix_entries(self) -> int:
        """Keys and values of the prefix in all layers."""
        return self.prefix_length * 2 * self.num_layers * self.hidden_size

    @property
    def prefix_in_use(self) -> int:
        """Bytes of the prefix in the base's dtype, as the layers read it."""
        return self.prefix_entries * self.dtype_bytes

    @property
    def trained(self) -> int:
        """Trained parameters."""
        if self.tuning == "full":
            small = sum(rows for rows, _ in self.linears.values()) + 4 * self.hidden_size
            embedding = self.vocab_size * self.hidden_size
            return self.layer_weights + self.num_layers * small + embedding + 2 * self.hidden_size
        if self.tuning == "lora":
            widths = (sum(self.linears[name]) for name in self.lora_targets)
            return self.num_layers * self.lora_rank * sum(widths)
        if not self.projects_prefix:
            return self.prefix_entries
        hidden, width = self.hidden_size, 2 * self.num_layers * self.hidden_size
        return self.prefix_length * hidden + hidden * hidden + hidden + (hidden + 1) * width


def size_of(config: ChatGLMConfig, *, dtype_bytes: int, **how: object) -> ModelSize:
    """Return the sizes in a config.json; how holds ModelSize's other fields."""
    return ModelSize(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        inner_size=config.inner_hidden_size,
        num_heads=config.num_attention_heads,
        vocab_size=config.vocab_size,
        dtype_bytes=dtype_bytes,
        **how,  # type: ignore[arg-type]
    )


class Batch(NamedTuple):
    """The tokens of one forward pass."""

    lengths: tuple[int, ...]  # of each row
    answer_tokens: int

    @property
    def tokens(self) -> int:
        """T: tokens of all rows, padding not counted."""
        return sum(self.lengths)


@dataclass(frozen=True)
class TrainingMemory:
    """What a training step holds at its peak, in bytes."""

    weights: int
    trained: int  # parameters outside the base; on a CPU the prefix in the base's dtype too
    optimizer: int  # its state, and the gradients
    activations: int
    logits: int  # of one chunk, with its gradient
    working: int  # what else one operation needs for a moment
    workspace: int  # cuBLAS's

    @property
    def total(self) -> int:
        """The peak."""
        return sum(self.parts().values())

    @property
    def of_step(self) -> int:
        """What comes on top of the loaded model."""
        return self.total - self.weights - self.trained

    def parts(self) -> dict[str, int]:
        """Return the terms by the names they are printed with."""
        return {
            "weights": self.weights,
            "trained": self.trained,
            "optimiser": self.optimizer,
            "activations": self.activations,
            "logits chunk": self.logits,
            "working space": self.working,
            "cuBLAS": self.workspace,
        }


def weight_bytes(size: ModelSize) -> int:
    """Return the base's weights; the output head repeats the embedding and is held once."""
    per_layer = 4 * size.hidden_size * size.dtype_bytes  # two norms
    for rows, columns in size.linears.values():
        per_layer += _stored(rows, columns, size.weight_bits, size.dtype_bytes)
        per_layer += rows * size.dtype_bytes  # bias
    embedding = _stored(size.vocab_size, size.hidden_size, size.embedding_bits, size.dtype_bytes)
    norm = 2 * size.hidden_size * size.dtype_bytes
    return size.num_layers * per_layer + embedding + norm + (packed_bytes(size) * size.packs)


def packed_bytes(size: ModelSize) -> int:
    """Return what packed copies of the frozen float maps take (`ptuning.model.packed_copies`)."""
    if size.tuning == "full" or size.weight_bits:
        return 0
    head = 0 if size.embedding_bits else size.vocab_size * size.hidden_size
    return (size.layer_weights + head) * size.dtype_bytes


def trained_bytes(size: ModelSize, *, with_prefix_in_use: bool) -> int:
    """Return the trained parameters outside the base, and the prefix in the base's dtype.

    Training on a GPU counts the latter where a step holds it (`_peak_on_gpu`).
    """
    in_use = size.prefix_in_use if with_prefix_in_use else 0
    return (0 if size.tuning == "full" else size.trained * FLOAT32) + in_use


def _stored(rows: int, columns: int, bits: int, dtype_bytes: int) -> int:
    if not bits:
        return rows * columns * dtype_bytes
    return rows * columns * bits // 8 + rows * SCALE_BYTES


def layer_bytes(size: ModelSize, batch: Batch, *, on_cpu: bool, is_first: bool = False) -> int:
    """Return what one layer keeps for its backward pass.

    is_first: the input of a frozen model's first layer needs no gradient, so its norm keeps none.
    """
    tokens, rows, unit = batch.tokens, len(batch.lengths), size.dtype_bytes
    hidden, prefix = size.hidden_size, size.prefix_length
    inputs = (1 if is_first and size.tuning != "full" else 2) * tokens * hidden  # of the two norms
    inner = tokens * size.inner_size  # the activation's input, or its slope
    extra = 0
    if size.tuning == "full":  # every linear keeps its input for its weight's gradient
        inner += tokens * size.inner_size
        inputs += 3 * tokens * hidden
    elif size.tuning == "lora":  # each adapter keeps its input after dropout, and the mask
        widths = sum(size.linears[name][1] for name in size.lora_targets)
        inputs += tokens * widths
        extra += tokens * widths
    mask = 2 * rows * prefix * hidden  # of the prefix's dropout, one byte each
    if on_cpu:
        attention = _attention_by_rows(size, batch)
    else:  # fused, on the padded grid: queries, output, keys and values behind the prefix
        longest = max(batch.lengths)
        attention = 2 * rows * longest * hidden + 2 * rows * (prefix + longest) * hidden
        extra += rows * size.num_heads * longest * FLOAT32  # the softmax's normalisers
    return unit * (inputs + inner + attention) + mask + extra


def _attention_by_rows(size: ModelSize, batch: Batch) -> int:
    """Count what `packed_attention` keeps: queries, keys and values behind the prefix, weights."""
    kept = 0
    for members in group_rows(batch.lengths, num_heads=size.num_heads):
        num_rows, longest = len(members), batch.lengths[members[0]]
        num_keys = round_up_keys(size.prefix_length + longest)
        kept += num_rows * (longest + 2 * num_keys) * size.hidden_size
        kept += num_rows * size.num_heads * longest * num_keys
    return kept


def activation_bytes(
    size: ModelSize, batch: Batch, *, on_cpu: bool, recomputed_layers: int = 0
) -> int:
    """Return what all layers keep; the first `recomputed_layers` keep their input alone."""
    num_kept = size.num_layers - recomputed_layers
    kept = num_kept * layer_bytes(size, batch, on_cpu=on_cpu)
    if num_kept == size.num_layers:
        kept += layer_bytes(size, batch, on_cpu=on_cpu, is_first=True)
        kept -= layer_bytes(size, batch, on_cpu=on_cpu)
    if num_kept:
        kept -= _left_out_of_last_layer(size, batch)
    return kept + recomputed_layers * batch.tokens * size.hidden_size * size.dtype_bytes


def _left_out_of_last_layer(size: ModelSize, batch: Batch) -> int:
    """Return what the last layer spares: after attention it goes on with answer tokens only."""
    unread = batch.tokens - batch.answer_tokens
    return unread * (size.hidden_size + size.inner_size) * size.dtype_bytes


def forms_chunks(size: ModelSize) -> bool:
    """Tell whether the loss is formed in chunks: the head is neither trained nor quantised."""
    return size.tuning != "full" and not size.embedding_bits


def logits_bytes(
    size: ModelSize, batch: Batch, *, on_cpu: bool, chunk_tokens: int | None = None
) -> int:
    """Return the float logits of one chunk and what its loss forms beside them.

    chunk_tokens None is the device's own choice.
    """
    num_tokens = batch.answer_tokens
    if forms_chunks(size):
        chosen = chunk_tokens or chunk_tokens_on(size.vocab_size, on_cpu=on_cpu)
        num_tokens = min(num_tokens, chosen)
    half = size.dtype_bytes if size.dtype_bytes < FLOAT32 else 0
    return num_tokens * size.vocab_size * (LOGIT_COPIES * FLOAT32 + half)


def training_memory(
    size: ModelSize,
    batch: Batch,
    *,
    on_cpu: bool,
    recomputed_layers: int = 0,
    accumulates: bool = False,
    chunk_tokens: int | None = None,
) -> TrainingMemory:
    """Return what a training step of one batch holds at its largest.

    accumulates: gradients of earlier batches are still there (--gradient_accumulation_steps).
    chunk_tokens: tokens of the loss formed at once, None for the device's own choice.
    """
    gradients, state = size.trained * FLOAT32, size.trained * ADAM_BYTES
    pending = gradients if accumulates or size.tuning == "full" else 0
    logits = logits_bytes(size, batch, on_cpu=on_cpu, chunk_tokens=chunk_tokens)
    peak_on_device = _peak_on_cpu if on_cpu else _peak_on_gpu
    kept, peak = peak_on_device(size, batch, recomputed_layers, logits, pending)
    activations = min(kept, peak)
    shown_logits = min(logits, peak - activations)
    return TrainingMemory(
        weight_bytes(size),
        trained_bytes(size, with_prefix_in_use=on_cpu),
        state + pending,
        activations,
        shown_logits,
        max(0, peak - activations - shown_logits - pending),
        0 if on_cpu else size.workspace_bytes,
    )


def _peak_on_cpu(
    size: ModelSize, batch: Batch, recomputed_layers: int, logits: int, pending: int
) -> tuple[int, int]:
    """Return the activations kept, and the peak beside weights, prefix and optimiser state.

    The largest of three moments: the loss, when all activations stand; the recomputing of a layer,
    when kept layers are gone; and the optimiser's step, when all are.
    """
    unit = size.dtype_bytes
    gradients = size.trained * FLOAT32
    backward = _backward_bytes(size, batch)
    kept = activation_bytes(size, batch, on_cpu=True, recomputed_layers=recomputed_layers)
    recomputing = 0
    is_in_heap = batch.tokens * size.inner_size * unit <= HEAP_BLOCK
    if is_in_heap and not recomputed_layers:
        kept += int(PIECES_SHARE * kept)
    if recomputed_layers:
        recomputing = recomputed_layers * batch.tokens * size.hidden_size * unit
        recomputing += layer_bytes(size, batch, on_cpu=True) + backward
        if is_in_heap:
            # Freed blocks of one pass lie where the next cannot use them: about a layer's worth.
            kept += layer_bytes(size, batch, on_cpu=True)
            recomputing += layer_bytes(size, batch, on_cpu=True)
    stepping = 2 * gradients  # one temporary beside them
    moments = (kept + max(logits, backward) + pending, recomputing + pending, stepping)
    return kept, max(*moments, _joining_bytes(size))


def _peak_on_gpu(
    size: ModelSize, batch: Batch, recomputed_layers: int, logits: int, pending: int
) -> tuple[int, int]:
    """Return the same on a GPU, where the prefix in the base's dtype counts only while it is held.

    It is held until the forward pass ends or, with checkpointed layers, until they are recomputed.
    """
    in_use, backward = size.prefix_in_use, _backward_bytes(size, batch)
    held = in_use if recomputed_layers else 0
    block = _block_bytes(size, batch.tokens)
    kept = activation_bytes(size, batch, on_cpu=False, recomputed_layers=recomputed_layers)
    # Of the answer tokens: the last norm's input and output, the loss's gradient.
    answers = 3 * batch.answer_tokens * size.hidden_size * size.dtype_bytes
    reading = kept + in_use + _forward_bytes(size, batch.tokens) + block
    losing = kept + held + answers + logits
    going_back = kept + held + answers + backward + block
    recomputing = 0
    if recomputed_layers:
        inputs = recomputed_layers * batch.tokens * size.hidden_size * size.dtype_bytes
        layer = layer_bytes(size, batch, on_cpu=False)
        # The prefix's gradient is there already for the layers that were kept.
        gathered = in_use * (size.num_layers - recomputed_layers) // size.num_layers
        recomputing = inputs + layer + backward + block + held + gathered
    moments = (reading, losing, going_back, recomputing, _joining_bytes(size))
    return kept, max(max(moments) + pending, size.trained * FLOAT32)


def _joining_bytes(size: ModelSize) -> int:
    """Return what joining the prefix gradients of all layers takes, and making them float32."""
    if size.tuning == "full":
        return 0
    return max(3 * size.prefix_in_use, size.prefix_in_use + size.trained * FLOAT32)


def _backward_bytes(size: ModelSize, batch: Batch) -> int:
    widths = BACKWARD_WIDTHS * size.hidden_size + 2 * size.inner_size
    return batch.tokens * widths * size.dtype_bytes


def _forward_bytes(size: ModelSize, tokens: int) -> int:
    widths = FORWARD_WIDTHS * size.hidden_size + 2 * size.inner_size
    return tokens * widths * size.dtype_bytes


def _block_bytes(size: ModelSize, tokens: int) -> int:
    """Return the float block that a quantised weight is multiplied from on a GPU.

    There is none for few tokens, whose products dequantise as they go.
    """
    if not size.weight_bits or tokens <= MAX_FUSED_ROWS:
        return 0
    largest = max(rows * columns for rows, columns in size.linears.values())
    return min(size.block_bytes, largest * size.dtype_bytes)


def validating_bytes(size: ModelSize, batch: Batch, *, on_cpu: bool) -> int:
    """Return what a forward pass with a loss that keeps nothing takes beside the model."""
    needed = _forward_bytes(size, batch.tokens) + logits_bytes(size, batch, on_cpu=on_cpu)
    if on_cpu:
        return needed
    return needed + size.prefix_in_use + _block_bytes(size, batch.tokens) + size.workspace_bytes


def cache_bytes(size: ModelSize, num_rows: int, columns: int) -> int:
    """Return the keys and values of rows being answered, `columns` tokens each."""
    return num_rows * columns * 2 * size.num_layers * size.hidden_size * size.dtype_bytes


@dataclass(frozen=True)
class AnsweringMemory:
    """What answering holds at its peak, in bytes."""

    weights: int
    trained: int  # the prefix, float32 and in the base's dtype
    cache: int
    working: int  # reading prompts, or the logits of a step; cuBLAS's workspace

    @property
    def total(self) -> int:
        """The peak."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Return the terms by the names they are printed with."""
        return {
            "weights": self.weights,
            "trained": self.trained,
            "cache": self.cache,
            "working space": self.working,
        }


def answering_memory(
    size: ModelSize, prompt_lengths: Sequence[int], *, num_rows: int, new_tokens: int, on_cpu: bool
) -> AnsweringMemory:
    """Return what answering prompts holds, at most num_rows of them at a time.

    new_tokens is the longest answer.
    """
    unit, hidden = size.dtype_bytes, size.hidden_size
    num_rows = min(num_rows, len(prompt_lengths))
    longest = max(prompt_lengths)
    cells = PREFILL_TOKENS_CPU if on_cpu else PREFILL_TOKENS
    read_at_once = max(longest, min(cells, num_rows * longest))
    rows_at_once = -(-read_at_once // longest)
    reading = _forward_bytes(size, read_at_once)
    # Keys and values of the prompts are copied into their slots once all layers have been read.
    reading += cache_bytes(size, 1, read_at_once)
    reading += 2 * rows_at_once * (size.prefix_length + longest) * hidden * unit
    choosing = num_rows * size.vocab_size * unit
    workspace = 0
    if not on_cpu:
        reading += _block_bytes(size, read_at_once)
        workspace = size.workspace_bytes
    return AnsweringMemory(
        weight_bytes(size),
        trained_bytes(size, with_prefix_in_use=True),
        cache_bytes(size, num_rows, longest + new_tokens),
        max(reading, choosing) + workspace,
    )
