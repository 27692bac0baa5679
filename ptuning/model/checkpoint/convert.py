"""Write a checkpoint once more as safetensors: one copy of the head, no code, quantised if asked.

Everything is written to a temporary directory next to the destination and renamed when complete;
an interrupted run leaves nothing. No more than one shard is held in memory.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file

from ptuning.model.checkpoint.files import SAFETENSORS_FILE, SAFETENSORS_INDEX, StoredTensor
from ptuning.model.checkpoint.layout import (
    Checkpoint,
    CheckpointSummary,
    check_checkpoint,
    read_checkpoint,
    read_json,
)
from ptuning.model.checkpoint.load import head_is_embedding, stored_tensors
from ptuning.output import open_bar

logger = logging.getLogger(__name__)

SHARD_BYTES = 2 * 10**9  # also the most that is held in memory
SPARE_BYTES = 64 * 2**20  # room for the files next to the weights
COMPANIONS = (
    "ice_text.model",
    "special_tokens_map.json",
    "generation_config.json",
    "LICENSE*",
    "MODEL_LICENSE*",
    "NOTICE*",
)
# Keys that point to a repository's own code, which is not copied because it is not used.
CODE_KEYS = ("auto_map", "custom_pipelines")


def convert_checkpoint(
    source: str | Path, destination: str | Path, *, quantization_bits: int | None = None
) -> CheckpointSummary:
    """Write the checkpoint in source to destination as safetensors; return what was written.

    quantization_bits None keeps the weights as stored. Raises what check_checkpoint raises;
    FileExistsError for a destination that is not empty; OSError when the disk has no room;
    ValueError for bits that contradict the stored.
    """
    source, destination = Path(source), Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(
            f"{destination} is already there and not empty; give a new directory."
        )
    checkpoint = read_checkpoint(source)
    stored_bits = checkpoint.summary.quantization_bits
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
    return check_checkpoint(destination)


def _check_room(destination: Path, num_bytes: int) -> None:
    existing = next(path for path in destination.absolute().parents if path.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes + SPARE_BYTES:
        raise OSError(
            f"{destination} needs {(num_bytes + SPARE_BYTES) / 1e9:.1f} GB and its disk has "
            f"{free / 1e9:.1f} GB free; make room or give a directory on another disk."
        )


def split_into_shards(
    tensors: dict[str, StoredTensor], shard_bytes: int
) -> Iterator[dict[str, StoredTensor]]:
    """Yield the tensors in order, in groups of at most shard_bytes; a larger one is alone."""
    shard: dict[str, StoredTensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.num_bytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.num_bytes
    if shard:
        yield shard


def _write_weights(directory: Path, tensors: dict[str, StoredTensor]) -> None:
    shards = list(split_into_shards(tensors, SHARD_BYTES))
    total_bytes = sum(tensor.num_bytes for tensor in tensors.values())
    weight_map: dict[str, str] = {}
    with open_bar(total_bytes, "writing weights", unit="B", unit_scale=True) as bar:
        for number, shard in enumerate(shards, 1):
            name = SAFETENSORS_FILE
            if len(shards) > 1:
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            save_file(
                {key: tensor[...].contiguous() for key, tensor in shard.items()},
                directory / name,
                metadata={"format": "pt"},
            )
            # safetensors makes files that only their owner may read; a model is shared.
            shutil.copymode(directory / "config.json", directory / name)
            weight_map.update(dict.fromkeys(shard, name))
            bar.update(sum(tensor.num_bytes for tensor in shard.values()))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        _write_json(directory / SAFETENSORS_INDEX, index)


def _write_companions(directory: Path, checkpoint: Checkpoint) -> None:
    """Copy the tokenizer and the licences; write the configurations without references to code."""
    config = checkpoint.config
    values = read_json(checkpoint.directory / "config.json") | {
        "architectures": ["ChatGLMForConditionalGeneration"],
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    if config.quantization_bit:
        values["quantization_bit"] = config.quantization_bit
    _write_json(directory / "config.json", values)
    tokenizer_config = checkpoint.directory / "tokenizer_config.json"
    if tokenizer_config.is_file():
        _write_json(directory / tokenizer_config.name, read_json(tokenizer_config))
    for pattern in COMPANIONS:
        for file in checkpoint.directory.glob(pattern):
            if file.is_file():
                shutil.copy(file, directory / file.name)


def _write_json(file: Path, values: dict[str, object]) -> None:
    kept = {key: value for key, value in values.items() if key not in CODE_KEYS}
    file.write_text(json.dumps(kept, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
