"""Prefix files that are damaged, forged or no prefix at all."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import ptuning
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.checkpoint.layout import PREFIX_KEYS
from ptuning.tunings.artefact import (
    FORMAT_VERSION,
    PREFIX_CONFIG_NAME,
    PREFIX_WEIGHTS_NAME,
    PUBLISHED_NAME,
)

Model = ChatGLMForConditionalGeneration
Build = Callable[..., Model]


@pytest.fixture
def artefact(small: Model, tmp_path: Path) -> Path:
    """The small model's prefix as we save it."""
    ptuning.save_prefix(small, tmp_path / "artefact")
    return tmp_path / "artefact"


def published(model: Model) -> dict[str, Tensor]:
    """The prefix under the names a published checkpoint has."""
    return {PREFIX_KEYS + name: value for name, value in model.prefix_encoder.state_dict().items()}


def edit_config(directory: Path, **changes: Any) -> None:
    file = directory / PREFIX_CONFIG_NAME
    values = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize("name", [PREFIX_WEIGHTS_NAME, PUBLISHED_NAME])
@pytest.mark.parametrize("keep", [0, 5, 200])
def test_a_truncated_file_is_refused(small: Model, artefact: Path, name: str, keep: int) -> None:
    torch.save(published(small), artefact / PUBLISHED_NAME)
    file = artefact / name
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"{name} .*copy or download it again"):
        ptuning.load_prefix(small, file)


class RunsCode:
    """What a pickle from a stranger may hold: unpickling it calls a function."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("pickle-ran-code"),))


def test_a_pickle_with_code_is_refused_and_not_run(
    small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / PUBLISHED_NAME
    torch.save(published(small) | {"extra": RunsCode()}, file)
    with pytest.raises(ValueError, match=r"holds more than tensors"):
        ptuning.load_prefix(small, tmp_path)
    file.write_bytes(pickle.dumps(RunsCode(), protocol=2))
    with pytest.raises(ValueError, match=r"not in the format torch\.save"):
        ptuning.load_prefix(small, file)
    assert not (tmp_path / "pickle-ran-code").exists()


@pytest.mark.parametrize(
    "content",
    [
        [torch.zeros(2)],
        {PREFIX_KEYS + "embedding.weight": [1.0, 2.0]},
        {"model": {PREFIX_KEYS + "embedding.weight": torch.zeros(5, 192)}},
    ],
)
def test_a_file_of_another_kind_is_refused(small: Model, tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / PUBLISHED_NAME)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not a table of tensors"):
        ptuning.load_prefix(small, tmp_path)


def test_a_checkpoint_without_a_prefix_is_refused(build_small: Build, tmp_path: Path) -> None:
    model = build_small()
    torch.save(model.state_dict(), tmp_path / PUBLISHED_NAME)
    with pytest.raises(ValueError, match=r"has no prefix.*give a P-Tuning v2 checkpoint"):
        ptuning.load_prefix(model, tmp_path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"embedding.weight": torch.zeros(192)}, r"embedding\.weight of shape \(192,\)"),
        ({"embedding.weight": torch.zeros(0, 192)}, r"embedding\.weight of shape \(0, 192\)"),
        (
            {"embedding.weight": torch.zeros(5, 32), "trans.0.weight": torch.zeros(32, 32)},
            r"has the tensors.*needed are",
        ),
        (
            {"embedding.weight": torch.full((5, 192), float("nan"))},
            r"embedding\.weight.*not finite.*earlier checkpoint",
        ),
    ],
)
def test_tensors_that_make_no_prefix_are_refused(
    small: Model, tmp_path: Path, tensors: dict[str, Tensor], message: str
) -> None:
    save_file(tensors, tmp_path / PREFIX_WEIGHTS_NAME)
    with pytest.raises(ValueError, match=message):
        ptuning.load_prefix(small, tmp_path)


def test_an_unknown_format_version_is_refused(small: Model, artefact: Path) -> None:
    edit_config(artefact, format_version=FORMAT_VERSION + 1)
    with pytest.raises(ValueError, match=r"format_version 2; this version reads 1: update"):
        ptuning.load_prefix(small, artefact)


def test_a_description_of_another_prefix_is_refused(small: Model, artefact: Path) -> None:
    """A stop between the two writes leaves new weights beside the old description."""
    wanted = (artefact / PREFIX_CONFIG_NAME).read_bytes()
    small.add_prefix(9)
    ptuning.save_prefix(small, artefact)
    (artefact / PREFIX_CONFIG_NAME).write_bytes(wanted)
    with pytest.raises(ValueError, match=r"prefix_length 5.*has 9"):
        ptuning.load_prefix(small, artefact)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format_version": 1}', "\xff\xfe"])
def test_a_damaged_description_is_refused(small: Model, artefact: Path, content: str) -> None:
    (artefact / PREFIX_CONFIG_NAME).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=PREFIX_CONFIG_NAME):
        ptuning.load_prefix(small, artefact)


def test_a_path_without_a_prefix_says_what_was_looked_for(small: Model, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no prefix\.safetensors or pytorch_model"):
        ptuning.load_prefix(small, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"missing does not exist.*give a prefix directory"):
        ptuning.load_prefix(small, tmp_path / "missing")
