"""Checkpoints laid out as published, made from the tiny golden weights, for the tests to load and to damage."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

NUM_SHARDS = 8
SHIFT = 20_000  # how much higher the older release's ids are


def golden_tensors(golden: Path, kind: str = "model") -> dict[str, Tensor]:
    """The tiny weights: model, model-int8 or model-int4."""
    return load_file(golden / "chatglm-tiny" / f"{kind}.safetensors")


def golden_config(golden: Path, **changes: Any) -> dict[str, Any]:
    """The tiny config.json, with changes."""
    return (
        json.loads((golden / "chatglm-tiny" / "config.json").read_text(encoding="utf-8")) | changes
    )


def write_companions(directory: Path, config: dict[str, Any]) -> None:
    """Everything a published directory has beside its weights; the vocabulary is a stand-in."""
    directory.mkdir(parents=True, exist_ok=True)
    auto_map = {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"}
    (directory / "config.json").write_text(
        json.dumps(config | {"auto_map": auto_map}), encoding="utf-8"
    )
    tokenizer = {
        "tokenizer_class": "ChatGLMTokenizer",
        "auto_map": {"AutoTokenizer": ["x.Y", None]},
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (directory / "ice_text.model").write_bytes(b"vocabulary")
    (directory / "MODEL_LICENSE").write_text("licence of the weights\n", encoding="utf-8")
    # Reading this file would show: it ends the run of whoever imports it.
    (directory / "modeling_chatglm.py").write_text(
        "raise SystemExit('remote code ran')\n", encoding="utf-8"
    )


def write_shards(directory: Path, tensors: dict[str, Tensor], num_shards: int = NUM_SHARDS) -> None:
    """Write tensors as pytorch_model-0000k-of-0000n.bin with their index, or as one pytorch_model.bin."""
    if num_shards == 1:
        torch.save(tensors, directory / "pytorch_model.bin")
        return
    names = list(tensors)
    step = -(-len(names) // num_shards)
    weight_map: dict[str, str] = {}
    for number in range(num_shards):
        part = names[number * step : (number + 1) * step]
        file = f"pytorch_model-{number + 1:05d}-of-{num_shards:05d}.bin"
        torch.save({name: tensors[name].clone() for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": weight_map,
    }
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")


def published_order(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published order of tensors, with the rotary table the published code stores in every layer."""
    stored = {"transformer.word_embeddings.weight": tensors["transformer.word_embeddings.weight"]}
    for index in range(28):
        layer = f"transformer.layers.{index}."
        stored |= {name: value for name, value in tensors.items() if name.startswith(layer)}
        stored[f"{layer}attention.rotary_emb.inv_freq"] = torch.ones(4).half()
    return stored | tensors  # what is left comes last: the final norm and the head


def make_published(golden: Path, directory: Path, *, tied: bool = True, **changes: Any) -> Path:
    """Eight float16 shards with index and companions; tied makes the head repeat the embedding."""
    tensors = golden_tensors(golden)
    if tied:
        tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"].clone()
    write_companions(directory, golden_config(golden, **changes))
    write_shards(directory, published_order(tensors))
    return directory


def make_quantized(golden: Path, directory: Path, bits: int, **changes: Any) -> Path:
    """The layout of the slim releases: one pytorch_model.bin, quantization_bit in config.json."""
    write_companions(directory, golden_config(golden, quantization_bit=bits, **changes))
    write_shards(
        directory, published_order(golden_tensors(golden, f"model-int{bits}")), num_shards=1
    )
    return directory


def make_safetensors(golden: Path, directory: Path, kind: str = "model", **changes: Any) -> Path:
    """A directory with one model.safetensors."""
    write_companions(directory, golden_config(golden, **changes))
    shutil.copy(golden / "chatglm-tiny" / f"{kind}.safetensors", directory / "model.safetensors")
    return directory


def make_older(golden: Path, directory: Path) -> Path:
    """The 150,528-token release in small: 20,000 image tokens come first, so that every id is that much higher.

    Its config.json gives bos and eos and leaves the other ids to the code, as the published one did.
    """
    tensors = golden_tensors(golden)
    for name in ("transformer.word_embeddings.weight", "lm_head.weight"):
        tensors[name] = torch.cat(
            [torch.zeros(SHIFT, tensors[name].shape[1]).half(), tensors[name]]
        )
    config = golden_config(golden)
    config.update(
        vocab_size=config["vocab_size"] + SHIFT,
        bos_token_id=config["bos_token_id"] + SHIFT,
        eos_token_id=config["eos_token_id"] + SHIFT,
        pad_token_id=config["pad_token_id"] + SHIFT,
    )
    del config["mask_token_id"], config["gmask_token_id"]
    write_companions(directory, config)
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"num_image_tokens": SHIFT}), encoding="utf-8"
    )
    write_shards(directory, published_order(tensors))
    return directory
