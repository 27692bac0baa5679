"""The layers that a run recomputes, chosen from its flags, its rows and the memory that is free."""

from ptuning.data.dataset import TokenDataset
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.linear import Linear
from ptuning.train.flags import ModelArguments, TrainingArguments
from ptuning.train.memory.memory_model import ModelSize, size_of
from ptuning.train.memory.plan import largest_batch
from ptuning.train.memory.recomputing import Choice, choose_recomputed, free_bytes, recompute_layers


def recompute_as_asked(
    model: ChatGLMForConditionalGeneration,
    flags: ModelArguments,
    training: TrainingArguments,
    rows: TokenDataset,
) -> Choice:
    """Set up a model that is loaded and on its device; return what was chosen, to be printed."""
    size = size_of_model(model, flags, training)
    lengths, contexts = rows.lengths, rows.arrays.context_lengths
    choice = choose_recomputed(
        training.recomputing,
        size,
        largest_batch(lengths, contexts, training.per_device_train_batch_size),
        free=free_bytes(training.device),
        on_cpu=training.device.type == "cpu",
        accumulates=training.gradient_accumulation_steps > 1,
        num_layers=training.checkpoint_layers,
    )
    recompute_layers(model, choice.num_recomputed, training.recomputing_options)
    return choice


def size_of_model(
    model: ChatGLMForConditionalGeneration, flags: ModelArguments, training: TrainingArguments
) -> ModelSize:
    """Return the sizes of a model that is loaded and has what is tuned attached."""
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
    )
