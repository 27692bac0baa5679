"""From the name of a model to its files, tokenizer and frozen weights; errors in one line.

A name stands for a base, for a whole model that was tuned, or for a LoRA adapter, which names its
base. `nano` is the embedded model.

Importing this module imports neither torch nor transformers: `find_base` refuses a wrong name at
once. Errors of the loading functions name main.py's flags; a command with other flags calls
`find_base` first and passes on what it returns.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ptuning.output import first_line
from ptuning.storage import ADAPTER_CONFIG_NAME, INFO_NAME
from ptuning.tunings.artefact import (
    LORA,
    PREFIX_CONFIG_NAME,
    PTUNING,
    PUBLISHED_NAME,
    Info,
    ModelError,
    kind_of,
    read_info,
)

if TYPE_CHECKING:
    import torch

    from ptuning.data.tokenizer import ChatGLMTokenizer
    from ptuning.model.chatglm import ChatGLMForConditionalGeneration

NANO_DIR = Path(__file__).resolve().parents[1] / "nano" / "weights"
SAMPLE_DIR = Path(__file__).resolve().parents[2] / "AdvertiseGen" / "sample"  # in a checkout
WORDS_OF_MAIN = {"flag": "--model_name_or_path", "tuned_flag": "--ptuning_checkpoint"}


def find_base(name_or_path: str, *, flag: str, tuned_flag: str | None = None) -> str:
    """Return the directory or hub id of the base that a flag names; nothing of it is loaded.

    ModelError names flags of the command: flag is what precedes the name, tuned_flag takes a prefix
    or an adapter (None where the command takes neither).
    """
    path = Path(name_or_path)
    if name_or_path == "nano" and not path.exists():
        return str(NANO_DIR)
    if not path.exists() and name_or_path.count("/") == 1 and name_or_path[0] not in "./~":
        return name_or_path  # a hub id
    if not path.is_dir():
        raise ModelError(
            f"{flag} is {name_or_path}, which is not a folder; give a folder with the published "
            "files, a hub id such as THUDM/chatglm-6b, or nano, the embedded model."
        )
    if not _has_model(path):
        try:
            kind = kind_of(path)
        except FileNotFoundError as error:
            raise ModelError(
                f"{flag} is {name_or_path}, a folder without config.json; give the folder with the "
                "published files."
            ) from error
        what = "a LoRA adapter" if kind == LORA else "a prefix"
        info = read_info(path)
        base = (info and info.base_model_name_or_path) or "BASE"
        typed = f"{flag} {base}" + (f" {tuned_flag} {path}" if tuned_flag else "")
        raise ModelError(
            f"{flag} is {name_or_path}, which holds {what} and no model; give the model it was "
            f"trained on: {typed}"
        )
    return name_or_path


def _has_model(path: Path) -> bool:
    """Return whether a folder has a model; a published prefix may have a model's config.json."""
    if not (path / "config.json").is_file():
        return False
    has_weights = any(path.glob("*model*.safetensors")) or any(path.glob("*model*.bin"))
    if (path / PREFIX_CONFIG_NAME).is_file() and not has_weights:
        return False
    if not (path / PUBLISHED_NAME).is_file():
        return True
    from ptuning.model.checkpoint.files import find_weight_files, read_headers  # needs torch

    return not all("prefix_encoder." in name for name in read_headers(find_weight_files(path)))


def load_tokenizer(name_or_path: str, **hub: Any) -> "ChatGLMTokenizer":
    """Load the tokenizer of a base; hub holds transformers' cache_dir, revision and token."""
    from transformers import AutoTokenizer

    from ptuning.data.tokenizer import ChatGLMTokenizer
    from ptuning.model.checkpoint.files import has_network

    name_or_path = find_base(name_or_path, **WORDS_OF_MAIN)
    if not Path(name_or_path).is_dir() and not has_network():
        hub["local_files_only"] = True  # else huggingface_hub retries for a minute
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **hub)
    except (OSError, ValueError) as error:
        raise ModelError(_explain("tokenizer", name_or_path, error)) from error
    if not isinstance(tokenizer, ChatGLMTokenizer):
        raise ModelError(
            f"{name_or_path} has a {type(tokenizer).__name__}; give a model with the tokenizer of "
            "the first ChatGLM-6B (ice_text.model)."
        )
    return tokenizer


def load_base(
    name_or_path: str,
    *,
    dtype: "torch.dtype",
    quantization_bit: int | None = None,
    quantization_backend: str = "auto",
    quantize_embeddings: bool = False,
    **hub: Any,
) -> "ChatGLMForConditionalGeneration":
    """Load the weights of a base in dtype, frozen; hub holds cache_dir, revision and token.

    An adapter in its folder is not attached. quantization_bit 4 or 8 quantises float weights as
    they are read, None keeps them as stored; quantize_embeddings makes a float embedding int8.
    """
    from transformers import AutoModelForCausalLM

    from ptuning.model.chatglm import ChatGLMForConditionalGeneration
    from ptuning.model.quantization.layers import quantize_embeddings_

    name_or_path = find_base(name_or_path, **WORDS_OF_MAIN)
    if quantization_bit:
        hub |= {
            "quantization_bit": quantization_bit,
            "quantization_backend": quantization_backend,
        }
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name_or_path, dtype=dtype, adapter_name=None, **hub
        )
    except (OSError, ValueError) as error:
        raise ModelError(_explain("weights", name_or_path, error)) from error
    if not isinstance(model, ChatGLMForConditionalGeneration):
        raise ModelError(
            f"{name_or_path} is a {type(model).__name__}, not a first-generation ChatGLM."
        )
    if quantize_embeddings and not model.config.embedding_quantization_bit:
        quantize_embeddings_(model, backend=quantization_backend)
    model.requires_grad_(False)
    return model


def choose_dtype(device: "torch.device", requested: str | None) -> "torch.dtype":
    """Return the base's dtype: as requested, else float32 on the CPU, bfloat16 or float16 on a GPU.

    >>> import torch
    >>> choose_dtype(torch.device("cpu"), None)
    torch.float32
    """
    import torch

    if requested is not None:
        dtype: torch.dtype = getattr(torch, requested)
        return dtype
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16 if device.type in ("cuda", "mps", "xpu") else torch.float32


def _explain(what: str, name_or_path: str, error: Exception) -> str:
    offline = " To work offline, download it once and give its folder."
    return (
        f"the {what} of {name_or_path} cannot be loaded: {first_line(error)}"
        f"{'' if Path(name_or_path).is_dir() else offline}"
    )


def describe_frozen(model: "ChatGLMForConditionalGeneration") -> str:
    """Say how many parameters the frozen base has, and in how many bits quantised ones are."""
    from ptuning.model.quantization.layers import QuantizedLinear

    count = sum(p.numel() for _, p in model.base_parameters() if not p.requires_grad)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):  # stored in bytes of one or two codes each
            count += module.in_features * module.out_features - module.weight.numel()
    bits = model.config.quantization_bit
    return f"the base's {count:,} stay frozen" + (f", its layers in int{bits}" if bits else "")


class NamedModel(NamedTuple):
    """The weights (directory or hub id), an adapter to attach, and how the model was tuned."""

    weights: str
    adapter: Path | None
    info: Info | None


def find_model(
    name_or_path: str, *, flag: str = "--model", tuned_flag: str | None = "--prefix"
) -> NamedModel:
    """Return what a model's name stands for; nothing of it is loaded. Flags as in `find_base`.

    ValueError for a prefix, which needs a base, and for an adapter without one that is there.
    """
    path = Path(name_or_path)
    if (path / ADAPTER_CONFIG_NAME).is_file() and kind_of(path) == LORA:
        return NamedModel(base_of(path), path, read_info(path))
    weights = find_base(name_or_path, flag=flag, tuned_flag=tuned_flag)
    info = read_info(path) if (path / INFO_NAME).is_file() else None
    return NamedModel(weights, None, info if info and info.tuning != PTUNING else None)


def base_of(tuned: Path, *, flag: str = "--model") -> str:
    """Return the base that a prefix or an adapter says it was trained on; ValueError without it."""
    remedy = f"give it with {flag}"
    if (tuned / ADAPTER_CONFIG_NAME).is_file():
        file = INFO_NAME if (tuned / INFO_NAME).is_file() else ADAPTER_CONFIG_NAME
        remedy = f"write it as base_model_name_or_path into {tuned / file}"
    info = read_info(tuned)
    if info is None or not info.base_model_name_or_path:
        raise ValueError(
            f"{tuned} does not name the base it was trained on ({PREFIX_CONFIG_NAME} or "
            f"{INFO_NAME} would); {remedy}."
        )
    base = info.base_model_name_or_path
    checkout = NANO_DIR.parents[2]
    if not Path(base).is_dir() and (checkout / base / "config.json").is_file():
        return str(checkout / base)  # trained by train.sh, which runs in the checkout
    try:
        return find_base(base, flag=flag)
    except ModelError as error:
        raise ValueError(
            f"{tuned} was trained on {base}, and no model is there; {remedy}, with its new path."
        ) from error


def refuse_other_kinds(path: Path) -> None:
    """Refuse an adapter or a whole model where a prefix is wanted (ValueError)."""
    if not any((path / mark).is_file() for mark in (INFO_NAME, ADAPTER_CONFIG_NAME)):
        return
    kind = kind_of(path)
    if kind != PTUNING:
        what = "a LoRA adapter" if kind == LORA else "a whole model"
        raise ValueError(
            f"{path} holds {what}, which changes every answer, not only those of one name; start "
            f"with it as the model: --model {path}"
        )
