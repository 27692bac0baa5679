"""The ChatGLM tokenizer: text to ids and back, and the only owner of control-token ids.

A transformers tokenizer over the published `ice_text.model`. Ids are found by the names of the
pieces, never by number. Text can name a control token (`<eop>`, `[MASK]`, ...) but never yield
its id: such words are encoded letter by letter like any others, and ids reach a sequence only
through `build_inputs_with_special_tokens`.
Source of the layout: https://huggingface.co/THUDM/chatglm-6b/blob/8b7d335/tokenization_chatglm.py
"""

import copy
import hashlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AddedToken, PreTrainedConfig, PreTrainedTokenizer
from transformers.models.auto.tokenization_auto import AutoTokenizer  # see ptuning/__init__.py

from ptuning.data.prompts import CHAT_TEMPLATE, check_contents, ends_in_answer, split_answers
from ptuning.data.vocabulary import (
    END_PIECE,
    EOP_PIECE,
    GMASK_PIECE,
    MASK_PIECE,
    PAD_PIECE,
    SOP_PIECE,
    UNKNOWN_PIECE,
    VOCABULARY_FILE,
    WELL_KNOWN_PIECES,
    control_indices,
    escape_whitespace,
    find_num_image_tokens,
    has_piece,
    load_pieces,
    restore_whitespace,
    warn_about_added_tokens,
)
from ptuning.storage import write_atomically

logger = logging.getLogger(__name__)

MAX_LENGTH = 2048  # max_sequence_length of the published config.json
PUBLISHED_PIECES = 130_344  # in ice_text.model, in both releases
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_IMAGE_TOKEN = re.compile(r"<image_(0|[1-9]\d*)>")


class ChatGLMTokenizer(PreTrainedTokenizer):
    """Tokenizer of the first ChatGLM-6B, both releases of its vocabulary.

    The class name, `ice_text.model` and the keys of `tokenizer_config.json` are published names.
    A single text becomes `ids [gMASK] <sop>`, a pair `a [gMASK] <sop> b <eop>`; batches are
    padded on the left. num_image_tokens is 0, or 20000 in the older release, whose ids are all
    that much higher; None looks it up in the config.json beside the file. Decoding returns text
    only: control tokens have none, so they disappear, and a written-out `<eop>` stays.
    """

    vocab_files_names = {"vocab_file": VOCABULARY_FILE}  # noqa: RUF012  (the base class's own form)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"
    _ends_pairs = True  # with <eop>; on the class, as older pickles have no such attribute

    def __init__(
        self,
        vocab_file: str | Path,
        do_lower_case: bool = False,
        remove_space: bool = False,
        bos_token: str | AddedToken = SOP_PIECE,
        eos_token: str | AddedToken = EOP_PIECE,
        end_token: str | AddedToken = END_PIECE,
        mask_token: str | AddedToken = MASK_PIECE,
        gmask_token: str | AddedToken = GMASK_PIECE,
        pad_token: str | AddedToken = PAD_PIECE,
        unk_token: str | AddedToken = UNKNOWN_PIECE,
        num_image_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Read the vocabulary; the other arguments are keys of tokenizer_config.json."""
        if vocab_file is None or not Path(vocab_file).is_file():
            raise ValueError(  # transformers would replace an OSError by its own words
                f"the vocabulary {vocab_file or VOCABULARY_FILE} is not there; the tokenizer's "
                f"folder needs the published {VOCABULARY_FILE} (THUDM/chatglm-6b, 2.7 MB)."
            )
        self.vocab_file = str(vocab_file)
        self.do_lower_case = do_lower_case
        self.remove_space = remove_space
        self._pieces = load_pieces(self.vocab_file)
        if num_image_tokens is None:
            num_image_tokens = find_num_image_tokens(self._pieces, Path(self.vocab_file))
        self.num_image_tokens = num_image_tokens
        self.sop_token_id = self._id_of_piece(SOP_PIECE)
        self.eop_token_id = self._id_of_piece(EOP_PIECE)
        self._gmask_id = self._id_of_piece(GMASK_PIECE)
        self.control_ids = frozenset(  # every id that text never yields: `<pad>`, `<s>`, ...
            num_image_tokens + index for index in control_indices(self._pieces)
        )
        warn_about_added_tokens(self._pieces, kwargs.pop("added_tokens_decoder", {}))
        specific = {"end_token": end_token, "gmask_token": gmask_token}
        specific.update(kwargs.pop("model_specific_special_tokens", None) or {})
        kwargs.setdefault("chat_template", CHAT_TEMPLATE)
        kwargs.setdefault("model_max_length", MAX_LENGTH)
        for key in ("auto_map", "is_local", "local_files_only"):  # say where from, not what
            kwargs.pop(key, None)
        super().__init__(
            do_lower_case=do_lower_case,
            remove_space=remove_space,
            bos_token=bos_token,
            eos_token=eos_token,
            mask_token=mask_token,
            pad_token=pad_token,
            unk_token=unk_token,
            num_image_tokens=num_image_tokens,
            end_token=specific["end_token"],
            gmask_token=specific["gmask_token"],
            model_specific_special_tokens=specific,
            **kwargs,
        )
        logger.debug("ChatGLM vocabulary: %s", self.release)

    # Facts about the vocabulary

    @property
    def release(self) -> str:
        """Say in words which of the published vocabularies this is, if it is one."""
        images, which = "none for images", "the current release"
        if self.num_image_tokens:
            images, which = f"the first {self.num_image_tokens} for images", "the older release"
        is_published = len(self._pieces) == PUBLISHED_PIECES
        return f"{self.vocab_size} ids, {images}{f' ({which})' if is_published else ''}"

    @property
    def vocab_size(self) -> int:
        """Number of ids, image tokens included; the model's embedding has unused rows beyond it."""
        return self.num_image_tokens + len(self._pieces)

    @property
    def all_special_tokens(self) -> list[str]:
        """The named special tokens, then the other control pieces (`<s>`, `[sMASK]`, ...)."""
        named = super().all_special_tokens
        pieces = [self._convert_id_to_token(index) for index in sorted(self.control_ids)]
        return named + [piece for piece in pieces if piece not in named]

    @property
    def fingerprint(self) -> str:
        """A digest that two tokenizers share exactly when they give every text the same ids."""
        settings = f"{self.num_image_tokens} {self.do_lower_case} {self.remove_space}"
        model: bytes = self._pieces.serialized_model_proto()
        return hashlib.sha256(settings.encode("utf-8") + model).hexdigest()

    def names_control_token(self, text: str) -> bool:
        """Say whether a text writes out a control token, such as `<eop>`; it is encoded as text."""
        if "<" not in text and "[" not in text:  # how their names begin; most text has neither
            return False
        return any(name in text for name in WELL_KNOWN_PIECES)

    def __len__(self) -> int:
        """Number of ids: nothing is ever added to this vocabulary."""
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
        """Accept pieces that are there already; the embedding has no row for any other."""
        names = [str(token) for token in new_tokens or []]
        missing = [repr(name) for name in names if not has_piece(self._pieces, name)]
        if missing:
            raise ValueError(
                f"cannot add {', '.join(missing)}: the vocabulary of ChatGLM-6B is fixed. "
                f"Name one of its own pieces, such as {PAD_PIECE} or {EOP_PIECE}."
            )
        return 0

    def add_special_tokens(
        self, special_tokens_dict: dict[str, Any], *args: Any, **kwargs: Any
    ) -> int:
        """Check every token before the first is set, so that a refusal changes nothing."""
        for value in (special_tokens_dict or {}).values():
            self._check_special(value)
        added: int = super().add_special_tokens(special_tokens_dict, *args, **kwargs)
        return added

    def __setattr__(self, key: str, value: Any) -> None:
        """Refuse a special token, or its id, that the vocabulary does not have."""
        name = key.removesuffix("_ids").removesuffix("_id")
        if name == "extra_special_tokens" or name in self.SPECIAL_TOKENS_ATTRIBUTES:
            self._check_special(value, is_id=name != key)
        super().__setattr__(key, value)

    def _check_special(self, value: Any, *, is_id: bool = False) -> None:
        """Check one token or a list of them; other types are left to transformers' own check."""
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
        """Return the pieces of a text; written-out control tokens are ordinary letters here."""
        ids = self._encode_text(text) + (self._encode_text(pair) if pair is not None else [])
        return [self._convert_id_to_token(index) for index in ids]

    def encode_batch(
        self, texts: Sequence[str], *, num_threads: int | None = None
    ) -> list[list[int]]:
        """Return the ids of each text, no control tokens added, by SentencePiece's own threads.

        num_threads None uses every core. Equal to `tokenizer(texts, add_special_tokens=False)`,
        many times faster.
        """
        prepared = [self._prepare_text(text) for text in texts]
        if not prepared:
            return []
        threads = -1 if num_threads is None else num_threads
        encoded: list[list[int]] = self._pieces.encode(prepared, out_type=int, num_threads=threads)
        if not self.num_image_tokens:
            return encoded
        return [[index + self.num_image_tokens for index in ids] for ids in encoded]

    def _encode_text(self, text: str) -> list[int]:
        ids: list[int] = self._pieces.encode(self._prepare_text(text), out_type=int)
        return [index + self.num_image_tokens for index in ids]

    def _prepare_text(self, text: str) -> str:
        """Write whitespace as pieces; a lone surrogate becomes the replacement character."""
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
        """Return 1 for each control token of the built sequence, 0 for text."""
        if already_has_special_tokens:
            if token_ids_1 is not None:
                raise ValueError(
                    "already_has_special_tokens goes with one sequence; leave token_ids_1 out."
                )
            return [int(index in self.control_ids) for index in token_ids_0]
        mask = [0] * len(token_ids_0) + [1, 1]
        if token_ids_1 is None:
            return mask
        return mask + [0] * len(token_ids_1) + [1] * self._ends_pairs

    def _without_eop(self) -> "ChatGLMTokenizer":
        """Return a copy on the same vocabulary whose pairs are `a [gMASK] <sop> b`."""
        open_ended = copy.copy(self)
        open_ended._ends_pairs = False
        return open_ended

    # Ids to text

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join pieces to text; control tokens have none."""
        return self._decode([self._convert_token_to_id(token) for token in tokens])

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        """Return the text of the ids; ids without a piece count as `<unk>`."""
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        text_ids = []
        for token_id in ids:
            index = self._piece_index(int(token_id))
            if index == self._pieces.unk_id():
                if not skip_special_tokens:
                    text_ids.append(index)
            elif index + self.num_image_tokens not in self.control_ids:
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
        """Return the piece of an id; image tokens and the embedding's unused rows are `<unk>`."""
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

        With add_generation_prompt the last message is the question to answer. Without, a chat
        that ends in an answer becomes a training row `prompt [gMASK] <sop> answer <eop>`, and one
        that ends in a question only its text. With continue_final_message the last message is a
        partial answer, and the row stops there: `prompt [gMASK] <sop> answer`.

        The control tokens have no text. With tokenize=False a partial answer is part of the text,
        and encoding that text would make it context; encode such a chat here. As with other
        SentencePiece models, decoding the new tokens alone drops the space they begin with.

        return_assistant_tokens_mask adds `assistant_masks`: 1 on the last answer and its <eop>.
        Earlier answers are 0, because the rounds are one context, visible as a whole to each of
        its tokens: there is nothing to predict in them.

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

        def render(chat: Any, **options: Any) -> Any:
            if (chat_template or self.chat_template) == CHAT_TEMPLATE:
                check_contents(chat)
            return super(ChatGLMTokenizer, self).apply_chat_template(
                chat,
                tools=tools,
                documents=documents,
                chat_template=chat_template,
                tokenize=False,
                **options,
                **kwargs,
            )

        if not tokenize:
            return render(
                conversation,
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
            encoded = self(render(conversation, add_generation_prompt=True), **call)
        elif ends_in_answer(conversation):
            prompts, answers = split_answers(conversation)
            tokenizer = self._without_eop() if continue_final_message else self
            encoded = tokenizer(render(prompts, add_generation_prompt=True), answers, **call)
        elif continue_final_message:
            raise ValueError(
                "continue_final_message continues a partial answer, and the chat does not end in "
                "an assistant message; append one, or pass add_generation_prompt=True to start one."
            )
        else:
            encoded = self(render(conversation), add_special_tokens=False, **call)
        if return_assistant_tokens_mask:
            encoded["assistant_masks"] = encoded.pop("token_type_ids")
        return encoded if return_dict else encoded["input_ids"]


class TokenizerKey(PreTrainedConfig):
    """Stand in AutoTokenizer's table in the place of a configuration; no model has this one."""

    model_type = "chatglm-tokenizer"


def register_tokenizer() -> None:
    """Let AutoTokenizer find ChatGLMTokenizer by the name in tokenizer_config.json.

    The key is not ChatGLMConfig on purpose: for a configuration in its table transformers prefers
    the code published beside the model when trust_remote_code=True is passed, and that code fails
    on transformers >= 4.34. A folder without tokenizer_config.json is found through
    `ChatGLMConfig.tokenizer_class = "ChatGLMTokenizer"`.
    """
    AutoTokenizer.register(TokenizerKey, slow_tokenizer_class=ChatGLMTokenizer, exist_ok=True)
