"""ChatGLM-6B as a transformers model: frozen base, optional prefix, every `generate` option.

Shapes: B batch, S tokens of this call, L layers, H heads, P prefix, D head width, V vocabulary.
"""

import os
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple, logging

from ptuning.model.backbone import (
    ChatGLMModel,
    ChatGLMPreTrainedModel,
    check_tokens,
    mask_of_call,
    refuse_others,
)
from ptuning.model.cache import remember_context
from ptuning.model.checkpoint.load import load_pretrained, prepare_for_config_
from ptuning.model.config import ChatGLMConfig
from ptuning.model.cpu.linear import Linear
from ptuning.model.cpu.packing import Packing, find_packing, pack
from ptuning.model.loss import IGNORED_LABEL, summed_loss
from ptuning.model.positions import Context, position_ids, visible_keys
from ptuning.model.prefix_encoder import PrefixEncoder

# What generate has among the model's arguments, but not for the model (the tokenizers: for
# stop_strings and for an assistant with another vocabulary).
OF_GENERATE_ALONE = ("labels", "tokenizer", "assistant_tokenizer")

logger = logging.get_logger(__name__)


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, GenerationMixin):
    """ChatGLM with its output head, the published class that `chat` and `generate` use."""

    accepts_loss_kwargs = True
    _tied_weights_keys = {  # noqa: RUF012
        "lm_head.weight": "transformer.word_embeddings.weight"
    }

    loss_chunk_tokens: int | None = None  # answer tokens in the loss at a time; None: by device
    label_smoothing: float = 0.0  # of the training loss

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head: nn.Module = Linear(config.hidden_size, config.vocab_size, bias=False)
        prepare_for_config_(self)
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> "ChatGLMForConditionalGeneration":
        """Load a published or converted checkpoint, checked before any weight is read.

        The arguments are transformers' own; `ptuning.model.checkpoint.load` says what differs.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *args, **kwargs)
        return load_pretrained(
            super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs
        )

    def get_output_embeddings(self) -> nn.Module:
        """Return the output head (V, E)."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output head."""
        self.lm_head = new_embeddings

    @property
    def prefix_encoder(self) -> PrefixEncoder | None:
        """The attached prefix encoder, or None."""
        return self.transformer.prefix_encoder

    def add_prefix(self, prefix_length: int, *, project: bool = False) -> PrefixEncoder:
        """Attach a fresh float32 prefix, table N(0, 1), in place of an attached one.

        The config records it.
        """
        encoder = self.transformer.new_prefix_encoder(prefix_length, project=project)
        return self.attach_prefix(encoder)

    def attach_prefix(self, encoder: PrefixEncoder) -> PrefixEncoder:
        """Attach a prefix encoder of this model's sizes, on this model's device, in float32."""
        self.transformer.prefix_encoder = encoder.to(device=self.device, dtype=torch.float32)
        self.config.pre_seq_len = encoder.prefix_length
        self.config.prefix_projection = encoder.project
        return encoder

    def remove_prefix(self) -> None:
        """Detach the prefix; the base is untouched."""
        self.transformer.prefix_encoder = None
        self.config.pre_seq_len = None
        self.config.prefix_projection = False

    def freeze_base(self) -> None:
        """Let gradients flow to the prefix only."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("prefix_encoder." in name)

    def base_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the names and parameters that are not the prefix's."""
        return (
            (name, value)
            for name, value in self.named_parameters()
            if "prefix_encoder." not in name
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        use_prefix: bool = True,
        prefix_key_values: Sequence[Tensor] | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        inputs_embeds: Tensor | None = None,
        return_dict: bool | None = None,
        tokens: Tensor | None = None,
        needed: Tensor | None = None,
        targets: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits (B, S, V); with labels (B, S) the shifted loss as well.

        The arguments are ChatGLMModel.forward's. The loss is the mean over labels that are not -100
        and whose preceding token is not padding, or their sum over num_items_in_batch.
        shift_labels (B, S), the next token's label at each position, replace labels. While
        training, logits are None where there is a loss: only answer tokens pass the output head.
        logits_to_keep keeps the last n positions, 0 for all. tokens (T,), needed (N,) and targets
        (N,) hold what labels and attention_mask say, as indices (made by
        `ptuning.data.tokenization.pad_right`): with labels and all three, the loss is all that is
        computed, and the host never waits for the device.
        """
        input_ids = check_tokens(input_ids, inputs_embeds)
        next_labels = _next_labels(input_ids, labels, kwargs.pop("shift_labels", None))
        refuse_others(kwargs)
        wants_logits, packing = True, None
        if next_labels is not None:
            wants_logits = not self.training
            if torch.compiler.is_compiling():
                targets = None  # nothing is packed: no shape of a graph may depend on the labels
            elif tokens is not None and needed is not None and targets is not None:
                packing = Packing((input_ids.shape[0], input_ids.shape[1]), tokens, needed)
                wants_logits = False
            else:
                packing, targets = _pack_labels(next_labels, attention_mask)
                if position_ids is None:
                    self.transformer.warn_of_context(
                        input_ids, attention_mask, past_key_values, next_labels
                    )
        packs = (
            packing is not None
            and not wants_logits
            and self.transformer.packs(attention_mask, past_key_values, output_hidden_states)
        )
        outputs = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache if next_labels is None else False,
            use_prefix=use_prefix,
            prefix_key_values=prefix_key_values,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            packing=packing if packs else None,
            return_dict=True,
        )
        hidden_states = outputs.last_hidden_state  # (B, S, E), or packed (1, N, E)
        logits = loss = None
        if packing is not None and targets is not None:
            answers = hidden_states if packs else pack(hidden_states, packing, only_needed=True)
            loss = self._answer_loss(answers.squeeze(0), targets, num_items_in_batch)
        elif next_labels is not None:
            targets = _without_padding(next_labels, attention_mask).flatten()  # (B * S,)
            loss = self._answer_loss(
                hidden_states.flatten(0, 1), targets, num_items_in_batch, may_ignore=True
            )
        if wants_logits:
            kept = (
                slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            )
            logits = self.lm_head(hidden_states[:, kept])
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _answer_loss(
        self,
        hidden_states: Tensor,
        targets: Tensor,
        num_items_in_batch: int | Tensor | None,
        *,
        may_ignore: bool = False,
    ) -> Tensor:
        """Return the cross-entropy of targets (N,) given hidden_states (N, E): their mean, or
        their sum over num_items_in_batch. may_ignore: targets may be -100.
        """
        targets = targets.to(hidden_states.device)
        total = summed_loss(
            hidden_states,
            self.lm_head,
            targets,
            chunk_tokens=self.loss_chunk_tokens,
            label_smoothing=self.label_smoothing if self.training else 0.0,
            may_ignore=may_ignore,
        )
        if num_items_in_batch is None:
            return total / ((targets != IGNORED_LABEL).sum() if may_ignore else len(targets))
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Generate as transformers does, with the prefix computed once.

        use_prefix=False leaves the prefix out. Every row must end its prompt with [gMASK] <sop>,
        which the tokenizer appends; ValueError otherwise.
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
                f"prefill_chunk_size is {chunk_size}; ChatGLM reads its context in one piece, so "
                "leave it out."
            )
        stop_strings = kwargs.get("stop_strings")
        if stop_strings:  # the vocabulary knows NFKC text alone: "," for "，"
            texts = [stop_strings] if isinstance(stop_strings, str) else stop_strings
            kwargs["stop_strings"] = [unicodedata.normalize("NFKC", text) for text in texts]
        # An assistant is handed our arguments, and has a prefix of its own or none.
        is_alone = kwargs.get("assistant_model") is None
        if is_alone and kwargs.get("prefix_key_values") is None:
            with torch.no_grad():
                prefix = self.transformer.prefix_for(kwargs.get("use_prefix", True))
            kwargs["prefix_key_values"] = prefix
        parent: Any = super()  # transformers types its `self` as a class only checkers know
        return parent.generate(inputs, generation_config, *args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse transformers' continuous batching, which packs several rows into one."""
        raise ValueError(
            "generate_batch packs several rows into one, which ChatGLM's mask cannot tell apart; "
            "call generate with the prompts as one padded batch."
        )

    def _check_prompts(self, input_ids: Tensor | None, options: dict[str, Any]) -> None:
        """Refuse what `generate` cannot place; the ends of the prompts are checked last."""
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
        end = self.config.eos_token_id  # None, or several, in a config of somebody's own
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
        """Repeat every row for its beams or samples, and with it a prefix of its own."""
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
        positions = None  # a dynamic cache remembers what they follow from
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


# transformers' label smoothing shifts the labels only for a class named here.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[ChatGLMConfig.model_type] = (
    ChatGLMForConditionalGeneration.__name__
)


def _check_cached(past_key_values: Cache, context: Context, first_new: int, num_all: int) -> None:
    """Refuse a cache that ends inside the context, or elsewhere than where the new tokens begin."""
    num_cached = int(past_key_values.get_seq_length())
    if num_cached and (num_cached != first_new or bool((context.end > num_cached).any())):
        raise ValueError(
            f"past_key_values holds {num_cached} tokens, which are not the whole context "
            f"of these {num_all}; every token sees the whole context, so leave "
            "past_key_values out, or give the tokens it holds and those after them."
        )


def _next_labels(
    input_ids: Tensor, labels: Tensor | None, shift_labels: Tensor | None
) -> Tensor | None:
    """Return the label (B, S) of each token's next token, None without labels."""
    for name, given in (("labels", labels), ("shift_labels", shift_labels)):
        if given is not None and given.shape != input_ids.shape:
            raise ValueError(
                f"{name} is {tuple(given.shape)} for input_ids {tuple(input_ids.shape)}; give one "
                f"label for each token, {IGNORED_LABEL} where there is none."
            )
    if shift_labels is not None:
        return shift_labels
    if labels is None:
        return None
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)


def _without_padding(next_labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return next_labels (B, S), -100 at padding."""
    mask = mask_of_call(attention_mask, next_labels.shape[1])
    return next_labels if mask is None else next_labels.masked_fill(mask == 0, IGNORED_LABEL)


def _pack_labels(next_labels: Tensor, attention_mask: Tensor | None) -> tuple[Packing, Tensor]:
    """Return how next_labels (B, S) pack, needed where there is one, and those labels (N,)."""
    mask = mask_of_call(attention_mask, next_labels.shape[1])
    if mask is None:
        mask = torch.ones_like(next_labels)
    packing = find_packing(mask, next_labels != IGNORED_LABEL)
    return packing, next_labels.flatten()[packing.tokens][packing.needed]
