"""The frozen base of a run: its tokenizer, its dtype, its weights; errors in one line."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptuning.data.tokenizer import ChatGLMTokenizer
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.quantization.conversion import quantize_embeddings_

logger = logging.getLogger(__name__)


class BaseModelError(ValueError):
    """The base cannot be loaded as asked."""


def check_model_path(name_or_path: str) -> None:
    """Refuse a path that is neither a directory nor a hub id, before anything is fetched."""
    path = Path(name_or_path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BaseModelError(
                f"--model_name_or_path is {name_or_path}, a folder without config.json; give the "
                f"folder with the "
                "published files."
            )
        return
    looks_like_hub_id = name_or_path.count("/") == 1 and not name_or_path.startswith(
        (".", "/", "~")
    )
    if not looks_like_hub_id or path.exists():
        raise BaseModelError(
            f"--model_name_or_path is {name_or_path}, which is not a folder; give a folder with "
            f"the published "
            "files or a hub id such as THUDM/chatglm-6b."
        )


def load_tokenizer(name_or_path: str, **hub: Any) -> ChatGLMTokenizer:
    """Load the tokenizer of a base; hub holds transformers' cache_dir, revision and token."""
    check_model_path(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **hub)
    except (OSError, ValueError) as error:
        raise BaseModelError(_explain("tokenizer", name_or_path, error)) from error
    if not isinstance(tokenizer, ChatGLMTokenizer):
        raise BaseModelError(
            f"{name_or_path} has a {type(tokenizer).__name__}; needed is the first ChatGLM-6B's "
            f"(ice_text.model)."
        )
    return tokenizer


def load_base(
    name_or_path: str,
    *,
    dtype: torch.dtype,
    quantization_bit: int | None = None,
    quantization_backend: str = "auto",
    quantize_embeddings: bool = False,
    **hub: Any,
) -> ChatGLMForConditionalGeneration:
    """Load the weights of a base in dtype, frozen; hub holds cache_dir, revision and token.

    quantization_bit 4 or 8 quantises float weights as they are read; None keeps what is stored.
    quantize_embeddings makes the embedding int8 unless it is stored quantised.
    """
    check_model_path(name_or_path)
    if quantization_bit:
        hub |= {
            "quantization_bit": quantization_bit,
            "quantization_backend": quantization_backend,
        }
    try:
        model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype, **hub)
    except (OSError, ValueError) as error:
        raise BaseModelError(_explain("weights", name_or_path, error)) from error
    if not isinstance(model, ChatGLMForConditionalGeneration):
        raise BaseModelError(
            f"{name_or_path} is a {type(model).__name__}, not a first-generation ChatGLM."
        )
    if quantize_embeddings and not model.config.embedding_quantization_bit:
        quantize_embeddings_(model, backend=quantization_backend)
    model.requires_grad_(False)
    return model


def choose_dtype(device: torch.device, requested: str | None) -> torch.dtype:
    """Return the base's dtype: as requested, else float32 on the CPU, bfloat16 or float16 on a GPU.

    >>> choose_dtype(torch.device("cpu"), None)
    torch.float32
    """
    if requested is not None:
        dtype: torch.dtype = getattr(torch, requested)
        return dtype
    if device.type == "cuda":
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float16
        )
    if device.type in ("mps", "xpu"):
        return torch.float16
    return torch.float32


def _explain(what: str, name_or_path: str, error: Exception) -> str:
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    needed = (
        ""
        if Path(name_or_path).is_dir()
        else " To work offline, download it once and give its folder."
    )
    return f"the {what} of {name_or_path} cannot be loaded: {first_line}{needed}"
