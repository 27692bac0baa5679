"""The ChatGLM tokenizer: text to ids and back, and the only owner of control-token ids.

A transformers tokenizer over the published `ice_text.model`, a SentencePiece unigram model. Its
first five pieces are `<unk>`, `<s>`, `</s>`, `<pad>`, `<n>`; then come the ordinary pieces, the
control pieces, the blanks and last the 256 bytes. Ids are looked up by the names of the pieces,
never by number. Text can name a control token (`<eop>`, `[MASK]`, ...) but never yield its id,
because SentencePiece does not match control pieces in text: ids reach a sequence only through
`build_inputs_with_special_tokens`.
Sources: https://huggingface.co/THUDM/chatglm-6b/blob/8b7d335/tokenization_chatglm.py and
https://huggingface.co/THUDM/chatglm-6b/blob/8b7d335/ice_text.model
"""

import copy
import hashlib
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import AddedToken, PreTrainedConfig, PreTrainedTokenizer
from transformers.models.auto.tokenization_auto import AutoTokenizer  # see ptuning/__init__.py

from ptuning.data.prompts import CHAT_TEMPLATE, as_chats, check_contents, end_in_answer, last_text
from ptuning.storage import write_atomically

logger = logging.getLogger(__name__)

VOCABULARY_FILE = "ice_text.model"
MAX_LENGTH = 2048  # max_sequence_length of the published config.json
MAX_BLANKS = 80  # the longest run of blanks that has a piece of its own

UNKNOWN_PIECE, PAD_PIECE, END_PIECE = "<unk>", "<pad>", "</s>"
MASK_PIECE, GMASK_PIECE, SOP_PIECE, EOP_PIECE = "[MASK]", "[gMASK]", "<sop>", "<eop>"
NEWLINE_PIECE, TAB_PIECE = "<n>", "<|tab|>"
BLANK_PIECES = tuple(f"<|blank_{count}|>" for count in range(2, MAX_BLANKS + 1))
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
SPECIAL_TOKENS = {
    "bos_token": SOP_PIECE,
    "eos_token": EOP_PIECE,
    "mask_token": MASK_PIECE,
    "pad_token": PAD_PIECE,
    "unk_token": UNKNOWN_PIECE,
}
SPECIFIC_TOKENS = {"end_token": END_PIECE, "gmask_token": GMASK_PIECE}  # not of transformers' names
WELL_KNOWN_PIECES = (*SPECIAL_TOKENS.values(), *SPECIFIC_TOKENS.values())
REQUIRED_PIECES = (*WELL_KNOWN_PIECES, NEWLINE_PIECE, TAB_PIECE, *BLANK_PIECES, *BYTE_PIECES)
# The published order: leading pieces, ordinary ones, trailing pieces, bytes
LEADING_PIECES = (UNKNOWN_PIECE, "<s>", END_PIECE, PAD_PIECE, NEWLINE_PIECE)
CONTROL_PIECES = (
    MASK_PIECE,
    GMASK_PIECE,
    "[sMASK]",
    "<unused_0>",
    SOP_PIECE,
    EOP_PIECE,
    "<ENC>",
    "<dBLOCK>",
)
TRAILING_PIECES = (*CONTROL_PIECES, TAB_PIECE, *BLANK_PIECES)

_PIECE_OF = {"\n": NEWLINE_PIECE, "\t": TAB_PIECE}
_PIECE_OF |= {" " * count: piece for count, piece in enumerate(BLANK_PIECES, 2)}
_WHITESPACE_OF = {piece: whitespace for whitespace, piece in _PIECE_OF.items()}
_WHITESPACE = re.compile(rf"\n|\t| {{2,{MAX_BLANKS}}}")
_WHITESPACE_PIECE = re.compile(r"<n>|<\|tab\|>|<\|blank_\d+\|>")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_IMAGE_TOKEN = re.compile(r"<image_(0|[1-9]\d*)>")


def escape_whitespace(text: str) -> str:
    r"""Write newlines, tabs and runs of 2 to 80 blanks as their pieces, the longest run first.

    >>> escape_whitespace("a\n\tb    c")
    'a<n><|tab|>b<|blank_4|>c'
    """
    if text.isprintable() and "  " not in text:  # a quick test that spares most texts the search
        return text
    return _WHITESPACE.sub(lambda match: _PIECE_OF[match.group()], text)


def restore_whitespace(text: str) -> str:
    r"""Undo `escape_whitespace`.

    >>> restore_whitespace("a<n><|tab|>b<|blank_4|>c")
    'a\n\tb    c'
    """
    return _WHITESPACE_PIECE.sub(lambda match: _WHITESPACE_OF.get(match[0], match[0]), text)


def load_pieces(vocab_file: str) -> SentencePieceProcessor:
    """Read a SentencePiece model and check that it is a ChatGLM-6B vocabulary."""
    try:
        pieces = SentencePieceProcessor(model_file=vocab_file)
    except RuntimeError as error:
        raise ValueError(
            f"{vocab_file} is not a SentencePiece model (a git-lfs pointer or an incomplete "
            f"download?): {error}; fetch the {VOCABULARY_FILE} of THUDM/chatglm-6b again."
        ) from error
    missing = [name for name in REQUIRED_PIECES if not _has_piece(pieces, name)]
    if missing:
        raise ValueError(
            f"{vocab_file} has no piece {', '.join(missing)}: it is not the vocabulary of the "
            f"first ChatGLM-6B; use the {VOCABULARY_FILE} of THUDM/chatglm-6b."
        )
    return pieces


def _has_piece(pieces: SentencePieceProcessor, name: str) -> bool:
    return bool(pieces.id_to_piece(pieces.piece_to_id(name)) == name)


def _find_num_image_tokens(pieces: SentencePieceProcessor, config_file: Path) -> int:
    """Return the offset of ids to pieces that a config.json implies; 0 without such a file."""
    if not config_file.is_file():
        return 0
    bos_token_id = json.loads(config_file.read_text(encoding="utf-8")).get("bos_token_id")
    if not isinstance(bos_token_id, int):
        return 0
    return max(0, bos_token_id - int(pieces.piece_to_id(SOP_PIECE)))


class ChatGLMTokenizer(PreTrainedTokenizer):
    """Tokenizer of the first ChatGLM-6B, both releases of its vocabulary.

    The class name, `ice_text.model` and the keys of `tokenizer_config.json` are published names.
    A single text becomes `ids [gMASK] <sop>`, a pair `a [gMASK] <sop> b <eop>`; batches are padded
    on the left. num_image_tokens is the offset of all ids: 0, or 20000 in the older release; None
    takes it from the config.json next to the file. Decoding returns only text: control tokens
    disappear, whereas a written-out `<eop>` stays.
    """

    vocab_files_names = {"vocab_file": VOCABULARY_FILE}  # noqa: RUF012  (the base class's own form)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"
    _ends_pairs = True  # with <eop>

    def __init__(
        self,
        vocab_file: str | Path,
        do_lower_case: bool = False,
        remove_space: bool = False,
        num_image_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Read the vocabulary; the other arguments are keys of tokenizer_config.json."""
        if vocab_file is None or not Path(vocab_file).is_file():
            raise ValueError(  # transformers would replace the message of an OSError
                f"the vocabulary {vocab_file or VOCABULARY_FILE} is not there; the tokenizer's "
                f"folder needs the published {VOCABULARY_FILE} (THUDM/chatglm-6b, 2.7 MB)."
            )
        self.vocab_file = str(vocab_file)
        self.do_lower_case = do_lower_case
        self.remove_space = remove_space
        self._pieces = load_pieces(self.vocab_file)
        if num_image_tokens is None:
            config_file = Path(self.vocab_file).with_name("config.json")
            num_image_tokens = _find_num_image_tokens(self._pieces, config_file)
        self.num_image_tokens = num_image_tokens
        self.sop_token_id = self._id_of_piece(SOP_PIECE)
        self.eop_token_id = self._id_of_piece(EOP_PIECE)
        self._gmask_id = self._id_of_piece(GMASK_PIECE)
        are_control = self._pieces.is_control(list(range(len(self._pieces))))
        self.control_ids = frozenset(  # every id that text never yields: `<pad>`, `<s>`, ...
            num_image_tokens + index for index, is_control in enumerate(are_control) if is_control
        )
        added = [str(token) for token in kwargs.pop("added_tokens_decoder", {}).values()]
        unknown = [token for token in added if not _has_piece(self._pieces, token)]
        if unknown:  # a tokenizer saved by another program
            names = ", ".join(unknown)
            logger.warning("ignored the added tokens %s: not in %s", names, VOCABULARY_FILE)
        for key in ("auto_map", "is_local", "local_files_only"):  # these say where it is from
            kwargs.pop(key, None)
        kwargs.setdefault("chat_template", CHAT_TEMPLATE)
        kwargs.setdefault("model_max_length", MAX_LENGTH)
        specific = {name: kwargs.pop(name, piece) for name, piece in SPECIFIC_TOKENS.items()}
        specific |= kwargs.pop("model_specific_special_tokens", None) or {}
        super().__init__(
            do_lower_case=do_lower_case,
            remove_space=remove_space,
            num_image_tokens=num_image_tokens,
            model_specific_special_tokens=specific,
            **SPECIAL_TOKENS | specific | kwargs,
        )

    # Facts about the vocabulary

    @property
    def vocab_size(self) -> int:
        """Number of ids, image tokens included; the model's embedding has more rows, all unused."""
        return self.num_image_tokens + len(self._pieces)

    @property
    def all_special_tokens(self) -> list[str]:
        """The named special tokens, then the other control pieces (`<s>`, `[sMASK]`, ...)."""
        named = super().all_special_tokens
        pieces = [self._convert_id_to_token(index) for index in sorted(self.control_ids)]
        return named + [piece for piece in pieces if piece not in named]

    @property
    def byte_ids(self) -> list[int]:
        """Ids of the pieces that stand for one byte of a character without its own piece."""
        return [self._id_of_piece(name) for name in BYTE_PIECES]

    @property
    def fingerprint(self) -> str:
        """A digest that two tokenizers share exactly if they give every text the same ids."""
        settings = f"{self.num_image_tokens} {self.do_lower_case} {self.remove_space}"
        model: bytes = self._pieces.serialized_model_proto()
        return hashlib.sha256(settings.encode("utf-8") + model).hexdigest()

    def names_control_token(self, text: str) -> bool:
        """Return whether a text spells out a control token, such as `<eop>`."""
        if "<" not in text and "[" not in text:  # most texts have neither
            return False
        return any(name in text for name in WELL_KNOWN_PIECES)

    def __len__(self) -> int:
        """Return the number of ids: the vocabulary is fixed."""
        return self.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Return every piece with its id."""
        vocab = {f"<image_{index}>": index for index in range(self.num_image_tokens)}
        names = self._pieces.id_to_piece(list(range(len(self._pieces))))
        vocab.update((name, self.num_image_tokens + index) for index, name in enumerate(names))
        return vocab

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Write the vocabulary file into a folder that exists; return its path."""
        name = f"{filename_prefix}-{VOCABULARY_FILE}" if filename_prefix else VOCABULARY_FILE
        path = Path(save_directory) / name
        write_atomically(path, self._pieces.serialized_model_proto())
        return (str(path),)

    def _add_tokens(
        self, new_tokens: Sequence[str | AddedToken], special_tokens: bool = False
    ) -> int:
        """Accept only tokens of the vocabulary, because the embedding has rows for no others."""
        names = [str(token) for token in new_tokens or []]
        missing = [repr(name) for name in names if not _has_piece(self._pieces, name)]
        if missing:
            raise ValueError(
                f"cannot add {', '.join(missing)}: the vocabulary of ChatGLM-6B is fixed. "
                f"Name one of its own pieces, such as {PAD_PIECE} or {EOP_PIECE}."
            )
        return 0

    def add_special_tokens(
        self, special_tokens_dict: dict[str, Any], *args: Any, **kwargs: Any
    ) -> int:
        """Check all tokens before setting the first, so that a rejected call changes nothing."""
        for value in (special_tokens_dict or {}).values():
            self._check_special(value)
        added: int = super().add_special_tokens(special_tokens_dict, *args, **kwargs)
        return added

    def __setattr__(self, key: str, value: Any) -> None:
        """Reject a special token or id that the vocabulary does not have."""
        name = key.removesuffix("_ids").removesuffix("_id")
        if name == "extra_special_tokens" or name in self.SPECIAL_TOKENS_ATTRIBUTES:
            self._check_special(value, is_id=name != key)
        super().__setattr__(key, value)

    def _check_special(self, value: Any, *, is_id: bool = False) -> None:
        """Check a token or a list of them; transformers itself rejects other types."""
        values = value if isinstance(value, (list, tuple)) else [value]
        if not is_id:
            self._add_tokens([token for token in values if isinstance(token, (str, AddedToken))])
            return
        for token_id in values:
            if token_id is not None and not self.num_image_tokens <= token_id < self.vocab_size:
                raise ValueError(
                    f"no piece has the id {token_id}; use that of a piece of the vocabulary, "
                    f"such as {self.eop_token_id} ({EOP_PIECE})."
                )

    # Text to ids

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """Return the pieces of a text, in which written-out control tokens are ordinary letters."""
        texts = [text] if pair is None else [text, pair]
        encoded = self.encode_batch(texts, num_threads=1)
        return [self._convert_id_to_token(token_id) for ids in encoded for token_id in ids]

    def encode_batch(
        self, texts: Sequence[str], *, num_threads: int | None = None
    ) -> list[list[int]]:
        """Return the ids of each text without control tokens, encoded in num_threads [all cores].

        The same as `tokenizer(texts, add_special_tokens=False)`, but many times faster.
        """
        prepared = [self._prepare_text(text) for text in texts]
        if not prepared:
            return []
        threads = -1 if num_threads is None else num_threads
        encoded: list[list[int]] = self._pieces.encode(prepared, out_type=int, num_threads=threads)
        if not self.num_image_tokens:
            return encoded
        return [[index + self.num_image_tokens for index in ids] for ids in encoded]

    def _prepare_text(self, text: str) -> str:
        """Write whitespace as pieces, and lone surrogates as the replacement character."""
        if self.remove_space:
            text = " ".join(text.split())
        if self.do_lower_case:
            text = text.lower()
        if not text.isprintable():  # neither surrogates nor line breaks are printable
            text = _LONE_SURROGATE.sub("\ufffd", text)
        return escape_whitespace(text)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Return `ids [gMASK] <sop>`, or `a [gMASK] <sop> b <eop>` for a pair."""
        context = [*token_ids_0, self._gmask_id, self.sop_token_id]
        if token_ids_1 is None:
            return context
        end = [self.eop_token_id] if self._ends_pairs else []
        return [*context, *token_ids_1, *end]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """Return 1 for each control token of the sequence, 0 for text."""
        if already_has_special_tokens:
            ids = [*token_ids_0, *(token_ids_1 or [])]
        else:
            ids = self.build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        return [int(index in self.control_ids) for index in ids]

    # Ids to text

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join pieces to a text, without control tokens."""
        return self._decode([self._convert_token_to_id(token) for token in tokens])

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        """Return the text of the ids; an id without a piece counts as `<unk>`."""
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        text_ids = []
        for token_id in ids:
            index = self._piece_index(int(token_id))
            is_skipped = skip_special_tokens and index == self._pieces.unk_id()
            if not is_skipped and index + self.num_image_tokens not in self.control_ids:
                text_ids.append(index)
        text = restore_whitespace(self._pieces.decode(text_ids))
        clean_up = self.clean_up_tokenization_spaces
        if clean_up_tokenization_spaces is not None:
            clean_up = clean_up_tokenization_spaces
        return self.clean_up_tokenization(text) if clean_up else text

    # Names and ids

    def _id_of_piece(self, name: str) -> int:
        return self.num_image_tokens + int(self._pieces.piece_to_id(name))

    def _piece_index(self, token_id: int) -> int:
        """Return the index of an id's piece; image tokens and unused rows have that of `<unk>`."""
        if token_id < 0:
            raise ValueError(
                f"{token_id} is not a token id; if it marks ignored labels, replace it first: "
                "labels[labels < 0] = tokenizer.pad_token_id."
            )
        index = token_id - self.num_image_tokens
        return index if 0 <= index < len(self._pieces) else int(self._pieces.unk_id())

    def _convert_token_to_id(self, token: str) -> int:
        image = _IMAGE_TOKEN.fullmatch(token)
        if image and int(image.group(1)) < self.num_image_tokens:
            return int(image.group(1))
        return self._id_of_piece(token)

    def _convert_id_to_token(self, index: int) -> str:
        if 0 <= index < self.num_image_tokens:
            return f"<image_{index}>"
        name: str = self._pieces.id_to_piece(self._piece_index(index))
        return name

    # Chats

    def apply_chat_template(
        self,
        conversation: list[Any],
        tools: list[Any] | None = None,
        documents: list[dict[str, str]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        sanitize_control_tokens: bool = False,
        padding: Any = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: Any = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return a chat as a prompt: `question [gMASK] <sop>`, or numbered rounds after an answer.

        With add_generation_prompt the last message is the question to answer. Without it, a chat
        that ends in an answer becomes a training row `prompt [gMASK] <sop> answer <eop>`, and one
        that ends in a question only its text. With continue_final_message the last message is a
        partial answer, and the row ends there: `prompt [gMASK] <sop> answer`.

        The control tokens have no text. With tokenize=False a partial answer is part of the text,
        and encoding that text would make it context; encode such a chat here instead. As with other
        SentencePiece models, decoding only the new tokens drops the space they begin with.

        return_assistant_tokens_mask adds `assistant_masks`: 1 on the last answer and its <eop>.
        Earlier answers are 0: rounds are one bidirectional context, in which no token is predicted.

        Text never yields control ids, so sanitize_control_tokens changes nothing.
        """
        if continue_final_message and (add_generation_prompt or return_assistant_tokens_mask):
            raise ValueError(
                "continue_final_message continues an answer, add_generation_prompt begins one and "
                "return_assistant_tokens_mask marks one that is finished; pass only one of them."
            )
        if return_assistant_tokens_mask and not (return_dict and tokenize):
            raise ValueError(
                "return_assistant_tokens_mask adds a key to the dictionary of ids; it needs "
                "return_dict=True and tokenize=True."
            )
        chats = as_chats(conversation)
        is_batch = chats is conversation

        def render(chats: list[Any], **options: Any) -> Any:
            if (chat_template or self.chat_template) == CHAT_TEMPLATE:
                check_contents(chats)
            return super(ChatGLMTokenizer, self).apply_chat_template(
                chats if is_batch else chats[0],
                tools=tools,
                documents=documents,
                chat_template=chat_template,
                tokenize=False,
                **options,
                **kwargs,
            )

        if not tokenize:
            return render(
                chats,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        if continue_final_message and continue_final_message not in (True, "content"):
            raise ValueError(
                f"continue_final_message is {continue_final_message!r}, and a message of "
                "ChatGLM-6B has nothing but its content to continue; pass True."
            )
        call: dict[str, Any] = {
            "padding": padding,
            "truncation": truncation,
            "max_length": max_length,
            "return_tensors": return_tensors,
            **(tokenizer_kwargs or {}),
        }
        needs_layout = continue_final_message or return_assistant_tokens_mask
        if needs_layout and not call.get("add_special_tokens", True):
            raise ValueError(
                "tokenizer_kwargs has add_special_tokens=False, but continue_final_message and "
                "return_assistant_tokens_mask need [gMASK] <sop> before the answer; leave it out."
            )
        if return_assistant_tokens_mask:
            call["return_token_type_ids"] = True  # 1 on the second text of a pair and its <eop>
        if add_generation_prompt:
            encoded = self(render(chats, add_generation_prompt=True), **call)
        elif end_in_answer(chats):
            answers = [last_text(chat) for chat in chats]
            prompts = render([chat[:-1] for chat in chats], add_generation_prompt=True)
            tokenizer = copy.copy(self)
            tokenizer._ends_pairs = not continue_final_message
            encoded = tokenizer(prompts, answers if is_batch else answers[0], **call)
        elif continue_final_message:
            raise ValueError(
                "continue_final_message continues a partial answer, and the chat does not end in "
                "an assistant message; append one, or pass add_generation_prompt=True to start one."
            )
        else:
            encoded = self(render(chats), add_special_tokens=False, **call)
        if return_assistant_tokens_mask:
            encoded["assistant_masks"] = encoded.pop("token_type_ids")
        return encoded if return_dict else encoded["input_ids"]


class TokenizerKey(PreTrainedConfig):
    """Placeholder for a configuration in AutoTokenizer's table; no model has this one."""

    model_type = "chatglm-tokenizer"


def register_tokenizer() -> None:
    """Let AutoTokenizer find ChatGLMTokenizer by the name in tokenizer_config.json.

    The key is not ChatGLMConfig: with trust_remote_code=True transformers would then prefer the
    code published next to the model, which fails on transformers >= 4.34. A directory without
    tokenizer_config.json is found through `ChatGLMConfig.tokenizer_class = "ChatGLMTokenizer"`.
    """
    AutoTokenizer.register(TokenizerKey, slow_tokenizer_class=ChatGLMTokenizer, exist_ok=True)
