"""What a run's flags, its rows and the free memory say of recomputed layers, the loss's chunk and
packed copies.
"""

from dataclasses import replace
from functools import partial

import torch

from ptuning.data.dataset import TokenDataset
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.linear import Linear, pack_weights_
from ptuning.train.flags import ModelArguments, TrainingArguments
from ptuning.train.memory.memory_model import ModelSize, packed_bytes, size_of
from ptuning.train.memory.packed_size import size_as_packed
from ptuning.train.memory.plan import largest_batch
from ptuning.train.memory.recomputing import (
    Choice,
    choose_recomputed,
    free_bytes,
    gpu_terms,
    recompute_layers,
)
from ptuning.train.processes.processes import gather


def recompute_as_asked(
    model: ChatGLMForConditionalGeneration,
    flags: ModelArguments,
    training: TrainingArguments,
    rows: TokenDataset,
) -> Choice:
    """Set up a model that is loaded and on its device; return what was chosen, to be printed."""
    size = size_of_model(model, flags, training)
    free = free_bytes(training.device, training.world_size, training.memory_target)
    choice = choose_for_run(training, size, rows, free)
    recompute_layers(model, choice.num_recomputed, training.recomputing_options)
    model.loss_chunk_tokens = choice.chunk_tokens
    return choice


def choose_for_run(
    training: TrainingArguments, size: ModelSize, rows: TokenDataset, free: int
) -> Choice:
    """Return which layers a run recomputes; free is in bytes, beside the loaded model."""
    lengths, contexts = rows.lengths, rows.arrays.context_lengths
    return choose_recomputed(
        training.recomputing,
        size,
        largest_batch(lengths, contexts, training.per_device_train_batch_size),
        free=free,
        on_cpu=training.on_cpu,
        accumulates=training.gradient_accumulation_steps > 1,
        num_layers=training.checkpoint_layers,
    )


def size_as_run(
    size: ModelSize,
    dtype: torch.dtype,
    training: TrainingArguments,
    rows: TokenDataset | None,
    *,
    free: int,
) -> ModelSize:
    """Return the size of a run's model, with packed copies or without; free as above.

    rows are those to train on, None when nothing is trained. A compiler has its own products.
    """
    if not training.on_cpu or training.compiling.backend:
        return size
    choose = None if rows is None else partial(choose_for_run, training, size, rows)
    return size_as_packed(size, dtype, free=free, choose=choose)


def pack_for_run(
    model: ChatGLMForConditionalGeneration,
    flags: ModelArguments,
    training: TrainingArguments,
    rows: TokenDataset | None,
) -> ModelSize:
    """Pack a model that is loaded, if its run gains by it; return its size.

    Processes do the same, so that their products round alike.
    """
    size = size_of_model(model, flags, training)
    free = free_bytes(training.device, training.world_size)
    packed = size_as_run(size, model.dtype, training, rows, free=free)
    if not all(gather(packed.packs)):
        return size
    pack_weights_(model, room_bytes=packed_bytes(size))
    return replace(size, packs=True)


def size_of_model(
    model: ChatGLMForConditionalGeneration, flags: ModelArguments, training: TrainingArguments
) -> ModelSize:
    """Return the sizes of a model that is loaded and has what is tuned attached, and its GPU's."""
    config = model.config
    return size_of(
        config,
        dtype_bytes=model.dtype.itemsize,
        weight_bits=int(config.quantization_bit or 0),
        embedding_bits=int(config.embedding_quantization_bit or 0),
        packs=any(isinstance(m, Linear) and m.packed_weight() for m in model.modules()),
        prefix_length=int(config.pre_seq_len or 0),
        projects_prefix=bool(config.prefix_projection),
        tuning=training.tuning or "ptuning",
        lora_rank=flags.lora_rank or 8,
        lora_targets=tuple((flags.lora_target_modules or "query_key_value").split(",")),
        **gpu_terms(training.device, training.memory_target),
    )
