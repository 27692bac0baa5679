"""A random checkpoint on disk, with the published releases' names, layout and dtypes.

Float16 goes into eight shards with an index, int8 and int4 into one pytorch_model.bin, in which the
output head shares the embedding's bytes, as torch.save stores tied tensors. config.json is written
last and marks a complete directory. There is no vocabulary: only the model can be loaded. Values
are uniform with the standard deviation of trained weights; norms are 1, biases 0.
"""

import json
import math
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.setting import SIZES
from ptuning.model.checkpoint.files import BIN_FILE, BIN_INDEX
from ptuning.model.checkpoint.layout import (
    EMBEDDING,
    HEAD,
    SCALE_SUFFIX,
    float_shapes,
    is_layer_linear,
)
from ptuning.model.config import ChatGLMConfig
from ptuning.model.quantization.reference import packed_columns
from ptuning.storage import LAYER_LINEARS

BITS = (0, 4, 8)  # 0 is float16
NUM_SHARDS = 8  # of the published float16 release
WEIGHT_STD = 0.02  # ChatGLM's initializer_range
CODE_STD = {4: 16 / math.sqrt(12), 8: 256 / math.sqrt(12)}  # of uniform integers of that many bits
BLOCK_BYTES = 2**26  # random bytes per draw
SPARE_BYTES = 2**28  # for zip headers and the JSON files


class CountingFile:
    """Writes to a file and advances a progress bar."""

    def __init__(self, file: BinaryIO, bar: tqdm) -> None:
        self.file, self.bar = file, bar

    def write(self, data: memoryview) -> int:
        """Write data and return its size in bytes."""
        written = self.file.write(data)
        self.bar.update(written)
        return written

    def flush(self) -> None:
        """Flush the buffer."""
        self.file.flush()


def config_values(size: str, bits: int) -> dict[str, Any]:
    """Return config.json of a size, as published; the control ids are the last of the vocabulary
    unless the size is ChatGLM-6B's.
    """
    num_layers, hidden_size, num_heads, vocab_size = SIZES[size]
    values: dict[str, Any] = {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "torch_dtype": "float16",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "inner_hidden_size": 4 * hidden_size,
        "num_layers": num_layers,
        "num_attention_heads": num_heads,
        "max_sequence_length": 2048,
        "layernorm_epsilon": 1e-5,
        "position_encoding_2d": True,
        "use_cache": True,
    }
    if vocab_size != ChatGLMConfig().vocab_size:
        values |= {
            "bos_token_id": vocab_size - 4,
            "eos_token_id": vocab_size - 3,
            "mask_token_id": vocab_size - 2,
            "gmask_token_id": vocab_size - 1,
            "pad_token_id": 3,
        }
    return values | ({"quantization_bit": bits} if bits else {})


def stored_shapes(size: str, bits: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of every tensor in file order, with the rotary tables."""
    config = ChatGLMConfig(**config_values(size, bits))
    stored: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, shape in float_shapes(config).items():
        if bits and is_layer_linear(name):
            stored[name] = (torch.int8, (shape[0], packed_columns(shape[1], bits)))
            stored[name + SCALE_SUFFIX] = (torch.float16, (shape[0],))
        else:
            stored[name] = (torch.float16, shape)
        if name.endswith(f"{LAYER_LINEARS[1]}.bias"):
            table = name.replace("dense.bias", "rotary_emb.inv_freq")
            stored[table] = (torch.float16, (config.head_dim // 4,))
    return stored


def checkpoint_bytes(size: str, bits: int) -> int:
    """Return the size of the weights on disk; quantised releases store the tied head once."""
    stored = stored_shapes(size, bits)
    if bits:
        del stored[HEAD]
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in stored.values())


def check_room(directory: Path, num_bytes: int) -> None:
    """Raise OSError if the disk of directory has no room for num_bytes."""
    absolute = directory.absolute()
    existing = next(path for path in (absolute, *absolute.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes + SPARE_BYTES:
        raise OSError(
            f"{directory} needs {(num_bytes + SPARE_BYTES) / 1e9:.1f} GB and its disk has "
            f"{free / 1e9:.1f} GB free; make room, or give --directory on another disk."
        )


def random_codes(generator: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    """Return int8 (rows, cols) of uniformly random bytes."""
    codes = np.empty(math.prod(shape), dtype=np.int8)
    for start in range(0, codes.size, BLOCK_BYTES):
        part = codes[start : start + BLOCK_BYTES]
        part[:] = np.frombuffer(generator.bytes(part.size), dtype=np.int8)
    return torch.from_numpy(codes).view(shape)


def random_tensor(name: str, dtype: torch.dtype, shape: tuple[int, ...], bits: int) -> Tensor:
    """Return the values of a tensor, determined by its name and shape."""
    if name.endswith(SCALE_SUFFIX):
        return torch.full(shape, WEIGHT_STD / CODE_STD[bits], dtype=dtype)
    if len(shape) == 1:
        is_bias = name.endswith("bias")
        return torch.zeros(shape, dtype=dtype) if is_bias else torch.ones(shape, dtype=dtype)
    seed = zlib.crc32((EMBEDDING if name == HEAD else name).encode())
    codes = random_codes(np.random.default_rng(seed), shape)
    if dtype == torch.int8:
        return codes
    return codes.to(dtype).mul_(WEIGHT_STD / CODE_STD[8])


def shards_of(
    stored: dict[str, tuple[torch.dtype, tuple[int, ...]]], num_shards: int
) -> Iterator[list[str]]:
    """Yield the tensor names of each shard, about equal in bytes, in file order."""
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in stored.items()}
    total, start = sum(sizes.values()), 0
    shards: list[list[str]] = [[] for _ in range(num_shards)]
    for name, size in sizes.items():
        shards[start * num_shards // total].append(name)
        start += size
    yield from shards


def write_checkpoint(directory: Path, size: str, bits: int) -> None:
    """Write the checkpoint into directory, one shard in memory at a time."""
    stored = stored_shapes(size, bits)
    num_shards = 1 if bits else NUM_SHARDS
    weight_map: dict[str, str] = {}
    total_bytes = checkpoint_bytes(size, bits)
    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="Writing weights") as bar:
        for number, names in enumerate(shards_of(stored, num_shards), 1):
            tensors = {name: random_tensor(name, *stored[name], bits) for name in names}
            if HEAD in tensors and EMBEDDING in tensors:
                tensors[HEAD] = tensors[EMBEDDING]
            file = f"pytorch_model-{number:05d}-of-{num_shards:05d}.bin" if not bits else BIN_FILE
            with (directory / file).open("wb") as opened:
                torch.save(tensors, cast(BinaryIO, CountingFile(opened, bar)))
            del tensors  # otherwise two shards are in memory at a time
            weight_map |= dict.fromkeys(names, file)
    if not bits:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        write_json_file(directory / BIN_INDEX, index)
    write_json_file(directory / "config.json", config_values(size, bits))


def write_json_file(file: Path, values: dict[str, Any]) -> None:
    """Write values as indented JSON."""
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
