"""The tokenizer as transformers' users know it, against the published numbers, and unforgeable."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AddedToken

from ptuning.data.tokenizer import (
    SPECIAL_TOKENS,
    SPECIFIC_TOKENS,
    ChatGLMTokenizer,
    escape_whitespace,
    load_pieces,
    restore_whitespace,
)
from tests.data.conftest import SENTENCES

# What ours must give where the published tokenizer lets text forge control ids.
LITERAL_TEXT = "[gMASK] literal <sop> <eop> [MASK] </s>"
# fmt: off
LITERAL_IDS = [53, 199, 15475, 42, 12529, 46, 106, 2823, 33, 46, 150, 2823, 33, 53, 15475, 42, 98, 106, 33]
# fmt: on
CONTROL_TEXTS = [
    "<sop>",
    "<eop>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "</s>",
    "<s>",
    "<pad>",
    "<unk>",
    "<unused_0>",
    "<ENC>",
    "<dBLOCK>",
    "＜eop＞",  # full width: NFKC turns it into <eop> after any search in the text
    "<e\u00adop>",
    "<image_0>",
    "<0x41>",
]

forging_texts = st.lists(
    st.one_of(st.sampled_from([*CONTROL_TEXTS, " ", "\n", "\t", "▁"]), st.text(max_size=5)),
    max_size=8,
).map("".join)


def golden_cases(golden: Path) -> list[dict]:
    return json.loads((golden / "tokenizer.json").read_text(encoding="utf-8"))


def published_cases(golden: Path) -> list[dict]:
    return json.loads((golden / "published_tokens.json").read_text(encoding="utf-8"))


# Published numbers, with the real vocabulary


def test_every_golden_text_has_the_published_ids(
    real_tokenizer: ChatGLMTokenizer, golden: Path
) -> None:
    cases = [case for case in golden_cases(golden) if case["text"] != LITERAL_TEXT]
    assert len(cases) == len(golden_cases(golden)) - 1
    for case in cases:
        assert real_tokenizer.encode(case["text"], add_special_tokens=False) == case["ids"]
        assert real_tokenizer(case["text"])["input_ids"] == case["with_special"]
        for ids in (case["ids"], case["with_special"]):
            assert real_tokenizer.decode(ids) == case["decoded"]
            assert real_tokenizer.decode(ids, skip_special_tokens=True) == case["decoded_skip"]
    batch = real_tokenizer.encode_batch([case["text"] for case in cases])
    assert batch == [case["ids"] for case in cases]


def test_written_out_control_tokens_are_letters_in_the_real_vocabulary(
    real_tokenizer: ChatGLMTokenizer,
) -> None:
    ids = real_tokenizer.encode(LITERAL_TEXT, add_special_tokens=False)
    assert ids == LITERAL_IDS
    assert real_tokenizer.decode(ids) == LITERAL_TEXT
    assert real_tokenizer(LITERAL_TEXT)["input_ids"] == [*LITERAL_IDS, 130001, 130004]


def test_every_published_case_has_its_ids(real_tokenizer: ChatGLMTokenizer, golden: Path) -> None:
    cases = published_cases(golden)
    for case in cases:
        kind, text, ids = case["kind"], case["text"], case["ids"]
        if kind == "encode":
            assert real_tokenizer.encode(text, add_special_tokens=False) == ids
        elif kind == "encode_prefix":
            assert real_tokenizer.encode(text, add_special_tokens=False)[: len(ids)] == ids
        elif kind in ("encode+specials", "adgen_eval_label"):
            assert real_tokenizer(text)["input_ids"] == ids
        elif kind == "encode_pair":
            pad = [3] * case.get("right_pad", 0)
            assert real_tokenizer(text[0], text[1])["input_ids"] + pad == ids
        elif kind == "adgen_train_example":
            pad = [3] * (len(ids) - ids.index(130005) - 1)
            prompt, answer = (real_tokenizer.encode(t, add_special_tokens=False) for t in text)
            made = real_tokenizer.build_inputs_with_special_tokens(prompt, answer[:62])
            assert made + pad == ids
        elif kind == "adgen_eval_input_leftpad64":
            padded = real_tokenizer(text, padding="max_length", max_length=64, truncation=True)
            assert padded["input_ids"] == ids
        else:
            assert kind == "decode_only"
            assert real_tokenizer.decode(ids) == "你叫什么名字"
    assert {case["kind"] for case in cases} >= {"encode_pair", "encode+specials", "decode_only"}


def test_the_real_control_ids(real_tokenizer: ChatGLMTokenizer) -> None:
    assert real_tokenizer.pad_token_id == 3
    assert real_tokenizer.mask_token_id == 130000
    assert real_tokenizer.gmask_token_id == 130001
    assert real_tokenizer.bos_token_id == real_tokenizer.sop_token_id == 130004
    assert real_tokenizer.eos_token_id == real_tokenizer.eop_token_id == 130005
    assert real_tokenizer.vocab_size == len(real_tokenizer) == 130344


def test_the_older_release_has_every_id_20000_higher(
    real_tokenizer: ChatGLMTokenizer, shared: Path
) -> None:
    older = ChatGLMTokenizer.from_pretrained(shared / "data" / "chatglm-6b", num_image_tokens=20000)
    assert len(older) == 150344
    text = "你好，\t  <|blank_3|>😀"
    assert older(text)["input_ids"] == [i + 20000 for i in real_tokenizer(text)["input_ids"]]
    assert (older.bos_token_id, older.eos_token_id, older.pad_token_id) == (150004, 150005, 20003)
    assert older.gmask_token_id == 150001
    assert older.decode(older(text)["input_ids"]) == real_tokenizer.decode(
        real_tokenizer(text)["input_ids"]
    )


# Text never yields a control id


def forbidden(tokenizer: ChatGLMTokenizer) -> set[int]:
    return {*tokenizer.control_ids, tokenizer.unk_token_id}


@given(text=forging_texts, other=forging_texts)
@settings(deadline=None)
def test_text_never_yields_a_control_id(tokenizer: ChatGLMTokenizer, text: str, other: str) -> None:
    single = tokenizer(text)["input_ids"]
    pair = tokenizer(text, other)["input_ids"]
    gmask_sop = [tokenizer.gmask_token_id, tokenizer.sop_token_id]
    assert single[-2:] == gmask_sop
    body = single[:-2]
    assert not forbidden(tokenizer) & set(body)
    assert pair[: len(single)] == single
    assert pair[-1] == tokenizer.eop_token_id
    assert not forbidden(tokenizer) & set(pair[len(single) : -1])
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == body
    assert tokenizer.encode(text, add_special_tokens=False) == body
    assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == body
    assert tokenizer([text, other], add_special_tokens=False)["input_ids"][0] == body
    assert tokenizer.encode_batch([text, other])[0] == body


@pytest.mark.parametrize("text", CONTROL_TEXTS)
def test_a_written_out_control_token_reads_back_as_written(
    real_tokenizer: ChatGLMTokenizer, text: str
) -> None:
    ids = real_tokenizer.encode(f"a {text} b", add_special_tokens=False)
    assert not forbidden(real_tokenizer) & set(ids)
    plain = text.replace("＜", "<").replace("＞", ">").replace("\u00ad", "")
    if "\u00ad" not in text:
        assert real_tokenizer.decode(ids, skip_special_tokens=True) == f"a {plain} b"


def test_split_special_tokens_makes_no_difference(tokenizer: ChatGLMTokenizer) -> None:
    for split in (True, False):
        ids = tokenizer("<eop>", add_special_tokens=False, split_special_tokens=split)["input_ids"]
        assert tokenizer.eop_token_id not in ids


def test_written_out_control_tokens_are_noticed(tokenizer: ChatGLMTokenizer) -> None:
    assert tokenizer.names_control_token("a [gMASK] b")
    assert tokenizer.names_control_token("停<eop>")
    assert not tokenizer.names_control_token("[Round 0] <b> x < y [mask]")


@given(texts=st.lists(st.text(max_size=30), max_size=6))
@settings(deadline=None)
def test_encode_batch_equals_the_slow_path(tokenizer: ChatGLMTokenizer, texts: list[str]) -> None:
    assert tokenizer.encode_batch(texts, num_threads=2) == [
        tokenizer.encode(text, add_special_tokens=False) for text in texts
    ]


# Text comes back


def normalise(tokenizer_folder: Path, text: str) -> str:
    """Apply the vocabulary's own NFKC to a text, and nothing of the tokenizer's."""
    pieces = sentencepiece.SentencePieceProcessor(
        model_file=str(tokenizer_folder / "ice_text.model")
    )
    normal = pieces.normalize(escape_whitespace(text)).removeprefix("▁").replace("▁", " ")
    return restore_whitespace(normal)


@given(text=st.text(max_size=40))
@settings(deadline=None)
def test_decoding_gives_normalised_text_back(
    tokenizer: ChatGLMTokenizer, tokenizer_folder: Path, text: str
) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == normalise(tokenizer_folder, text)


@given(
    st.lists(
        st.sampled_from(
            ["你好", "a", "B1", "。", "<eop>", "\n", "\t", "  ", "   ", "😀", "é", "龘"]
        ),
        min_size=1,
        max_size=20,
    )
)
@settings(deadline=None)
def test_ordinary_text_comes_back_exactly(tokenizer: ChatGLMTokenizer, parts: list[str]) -> None:
    text = "x" + "".join(parts) + "x"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decoding_drops_padding_and_control_tokens(tokenizer: ChatGLMTokenizer) -> None:
    batch = tokenizer(["你好", "a longer text"], padding=True, return_tensors="pt")
    assert tokenizer.batch_decode(batch["input_ids"]) == ["你好", "a longer text"]
    assert tokenizer.decode(batch["input_ids"][1], skip_special_tokens=True) == "a longer text"
    assert tokenizer.decode(tokenizer("你好", "a b")["input_ids"]) == "你好 a b"
    assert tokenizer.decode(tokenizer.eop_token_id) == ""
    assert tokenizer.decode([]) == ""


def test_ids_without_a_piece_are_unknown(tokenizer: ChatGLMTokenizer) -> None:
    beyond = tokenizer.vocab_size + 10  # the embedding has more rows than the vocabulary
    assert tokenizer.convert_ids_to_tokens(beyond) == "<unk>"
    ids = [*tokenizer.encode("你好", add_special_tokens=False), beyond]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "你好"
    assert tokenizer.decode(ids) != "你好"


def test_a_negative_id_says_what_to_replace(tokenizer: ChatGLMTokenizer) -> None:
    with pytest.raises(ValueError, match=r"labels\[labels < 0\]"):
        tokenizer.decode([5, -100])


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\x00", "\ufffe", ""])
def test_odd_characters_do_not_stop_encoding(tokenizer: ChatGLMTokenizer, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids[-2:] == [tokenizer.gmask_token_id, tokenizer.sop_token_id]
    assert tokenizer.encode_batch([text]) == [ids[:-2]]


# What transformers' users expect


def test_a_batch_is_padded_on_the_left(tokenizer: ChatGLMTokenizer) -> None:
    batch = tokenizer(["你好", "this is a longer text"], padding=True, return_tensors="pt")
    assert sorted(batch) == ["attention_mask", "input_ids"]
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.shape == mask.shape
    assert ids.dtype == mask.dtype == torch.int64
    assert set(mask.unique().tolist()) == {0, 1}
    num_pads = int((mask[0] == 0).sum())
    assert num_pads > 0
    assert ids[0, :num_pads].tolist() == [tokenizer.pad_token_id] * num_pads
    assert mask[0].tolist() == [0] * num_pads + [1] * (ids.shape[1] - num_pads)
    assert ids[:, -1].tolist() == [tokenizer.sop_token_id] * 2


def test_single_batch_and_pair_calls_agree(tokenizer: ChatGLMTokenizer) -> None:
    single = tokenizer("你好")["input_ids"]
    assert tokenizer(["你好", "a"])["input_ids"][0] == single
    pair = tokenizer("你好", "a")["input_ids"]
    assert tokenizer([("你好", "a")])["input_ids"] == [pair]
    assert tokenizer(["你好"], ["a"])["input_ids"] == [pair]
    assert pair == [
        *single,
        *tokenizer.encode("a", add_special_tokens=False),
        tokenizer.eos_token_id,
    ]


def test_truncation_keeps_the_head_and_the_control_tokens(tokenizer: ChatGLMTokenizer) -> None:
    text = "一件白色的衬衫" * 20
    whole = tokenizer(text)["input_ids"]
    cut = tokenizer(text, truncation=True, max_length=10)["input_ids"]
    assert cut == [*whole[:8], tokenizer.gmask_token_id, tokenizer.sop_token_id]
    padded = tokenizer("a", padding="max_length", max_length=10)["input_ids"]
    assert len(padded) == 10
    assert tokenizer.model_max_length == 2048


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_goes_to_a_multiple_on_either_side(tokenizer: ChatGLMTokenizer, side: str) -> None:
    texts = ["你好", "this is a longer text"]
    batch = tokenizer(texts, padding=True, padding_side=side, pad_to_multiple_of=16)
    for text, ids, mask in zip(texts, batch["input_ids"], batch["attention_mask"], strict=True):
        row = tokenizer(text)["input_ids"]
        pads = [tokenizer.pad_token_id] * (len(ids) - len(row))
        assert len(ids) % 16 == 0
        assert ids == (pads + row if side == "left" else row + pads)
        assert [index for index, real in zip(ids, mask, strict=True) if real] == row
    padded = tokenizer.pad(
        {"input_ids": [tokenizer(text)["input_ids"] for text in texts]},
        padding_side=side,
        pad_to_multiple_of=16,
    )
    assert dict(padded) == dict(batch)


def test_a_cut_text_returns_what_was_left_out(tokenizer: ChatGLMTokenizer) -> None:
    text = "一件白色的衬衫" * 5
    ids = tokenizer.encode(text, add_special_tokens=False)
    options = {"truncation": True, "max_length": 10, "return_overflowing_tokens": True}
    made = tokenizer(text, **options)
    assert made["overflowing_tokens"] == ids[8:]
    assert made["num_truncated_tokens"] == len(ids) - 8
    assert tokenizer(text, stride=2, **options)["overflowing_tokens"] == ids[6:]


@pytest.mark.parametrize("strategy", ["only_first", "only_second", "longest_first"])
def test_a_cut_pair_keeps_its_control_tokens(tokenizer: ChatGLMTokenizer, strategy: str) -> None:
    first, second = "一件白色的衬衫" * 2, "a small test" * 2
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in (first, second)]
    length = len(ids[0]) + len(ids[1]) - 3
    made = tokenizer(first, second, truncation=strategy, max_length=length)["input_ids"]
    assert len(made) == length
    sop = made.index(tokenizer.sop_token_id)
    kept = made[: sop - 1], made[sop + 1 : -1]
    assert made == tokenizer.build_inputs_with_special_tokens(*kept)
    assert all(part == whole[: len(part)] for part, whole in zip(kept, ids, strict=True))
    if strategy != "longest_first":
        uncut = int(strategy == "only_first")
        assert kept[uncut] == ids[uncut]


def test_special_tokens_mask_marks_what_was_added(tokenizer: ChatGLMTokenizer) -> None:
    made = tokenizer("<eop>你好", "a", return_special_tokens_mask=True)
    ids, mask = made["input_ids"], made["special_tokens_mask"]
    assert [index for index, flag in zip(ids, mask, strict=True) if flag] == [
        tokenizer.gmask_token_id,
        tokenizer.sop_token_id,
        tokenizer.eop_token_id,
    ]
    assert tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True) == mask
    assert tokenizer.num_special_tokens_to_add() == 2
    assert tokenizer.num_special_tokens_to_add(pair=True) == 3


def test_vocabulary_conversions_agree(tokenizer: ChatGLMTokenizer) -> None:
    vocab = tokenizer.get_vocab()
    assert len(vocab) == len(tokenizer) == tokenizer.vocab_size
    assert sorted(vocab.values()) == list(range(len(tokenizer)))
    for name in ("<sop>", "▁", "<n>", "<0x41>"):
        assert tokenizer.convert_tokens_to_ids(name) == vocab[name]
        assert tokenizer.convert_ids_to_tokens(vocab[name]) == name
    assert tokenizer.convert_tokens_to_ids("no such piece") == tokenizer.unk_token_id
    pieces = tokenizer.tokenize("你好 world\n  a")
    assert tokenizer.convert_tokens_to_string(pieces) == "你好 world\n  a"
    ids = tokenizer("你好")["input_ids"]
    assert "<sop>" not in tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True)
    assert tokenizer.convert_ids_to_tokens(ids)[-2:] == ["[gMASK]", "<sop>"]


def test_every_control_piece_counts_as_special(tokenizer: ChatGLMTokenizer) -> None:
    assert set(tokenizer.all_special_ids) == tokenizer.control_ids | {tokenizer.unk_token_id}
    assert tokenizer.special_tokens_map["gmask_token"] == "[gMASK]"
    assert (tokenizer.mask_token, tokenizer.gmask_token) == ("[MASK]", "[gMASK]")
    assert tokenizer.convert_ids_to_tokens(tokenizer.mask_token_id) == "[MASK]"


def test_pickling_and_copying_keep_every_id(tokenizer: ChatGLMTokenizer) -> None:
    for twin in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert twin("你好 <eop>", "b")["input_ids"] == tokenizer("你好 <eop>", "b")["input_ids"]
        assert twin.gmask_token_id == tokenizer.gmask_token_id
        assert twin.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("num_image_tokens", [0, 20000])
def test_saving_and_loading_keep_every_id(
    tokenizer_folder: Path, tmp_path: Path, num_image_tokens: int
) -> None:
    made = ChatGLMTokenizer(
        tokenizer_folder / "ice_text.model", num_image_tokens=num_image_tokens, padding_side="right"
    )
    made.save_pretrained(tmp_path)
    loaded = ChatGLMTokenizer.from_pretrained(tmp_path)
    assert loaded("你好，a", "b")["input_ids"] == made("你好，a", "b")["input_ids"]
    assert loaded.num_image_tokens == num_image_tokens
    assert loaded.padding_side == "right"
    assert loaded.fingerprint == made.fingerprint
    assert loaded.special_tokens_map == made.special_tokens_map
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert saved["tokenizer_class"] == "ChatGLMTokenizer"
    assert "auto_map" not in saved
    loaded.save_pretrained(tmp_path)  # over its own files
    assert ChatGLMTokenizer.from_pretrained(tmp_path).fingerprint == made.fingerprint


def test_image_tokens_have_names_but_no_text(tokenizer_folder: Path) -> None:
    older = ChatGLMTokenizer(tokenizer_folder / "ice_text.model", num_image_tokens=20)
    assert older.convert_ids_to_tokens([0, 19]) == ["<image_0>", "<image_19>"]
    assert older.convert_tokens_to_ids(["<image_0>", "<image_19>"]) == [0, 19]
    assert older.convert_tokens_to_ids("<image_20>") == older.unk_token_id == 20
    assert min(older.encode("<image_0>", add_special_tokens=False)) >= 20
    assert len(older.get_vocab()) == len(older)
    assert older.decode([0], skip_special_tokens=True) == ""


def test_the_release_is_read_off_the_config_beside_the_vocabulary(
    tokenizer: ChatGLMTokenizer, tokenizer_folder: Path, tmp_path: Path
) -> None:
    model = (tokenizer_folder / "ice_text.model").read_bytes()
    (tmp_path / "ice_text.model").write_bytes(model)
    config = {"bos_token_id": tokenizer.sop_token_id + 20000, "model_type": "chatglm"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert ChatGLMTokenizer(tmp_path / "ice_text.model").num_image_tokens == 20000
    assert ChatGLMTokenizer(tmp_path / "ice_text.model", num_image_tokens=0).num_image_tokens == 0


def test_the_fingerprint_tells_vocabularies_and_settings_apart(
    tokenizer: ChatGLMTokenizer, tokenizer_folder: Path
) -> None:
    path = tokenizer_folder / "ice_text.model"
    variants = [
        tokenizer,
        ChatGLMTokenizer(path, num_image_tokens=20),
        ChatGLMTokenizer(path, do_lower_case=True),
        ChatGLMTokenizer(path, remove_space=True),
    ]
    assert len({variant.fingerprint for variant in variants}) == 4
    assert ChatGLMTokenizer(path).fingerprint == tokenizer.fingerprint


def test_the_published_text_settings_work(tokenizer_folder: Path) -> None:
    path = tokenizer_folder / "ice_text.model"
    plain = ChatGLMTokenizer(path)
    assert ChatGLMTokenizer(path, do_lower_case=True)("ABC") == plain("abc")
    assert ChatGLMTokenizer(path, remove_space=True)(" a\n  b ") == plain("a b")


def test_new_tokens_are_refused_and_known_ones_are_welcome(tokenizer_folder: Path) -> None:
    tokenizer = ChatGLMTokenizer(tokenizer_folder / "ice_text.model")
    assert tokenizer.add_tokens(["<eop>"]) == 0
    assert tokenizer.add_special_tokens({"pad_token": "<eop>"}) == 0
    assert tokenizer.pad_token_id == tokenizer.eop_token_id
    with pytest.raises(ValueError, match=r"cannot add '<new>'.*fixed"):
        tokenizer.add_tokens(["<new>"])
    with pytest.raises(ValueError, match="cannot add"):
        ChatGLMTokenizer(tokenizer_folder / "ice_text.model", additional_special_tokens=["<new>"])


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: setattr(tokenizer, "pad_token", "[PAD]"),
        lambda tokenizer: setattr(tokenizer, "pad_token", AddedToken("[PAD]")),
        lambda tokenizer: setattr(tokenizer, "gmask_token", "[PAD]"),
        lambda tokenizer: setattr(tokenizer, "cls_token", "[PAD]"),
        lambda tokenizer: setattr(tokenizer, "extra_special_tokens", ["<eop>", "[PAD]"]),
        lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "[PAD]"}),
        lambda tokenizer: tokenizer.add_special_tokens({"extra_special_tokens": ["[PAD]"]}),
        lambda tokenizer: tokenizer.add_special_tokens(
            {"extra_special_tokens": ["[PAD]"]}, replace_extra_special_tokens=False
        ),
        lambda tokenizer: tokenizer.add_special_tokens(
            {"bos_token": "<eop>", "pad_token": "[PAD]"}
        ),
    ],
)
def test_a_special_token_without_a_piece_is_refused_and_changes_nothing(
    tokenizer_folder: Path, change: Callable[[ChatGLMTokenizer], object]
) -> None:
    tokenizer = ChatGLMTokenizer(tokenizer_folder / "ice_text.model")
    names = tokenizer.all_special_tokens
    with pytest.raises(ValueError, match=r"cannot add '\[PAD\]'.*fixed"):
        change(tokenizer)
    assert tokenizer.all_special_tokens == names
    assert tokenizer.pad_token == "<pad>"
    assert tokenizer.bos_token == "<sop>"


@pytest.mark.parametrize("empty", ["", AddedToken("")])
def test_an_empty_special_token_is_refused(tokenizer_folder: Path, empty: str | AddedToken) -> None:
    path = tokenizer_folder / "ice_text.model"
    tokenizer = ChatGLMTokenizer(path)
    with pytest.raises(ValueError, match="cannot add ''"):
        tokenizer.pad_token = empty
    with pytest.raises(ValueError, match="cannot add ''"):
        tokenizer.add_special_tokens({"pad_token": empty})
    assert tokenizer.pad_token == "<pad>"
    with pytest.raises(ValueError, match="cannot add ''"):
        ChatGLMTokenizer(path, pad_token=empty)


@pytest.mark.parametrize("key", ["pad_token_id", "gmask_token_id", "extra_special_tokens_ids"])
def test_a_special_id_without_a_piece_is_refused(tokenizer_folder: Path, key: str) -> None:
    tokenizer = ChatGLMTokenizer(tokenizer_folder / "ice_text.model", num_image_tokens=20)
    beyond = tokenizer.vocab_size
    for unused in (beyond, 19, -1):
        with pytest.raises(ValueError, match=f"no piece has the id {unused}"):
            setattr(tokenizer, key, [unused] if key.endswith("s_ids") else unused)
    assert tokenizer.pad_token_id == 23
    assert tokenizer.extra_special_tokens == []


def test_special_tokens_can_be_set_to_pieces(tokenizer_folder: Path) -> None:
    tokenizer = ChatGLMTokenizer(tokenizer_folder / "ice_text.model")
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer.pad_token_id == tokenizer.eop_token_id
    assert tokenizer(["a", "a b"], padding=True)["input_ids"][0][0] == tokenizer.eop_token_id
    tokenizer.pad_token_id = tokenizer.unk_token_id
    assert tokenizer.pad_token == "<unk>"
    tokenizer.pad_token = None
    assert tokenizer.pad_token_id is None
    tokenizer.extra_special_tokens = ["[sMASK]"]
    assert tokenizer.extra_special_tokens == ["[sMASK]"]
    with pytest.raises(ValueError, match="non-string"):
        tokenizer.pad_token = 3


def test_every_argument_is_kept_in_init_kwargs(tokenizer_folder: Path, tmp_path: Path) -> None:
    made = ChatGLMTokenizer(
        tokenizer_folder / "ice_text.model", end_token="<s>", gmask_token="[sMASK]"
    )
    made.save_pretrained(tmp_path)
    names = {*SPECIAL_TOKENS, *SPECIFIC_TOKENS, "do_lower_case", "remove_space", "num_image_tokens"}
    for tokenizer in (made, ChatGLMTokenizer.from_pretrained(tmp_path)):
        assert names <= set(tokenizer.init_kwargs)
        assert str(tokenizer.init_kwargs["end_token"]) == tokenizer.end_token == "<s>"
        assert str(tokenizer.init_kwargs["gmask_token"]) == tokenizer.gmask_token == "[sMASK]"
    assert ChatGLMTokenizer.from_pretrained(tmp_path, end_token="</s>").end_token == "</s>"


def test_added_tokens_of_a_folder_saved_elsewhere_keep_the_pieces_ids(
    tokenizer: ChatGLMTokenizer,
    tokenizer_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "ice_text.model").write_bytes((tokenizer_folder / "ice_text.model").read_bytes())
    config = {
        "tokenizer_class": "ChatGLMTokenizer",
        "added_tokens_decoder": {
            "9999": {"content": "<sop>", "special": True},
            "9998": {"content": "<elsewhere>", "special": True},
        },
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    loaded = ChatGLMTokenizer.from_pretrained(tmp_path)
    assert loaded("<elsewhere> <sop>") == tokenizer("<elsewhere> <sop>")
    assert "<elsewhere>" in caplog.text
    assert "<sop>" not in caplog.text


def test_a_folder_without_a_vocabulary_says_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"needs the published ice_text\.model"):
        ChatGLMTokenizer.from_pretrained(tmp_path)


# The vocabulary


def test_a_file_that_is_no_model_says_what_to_fetch(tmp_path: Path) -> None:
    pointer = tmp_path / "ice_text.model"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="git-lfs pointer"):
        load_pieces(str(pointer))


def test_another_models_vocabulary_is_refused(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(tmp_path / "other"),
        vocab_size=200,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="not the vocabulary of the first ChatGLM-6B"):
        load_pieces(str(tmp_path / "other.model"))


@given(st.text(alphabet=" \n\tab#", max_size=200))
def test_whitespace_survives_both_ways(text: str) -> None:
    escaped = escape_whitespace(text)
    assert restore_whitespace(escaped) == text
    assert not set("\n\t") & set(escaped)
    assert "  " not in escaped


@pytest.mark.parametrize(
    ("blanks", "escaped"),
    [
        (1, " "),
        (2, "<|blank_2|>"),
        (80, "<|blank_80|>"),
        (81, "<|blank_80|> "),
        (100, "<|blank_80|><|blank_20|>"),
    ],
)
def test_the_longest_run_of_blanks_is_taken_first(blanks: int, escaped: str) -> None:
    assert escape_whitespace(" " * blanks) == escaped


@pytest.mark.parametrize("text", ["<|blank_1|>", "<|blank_81|>", "<|blank_1000000000|>"])
def test_a_blank_piece_that_does_not_exist_stays_as_it_is(text: str) -> None:
    assert restore_whitespace(text) == text
