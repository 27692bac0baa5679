"""How things are stored: files written atomically, JSON objects read back, and published names."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

INFO_NAME = "tuning_config.json"  # how an adapter or a whole model was tuned
ADAPTER_CONFIG_NAME = "adapter_config.json"  # peft's names
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
ADAPTER_FILES = (ADAPTER_WEIGHTS_NAME, "adapter_model.bin")

# The linears of a layer, which quantisation and LoRA apply to.
LAYER_LINEARS = (
    "attention.query_key_value",
    "attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)
TARGET_MODULES = tuple(name.rpartition(".")[2] for name in LAYER_LINEARS)  # as peft names them
SUPPORTED_BITS = (4, 8)  # of quantised weights
WINDOWS_LOCK_OFFSET = 1 << 30  # bytes; a locked byte cannot be read there, so it is past the text
FORMAT_VERSION = 1  # of prefix_config.json and tuning_config.json


def write_atomically(path: Path, content: bytes) -> None:
    """Write content to a temporary file next to path, flush it to disk, then rename it to path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # still there only if writing or renaming failed


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, indented, in UTF-8."""
    text = json.dumps(values, ensure_ascii=False, indent=2) + "\n"
    write_atomically(path, text.encode())


def lock_file(descriptor: int) -> None:
    """Lock without waiting; OSError if another process holds the lock or there are no locks."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, WINDOWS_LOCK_OFFSET, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; ValueError names the file when there is none in it."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # broken JSON or broken UTF-8
        raise ValueError(f"{file} is not JSON ({error}); copy or download it again.") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{file} contains a JSON {type(values).__name__} instead of an object; copy or "
            "download it again."
        )
    return values


def read_description(file: Path, *needed: str) -> dict[str, Any]:
    """Return an artefact's description; ValueError for another format or missing keys."""
    values = read_json(file)
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version {version}; this version reads {FORMAT_VERSION}: update the "
            "toolkit."
        )
    missing = [key for key in needed if key not in values]
    if missing:
        raise ValueError(
            f"{file} is incomplete (it lacks {', '.join(missing)}); restore it from the run."
        )
    return values


def check_targets(target_modules: Sequence[str]) -> None:
    """Refuse names that are not a layer's linears (ValueError)."""
    unknown = [name for name in target_modules if name not in TARGET_MODULES]
    if unknown or not target_modules:
        raise ValueError(
            f"--lora_target_modules is {','.join(target_modules) or 'empty'}; give one or more of "
            f"{', '.join(TARGET_MODULES)}, separated by commas."
        )
