"""Prefixes on disk: ours, the published ones, and everything that can be wrong with either."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import ptuning
from ptuning.model.chatglm import ChatGLMForConditionalGeneration
from ptuning.model.checkpoint.layout import PREFIX_KEYS, base_fingerprint
from ptuning.storage import read_json
from ptuning.tunings.artefact import (
    FORMAT_VERSION,
    PREFIX_CONFIG_NAME,
    PREFIX_WEIGHTS_NAME,
    PTUNING,
    PUBLISHED_NAME,
    Info,
)

Model = ChatGLMForConditionalGeneration
Build = Callable[..., Model]
TOKENS = torch.tensor([[5, 6, 7, 61, 62, 8]])


def prefix_tensors(model: Model) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.prefix_encoder.state_dict().items()}


def assert_same_prefix(model: Model, wanted: dict[str, Tensor]) -> None:
    found = prefix_tensors(model)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], value), name


@pytest.fixture
def artefact(small: Model, tmp_path: Path) -> Path:
    """The small model's prefix as we save it."""
    ptuning.save_prefix(small, tmp_path / "artefact")
    return tmp_path / "artefact"


@pytest.mark.parametrize("project", [False, True])
def test_saved_equals_loaded(
    small: Model, build_small: Build, tmp_path: Path, project: bool
) -> None:
    small.add_prefix(5, project=project)
    wanted = prefix_tensors(small)
    saved = ptuning.save_prefix(
        small,
        tmp_path,
        step=300,
        metrics={"rouge-1": 31.1},
        settings={"prompt_column": "内容", "max_source_length": 64},
    )
    model = build_small()
    loaded = ptuning.load_prefix(model, tmp_path)
    assert loaded == saved
    assert read_json(tmp_path / PREFIX_CONFIG_NAME) == {
        "prefix_length": 5,
        "prefix_projection": project,
        "num_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "vocab_size": 64,
        "base_model_name_or_path": "",
        "base_fingerprint": base_fingerprint(small),
        "step": 300,
        "metrics": {"rouge-1": 31.1},
        "settings": {"prompt_column": "内容", "max_source_length": 64},
        "format_version": FORMAT_VERSION,
    }
    assert_same_prefix(model, wanted)
    assert (model.config.pre_seq_len, model.config.prefix_projection) == (5, project)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, small(TOKENS).logits)


def test_the_file_holds_published_names_in_float32(small: Model, tmp_path: Path) -> None:
    small.add_prefix(5, project=True)
    small.bfloat16()
    ptuning.save_prefix(small, tmp_path)
    tensors = load_file(tmp_path / PREFIX_WEIGHTS_NAME)
    assert set(tensors) == {
        f"transformer.prefix_encoder.{name}"
        for name in (
            "embedding.weight",
            "trans.0.weight",
            "trans.0.bias",
            "trans.2.weight",
            "trans.2.bias",
        )
    }
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    assert "内容" not in (tmp_path / PREFIX_CONFIG_NAME).read_text(encoding="utf-8")


def test_saving_leaves_two_files_and_no_temporary_ones(small: Model, tmp_path: Path) -> None:
    for _ in range(2):
        ptuning.save_prefix(small, tmp_path / "new" / "folder")
    assert sorted(file.name for file in (tmp_path / "new" / "folder").iterdir()) == [
        PREFIX_WEIGHTS_NAME,
        PREFIX_CONFIG_NAME,
    ]


def test_a_write_that_fails_leaves_the_old_artefact(
    small: Model, artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in artefact.iterdir()}
    small.add_prefix(9)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        ptuning.save_prefix(small, artefact)
    assert {file.name: file.read_bytes() for file in artefact.iterdir()} == before


def test_a_model_without_a_prefix_saves_none(build_small: Build, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no prefix to save.*add_prefix"):
        ptuning.save_prefix(build_small(), tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def published(model: Model) -> dict[str, Tensor]:
    """The prefix under the names a published checkpoint has."""
    return {PREFIX_KEYS + name: value for name, value in prefix_tensors(model).items()}


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("whole_model", [False, True])
def test_a_published_checkpoint_is_read(
    small: Model,
    build_small: Build,
    tmp_path: Path,
    project: bool,
    half: bool,
    whole_model: bool,
) -> None:
    """A folder with pytorch_model.bin, holding the prefix alone or the whole model, or that file."""
    small.add_prefix(5, project=project)
    tensors = small.state_dict() if whole_model else published(small)
    if half:
        tensors = {name: value.half() for name, value in tensors.items()}
    torch.save(tensors, tmp_path / PUBLISHED_NAME)
    wanted = {
        name: (value.half().float() if half else value)
        for name, value in prefix_tensors(small).items()
    }
    for path in (tmp_path, tmp_path / PUBLISHED_NAME, str(tmp_path)):
        model = build_small()
        base = copy.deepcopy(model.state_dict())
        info = ptuning.load_prefix(model, path)
        assert_same_prefix(model, wanted)
        assert (info.prefix_length, info.prefix_projection) == (5, project)
        assert info.base_fingerprint is None, "a published file does not say what its base is"
        for name, value in base.items():
            assert torch.equal(model.state_dict()[name], value), "the base stays as it is"


def test_our_own_file_comes_before_a_published_one(small: Model, artefact: Path) -> None:
    wanted = prefix_tensors(small)
    small.add_prefix(9)
    torch.save(published(small), artefact / PUBLISHED_NAME)
    ptuning.load_prefix(small, artefact)
    assert_same_prefix(small, wanted)
    assert ptuning.load_prefix(small, artefact / PUBLISHED_NAME).prefix_length == 9


@pytest.mark.parametrize(
    ("name", "project"), [("prefix.safetensors", False), ("prefix_projection.safetensors", True)]
)
def test_bare_safetensors_are_read(tiny: Model, golden: Path, name: str, project: bool) -> None:
    file = golden / "chatglm-tiny" / name
    info = ptuning.load_prefix(tiny, file)
    assert info == Info(
        tuning=PTUNING,
        prefix_length=8,
        prefix_projection=project,
        num_layers=28,
        hidden_size=32,
        num_attention_heads=2,
        vocab_size=1024,
    )
    wanted = {key: value.float() for key, value in load_file(file).items()}
    assert_same_prefix(tiny, wanted)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"expected_length": 128}, r"--pre_seq_len is 128, but the prefix at .* has 5; leave"),
        ({"expected_projection": True}, r"--prefix_projection is True, but .* has False; leave"),
    ],
)
def test_flags_that_contradict_the_prefix_are_refused(
    small: Model, artefact: Path, expected: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ptuning.load_prefix(small, artefact, **expected)
    agreed = ptuning.load_prefix(small, artefact, expected_length=5, expected_projection=False)
    assert agreed.prefix_length == 5


@pytest.mark.parametrize(
    ("project", "sizes", "message"),
    [
        (False, {"num_layers": 2}, r"\(5, 192\); a base of 2 layers of 32 needs \(5, 128\)"),
        (False, {"hidden_size": 64}, r"\(5, 192\); a base of 3 layers of 64 needs \(5, 384\)"),
        (True, {"num_layers": 2}, r"trans\.2\.weight of shape \(192, 32\).*needs \(128, 32\)"),
        (True, {"hidden_size": 64}, r"embedding\.weight of shape \(5, 32\).*needs \(5, 64\)"),
        # As wide as three layers of 32: only the projection tells.
        (True, {"num_layers": 6, "hidden_size": 16}, r"\(5, 32\).*6 layers of 16 needs \(5, 16\)"),
        (False, {"num_attention_heads": 4}, r"is for 2 heads; this base has 4"),
    ],
)
def test_a_base_of_other_sizes_is_refused(
    small: Model,
    build_small: Build,
    tmp_path: Path,
    project: bool,
    sizes: dict[str, int],
    message: str,
) -> None:
    small.add_prefix(5, project=project)
    ptuning.save_prefix(small, tmp_path)
    other = build_small(**sizes)
    with pytest.raises(ValueError, match=message):
        ptuning.load_prefix(other, tmp_path, allow_other_base=True)
    assert other.prefix_encoder is None


def test_another_base_of_the_same_sizes_is_refused_unless_allowed(
    small: Model, build_small: Build, artefact: Path
) -> None:
    other = build_small(seed=1)
    with torch.no_grad():
        other.transformer.final_layernorm.weight.mul_(1.5)
    with pytest.raises(
        ValueError, match=r"trained on a base \(fingerprint .*allow_other_base=True"
    ):
        ptuning.load_prefix(other, artefact)
    assert other.prefix_encoder is None
    ptuning.load_prefix(other, artefact, allow_other_base=True)
    assert_same_prefix(other, prefix_tensors(small))


def test_the_fingerprint_is_one_for_all_precisions_of_a_base(golden: Path) -> None:
    directory = golden / "chatglm-tiny"
    found = {
        base_fingerprint(AutoModelForCausalLM.from_pretrained(directory, **options))
        for options in (
            {"dtype": torch.float32},
            {"dtype": torch.float16},
            {"dtype": torch.bfloat16},
            {"dtype": torch.float16, "quantization_bit": 8},
            {"dtype": torch.float16, "quantization_bit": 4},
        )
    }
    assert len(found) == 1
    assert len(found.pop()) == 32


def test_the_fingerprint_sees_the_base_and_not_the_prefix(small: Model, build_small: Build) -> None:
    assert base_fingerprint(small) == base_fingerprint(build_small())
    before = base_fingerprint(small)
    with torch.no_grad():
        small.transformer.layers[1].mlp.dense_h_to_4h.bias[3] += 0.5
    assert base_fingerprint(small) != before


def test_weights_whose_description_was_deleted_are_read(small: Model, artefact: Path) -> None:
    wanted = prefix_tensors(small)
    (artefact / PREFIX_CONFIG_NAME).unlink()
    info = ptuning.load_prefix(small, artefact)
    assert info.base_fingerprint is None
    assert_same_prefix(small, wanted)


def test_a_loaded_prefix_trains_on(small: Model, artefact: Path) -> None:
    ptuning.load_prefix(small, artefact)
    small.freeze_base()
    batch = torch.tensor([[5, 6, 61, 62, 8, 9]])
    small(batch, labels=batch).loss.backward()
    assert small.prefix_encoder.embedding.weight.grad.abs().sum() > 0


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
    with pytest.raises(ValueError, match=r"cannot be read.*more than tensors"):
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
    with pytest.raises(ValueError, match=r"pytorch_model\.bin (has no prefix|does not hold)"):
        ptuning.load_prefix(small, tmp_path)


def test_an_old_file_and_one_with_more_than_tensors_are_read(small: Model, tmp_path: Path) -> None:
    stored = published(small) | {"global_step": 300}
    torch.save(stored, tmp_path / PUBLISHED_NAME, _use_new_zipfile_serialization=False)
    wanted = small.prefix_encoder.state_dict()
    ptuning.load_prefix(small, tmp_path)
    found = small.prefix_encoder.state_dict()
    assert all(found[name].equal(value) for name, value in wanted.items())


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
