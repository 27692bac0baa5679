"""What transformers asks of ChatGLM around its forward pass: `generate`, and checks of arguments.

The positions of a step follow from all tokens so far, not from a running count, so `generate` is
overridden here, and input whose positions cannot be derived raises a ValueError.
Shapes: B batch, S tokens of this call.
"""

import unicodedata
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import logging

from ptuning.model.cache import remember_context
from ptuning.model.config import ChatGLMConfig
from ptuning.model.loss import IGNORED_LABEL
from ptuning.model.positions import Context, mask_of_call, position_ids, visible_keys

ATTENTIONS = ("eager", "sdpa")  # what `ptuning.model.attention` computes
# generate passes these on, but they are not the model's: the tokenizers are for stop_strings and
# for an assistant with another vocabulary.
OF_GENERATE_ALONE = ("labels", "tokenizer", "assistant_tokenizer")

logger = logging.get_logger(__name__)


class ChatGLMGenerationMixin(GenerationMixin):
    """generate with the prefix computed once; beams, samples and assistants as in transformers."""

    config: ChatGLMConfig
    transformer: Any  # the ChatGLMModel
    training: bool

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Generate as transformers does; use_prefix=False leaves the prefix out.

        Every prompt must end with [gMASK] <sop>, which the tokenizer appends.
        """
        self._check_prompts(kwargs.get("input_ids") if inputs is None else inputs, kwargs)
        if self.training and self.transformer.gradient_checkpointing:
            raise ValueError(
                "the model is in training mode with gradient checkpointing, which keeps no cache; "
                "call model.eval() before generate."
            )
        settings = generation_config or self.generation_config
        chunk_size = kwargs.get("prefill_chunk_size", settings.prefill_chunk_size)
        if chunk_size:
            raise ValueError(
                f"prefill_chunk_size is {chunk_size}; ChatGLM needs its whole context in one "
                "forward pass: leave it out."
            )
        stop_strings = kwargs.get("stop_strings")
        if stop_strings:  # the vocabulary holds NFKC text only: "," for "，"
            texts = [stop_strings] if isinstance(stop_strings, str) else stop_strings
            kwargs["stop_strings"] = [unicodedata.normalize("NFKC", text) for text in texts]
        # An assistant model receives the same arguments, but has its own prefix or none.
        is_alone = kwargs.get("assistant_model") is None
        if is_alone and kwargs.get("prefix_key_values") is None:
            with torch.no_grad():
                prefix = self.transformer.prefix_for(kwargs.get("use_prefix", True))
            kwargs["prefix_key_values"] = prefix
        parent: Any = super()  # transformers types its `self` as a class only checkers know
        return parent.generate(inputs, generation_config, *args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse transformers' continuous batching, which lays several rows end to end."""
        raise ValueError(
            "generate_batch lays several rows end to end, which ChatGLM's mask cannot tell apart; "
            "call generate with the prompts as one padded batch."
        )

    def _check_prompts(self, input_ids: Tensor | None, options: dict[str, Any]) -> None:
        if input_ids is None or options.get("inputs_embeds") is not None:
            raise ValueError(
                "generate has no tokens; ChatGLM's positions come from them: give input_ids."
            )
        if options.get("position_ids") is not None:
            raise ValueError(
                "position_ids are given to generate, which derives them at every step: leave them "
                "out."
            )
        mask = options.get("attention_mask")
        if mask is not None and mask.dim() == 2 and mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask is {tuple(mask.shape)} for input_ids {tuple(input_ids.shape)}; "
                "give one column for each token."
            )
        end = self.config.eos_token_id  # None or a list in somebody's own config
        if isinstance(end, int) and bool(input_ids.eq(end).any()):
            logger.warning_once(
                "A prompt given to generate holds <eop> (id %s), the end of an answer: an answer "
                "that has ended is not continued, and one row holds one question. Give the "
                "question alone; earlier rounds are part of it (tokenizer.apply_chat_template).",
                end,
            )
        has_sop = input_ids.eq(self.config.bos_token_id).any(dim=1)
        if not bool(has_sop.all()):
            row = int((~has_sop).nonzero()[0, 0])
            raise ValueError(
                f"prompt {row} has no <sop> (id {self.config.bos_token_id}); a prompt ends with "
                "[gMASK] <sop>: encode it with this model's tokenizer and add_special_tokens=True "
                "(the default)."
            )

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
    ) -> None:
        """Leave positions to prepare_inputs_for_generation: they are no running count."""

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        """Repeat each row for its beams or samples, along with a prefix of its own."""
        prefix = model_kwargs.get("prefix_key_values")
        if prefix is not None and prefix[0].shape[1] > 1:
            model_kwargs["prefix_key_values"] = [
                layer.repeat_interleave(expand_size, dim=1) for layer in prefix
            ]
        parent: Any = super()  # a static method in some versions of transformers
        return parent._expand_inputs_for_generation(
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **model_kwargs,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Slice off the cached tokens and place the rest, from the full input_ids (B, all)."""
        num_all = input_ids.shape[1]
        num_new = num_all if next_sequence_length is None else int(next_sequence_length)
        first_new = num_all - num_new
        positions = None  # a dynamic cache remembers the context that they follow from
        is_static = past_key_values is not None and past_key_values.is_compileable
        if past_key_values is not None and (is_static or is_first_iteration or num_new > 1):
            context = self.transformer.find_context(input_ids, attention_mask)
            if is_first_iteration:
                _check_cached(past_key_values, context, first_new, num_all)
                remember_context(past_key_values, context)
            if is_static or not is_first_iteration:
                # For an assistant's candidates too: a caller that drops some of them, as peft does,
                # then gets an error instead of other answers.
                positions = position_ids(context, first_new, num_new)
            if is_static:
                num_keys = past_key_values.get_mask_sizes(num_new, 0)[0]
                attention_mask = visible_keys(
                    context.end, attention_mask, first_new, num_new, num_keys
                )
        inputs = {
            key: value
            for key, value in kwargs.items()
            if value is not None and key not in OF_GENERATE_ALONE
        }
        inputs.update(
            input_ids=input_ids[:, first_new:].contiguous(),
            position_ids=positions,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
        )
        return inputs


def _check_cached(past_key_values: Cache, context: Context, first_new: int, num_all: int) -> None:
    """Refuse a cache that ends inside the context, or not where the new tokens begin."""
    num_cached = int(past_key_values.get_seq_length())
    if num_cached and (num_cached != first_new or bool((context.end > num_cached).any())):
        raise ValueError(
            f"past_key_values holds {num_cached} tokens, which are not the whole context "
            f"of these {num_all}; every token sees the whole context, so leave "
            "past_key_values out, or give the tokens it holds and those after them."
        )


def check_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Return input_ids; refuse missing or empty ones, and those that are not (B, S)."""
    if inputs_embeds is not None or input_ids is None:
        given = "no input_ids" if inputs_embeds is None else "inputs_embeds"
        raise ValueError(
            f"forward got {given}; ChatGLM's positions come from the tokens: give input_ids (B, S)."
        )
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(
            f"input_ids is {tuple(input_ids.shape)}; give (B, S), at least one row of at least one "
            "token."
        )
    return input_ids


def refuse_unknown(given: dict[str, Any]) -> None:
    """Refuse arguments of other models' forward."""
    names = sorted(name for name, value in given.items() if value is not None)
    if names:
        raise ValueError(
            f"forward got {', '.join(names)}, which ChatGLM does not take: leave it out. (Rows "
            "end to end cannot be told apart: give (B, S) with an attention_mask.)"
        )


def check_positions(given: Tensor | None, input_ids: Tensor) -> None:
    """Refuse position_ids that are not (B or 1, 2, S)."""
    num_rows, length = input_ids.shape
    if given is not None and tuple(given.shape) not in ((1, 2, length), (num_rows, 2, length)):
        raise ValueError(
            f"position_ids is {tuple(given.shape)} for input_ids {tuple(input_ids.shape)}; ChatGLM "
            f"needs two channels, ({num_rows}, 2, {length}), or leave position_ids out: they are "
            "derived from the tokens."
        )


def check_attention(implementation: str | None) -> None:
    """Refuse transformers' other attentions, which know neither mask nor prefix."""
    if implementation not in ATTENTIONS:
        raise ValueError(
            f"attn_implementation is {implementation!r}; ChatGLM has its own attention: choose "
            "'sdpa' (the default) or 'eager'."
        )


def wants_output(config: ChatGLMConfig, name: str, given: bool | None) -> bool:
    """Return whether an optional output is asked for, by argument or config, and exists."""
    wanted = bool(getattr(config, name, False) if given is None else given)
    if wanted and name == "output_attentions" and config._attn_implementation != "eager":
        if not torch.compiler.is_compiling():  # a warning breaks a graph
            logger.warning_once(
                "output_attentions: no weights are returned, since "
                f"{config._attn_implementation!r} attention never forms them; load the "
                "model with attn_implementation='eager'."
            )
        return False
    return wanted


def warn_of_context(
    context: Context | None,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    next_labels: Tensor | None,
    model: PreTrainedModel,
) -> None:
    """Warn, once each, of rows without <sop> or an answer, and of labels on the context.

    context is None where it was not searched for: nothing to warn of. next_labels (B, S) is the
    label of each token's next token. Nothing is read from a graph that is being traced or captured,
    nor from meta and fake tensors.
    """
    if context is None:
        return
    if torch.compiler.is_compiling() or type(input_ids) is not Tensor or input_ids.is_meta:
        return
    if input_ids.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    sop_id = model.config.bos_token_id
    end = context.end[:, None]  # (B, 1)
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    if bool((end == len(columns)).any()):
        logger.warning_once(
            "A row of input_ids has no <sop> (id %s), so the whole row is context: every token "
            "sees those after it, and its log-probability or loss is meaningless. Encode "
            "question and answer as a pair: tokenizer(question, answer).",
            sop_id,
        )
    elif next_labels is not None:
        if bool(((next_labels != IGNORED_LABEL) & (columns + 1 < end)).any()):
            logger.warning_once(
                "Some labels are on context tokens (before <sop>, id %s). Context tokens see "
                "each other, so a loss on them is meaningless; set those labels to -100.",
                sop_id,
            )
    elif model.training and torch.is_grad_enabled():
        is_answer = columns > end  # (B, S)
        padding_mask = mask_of_call(attention_mask, len(columns))
        if padding_mask is not None:
            is_answer = is_answer & padding_mask.bool()
        if not bool(is_answer.any(dim=1).all()):
            logger.warning_once(
                "A training row ends with <sop> (id %s), so the whole row is context, whose "
                "tokens see each other: a loss on them is meaningless. Put the answer after "
                "<sop>: tokenizer(question, answer).",
                sop_id,
            )
