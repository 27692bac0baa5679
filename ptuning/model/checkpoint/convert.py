"""Convert a checkpoint to safetensors: one copy of the head, no code, quantised if asked.

Everything is written to a temporary directory next to the destination and renamed when complete;
an interrupted run leaves nothing. No more than one shard is held in memory.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file

from ptuning.model.checkpoint.files import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    SAFETENSORS_INDEX,
    TOKENIZER_CONFIG_FILE,
    VOCABULARY_FILE,
    StoredTensor,
)
from ptuning.model.checkpoint.layout import Checkpoint, read_checkpoint
from ptuning.model.checkpoint.load import head_is_embedding, stored_tensors
from ptuning.output import open_bar
from ptuning.storage import read_json, write_json

SHARD_BYTES = 2 * 10**9  # also the most that is held in memory
SPARE_BYTES = 64 * 2**20  # room for the files next to the weights
COMPANIONS = (
    *(VOCABULARY_FILE, "special_tokens_map.json", GENERATION_CONFIG_FILE),
    *("LICENSE*", "MODEL_LICENSE*", "NOTICE*"),
)
# Keys that point to a repository's own code, which is not copied because it is not used.
CODE_KEYS = ("auto_map", "custom_pipelines")


def convert_checkpoint(
    source: str | Path, destination: str | Path, *, quantization_bits: int | None = None
) -> Checkpoint:
    """Write the checkpoint in source to destination as safetensors; return what was written.

    quantization_bits None keeps the weights as stored. Raises what read_checkpoint raises;
    FileExistsError for a destination that is not empty; OSError when the disk has no room;
    ValueError for bits that contradict the stored ones.
    """
    source, destination = Path(source), Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(
            f"{destination} is already there and not empty; give a new directory."
        )
    checkpoint = read_checkpoint(source)
    stored_bits = checkpoint.quantization_bits
    if quantization_bits is not None and stored_bits not in (0, quantization_bits):
        raise ValueError(
            f"--quantization_bit is {quantization_bits}, but {source} is stored with {stored_bits} "
            "bits; leave it out, or give the float16 release."
        )
    checkpoint.config.quantization_bit = stored_bits or quantization_bits or 0
    if checkpoint.config.tie_word_embeddings is not False:
        checkpoint.config.tie_word_embeddings = head_is_embedding(checkpoint)
    tensors = stored_tensors(checkpoint, with_prefix=True)
    _check_room(destination, sum(tensor.num_bytes for tensor in tensors.values()))
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}")
    try:
        temporary.mkdir()
        _write_companions(temporary, checkpoint)
        _write_weights(temporary, tensors)
        if destination.exists():
            destination.rmdir()  # empty, or it would have been refused above
        temporary.rename(destination)
    finally:
        if temporary.exists():  # it has its final name when all went well
            shutil.rmtree(temporary)
    return read_checkpoint(destination)


def _check_room(destination: Path, num_bytes: int) -> None:
    existing = next(path for path in destination.absolute().parents if path.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes + SPARE_BYTES:
        raise OSError(
            f"{destination} needs {(num_bytes + SPARE_BYTES) / 1e9:.1f} GB and its disk has "
            f"{free / 1e9:.1f} GB free; make room or give a directory on another disk."
        )


def _write_weights(directory: Path, tensors: dict[str, StoredTensor]) -> None:
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    total_bytes = split.metadata["total_size"]
    with open_bar(total_bytes, "writing weights", unit="B", unit_scale=True) as bar:
        for name, keys in split.filename_to_tensors.items():
            save_file(
                {key: tensors[key][...].contiguous() for key in keys},
                directory / name,
                metadata={"format": "pt"},
            )
            # safetensors makes files that only their owner may read; a model is shared.
            shutil.copymode(directory / CONFIG_FILE, directory / name)
            bar.update(sum(tensors[key].num_bytes for key in keys))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(directory / SAFETENSORS_INDEX, index)


def _write_companions(directory: Path, checkpoint: Checkpoint) -> None:
    """Copy the tokenizer and the licences; write the configurations without references to code."""
    source, config = checkpoint.directory, checkpoint.config
    changed: dict[str, dict[str, Any]] = {
        CONFIG_FILE: {
            "architectures": ["ChatGLMForConditionalGeneration"],
            "tie_word_embeddings": config.tie_word_embeddings,
        },
        TOKENIZER_CONFIG_FILE: {},
    }
    if config.quantization_bit:
        changed[CONFIG_FILE]["quantization_bit"] = config.quantization_bit
    for name, values in changed.items():
        if (source / name).is_file():
            values = read_json(source / name) | values
            kept = {key: value for key, value in values.items() if key not in CODE_KEYS}
            write_json(directory / name, kept)
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copy(file, directory / file.name)
