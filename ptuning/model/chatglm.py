"""ChatGLM-6B as a transformers model: frozen base, optional trained prefix, every `generate` option.

Module and parameter names are the published ones, so published checkpoints load as they are. The positions and
the mask of GLM are derived from the tokens (`ptuning.model.positions`).
Shapes: B batch, S tokens of this call, K key columns, P prefix, L layers, H heads, D head width, E hidden, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from ptuning.model.attention import LayerInputs
from ptuning.model.config import ChatGLMConfig
from ptuning.model.layer import Layer
from ptuning.model.positions import Context, find_context, position_ids, visible_keys
from ptuning.model.prefix_encoder import PrefixEncoder, PrefixTable
from ptuning.model.rotary import inverse_frequencies, rotation_at

IGNORED_LABEL = -100  # torch's own ignore_index


class ChatGLMPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of both classes below."""

    config: ChatGLMConfig
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Layer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = False
    _keep_in_fp32_modules_strict = ["prefix_encoder"]
    _keys_to_ignore_on_load_unexpected = [r"attention\.rotary_emb\.inv_freq"]
    _keys_to_ignore_on_load_missing = [r"transformer\.prefix_encoder\."]

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module: prefix N(0, 1) as published, linear and embedding N(0, initializer_range)."""
        if isinstance(module, PrefixTable):
            init.normal_(module.weight)
        elif isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, ChatGLMModel):
            init.copy_(module.inverse_frequencies, inverse_frequencies(self.config.head_dim))


class ChatGLMModel(ChatGLMPreTrainedModel):
    """Embedding, layers and final norm; carries the prefix encoder when there is one."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.register_buffer(
            "inverse_frequencies", inverse_frequencies(config.head_dim), persistent=False
        )
        self.prefix_encoder: PrefixEncoder | None = None
        if config.pre_seq_len is not None:
            self.prefix_encoder = self.new_prefix_encoder(
                config.pre_seq_len, project=config.prefix_projection
            )
        self.gradient_checkpointing = False
        self.post_init()

    def new_prefix_encoder(self, prefix_length: int, *, project: bool) -> PrefixEncoder:
        """Build a prefix encoder of this model's sizes; it is not attached."""
        return PrefixEncoder(
            prefix_length=prefix_length,
            num_layers=self.config.num_layers,
            num_heads=self.config.num_attention_heads,
            head_dim=self.config.head_dim,
            project=project,
        )

    def get_input_embeddings(self) -> nn.Module:
        """Return the (V, E) word embedding."""
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embedding."""
        self.word_embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        use_prefix: bool = True,
        prefix_key_values: Sequence[Tensor] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        inputs_embeds: None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Return the hidden states (B, S, E) of input_ids (B, S).

        attention_mask is (B, cached + S) of 0/1 marking padding on either side, or a ready bool mask (B, 1, S, K).
        position_ids (B, 2, S) override the derived ones. use_prefix=False leaves the prefix out of this call;
        prefix_key_values (L tensors (2, 1 or B, H, P, D)) takes the place of the model's own prefix.
        hidden_states, when asked for, are the L inputs of the layers and then the final output.
        """
        if inputs_embeds is not None:
            raise ValueError(
                "inputs_embeds are given; ChatGLM's positions come from the tokens: give input_ids."
            )
        if use_cache is None:
            use_cache = self.config.use_cache
        if self.training:
            use_cache = False  # nothing is generated while training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        positions, visible = self._place(input_ids, attention_mask, position_ids, past_key_values)
        prefix = self.prefix_for(use_prefix, prefix_key_values)
        if prefix is not None and visible is not None:
            visible = functional.pad(
                visible, (prefix[0].shape[3], 0), value=True
            )  # everybody sees the prefix
        dropout = (
            self.prefix_encoder.dropout
            if self.training and self.prefix_encoder is not None
            else 0.0
        )
        shared = LayerInputs(rotation_at(positions, self.inverse_frequencies), visible, dropout)

        hidden_states = self.word_embeddings(input_ids)  # (B, S, E)
        all_hidden_states: list[Tensor] = []
        all_weights: list[Tensor | None] = []
        for index, layer in enumerate(self.layers):
            all_hidden_states.append(hidden_states)
            hidden_states, weights = layer(
                hidden_states,
                shared,
                None if prefix is None else prefix[index],
                past_key_values=past_key_values,
            )
            all_weights.append(weights)
        hidden_states = self.final_layernorm(hidden_states)
        all_hidden_states.append(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(all_hidden_states)
            if self._wants("output_hidden_states", output_hidden_states)
            else None,
            attentions=tuple(all_weights)
            if self._wants("output_attentions", output_attentions)
            else None,
        )

    def _wants(self, name: str, given: bool | None) -> bool:
        wanted = getattr(self.config, name, False) if given is None else given
        if wanted and name == "output_attentions" and self.config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions needs the weights, which {self.config._attn_implementation!r} attention never "
                "forms; load the model with attn_implementation='eager'."
            )
        return bool(wanted)

    def prefix_for(
        self, use_prefix: bool, prefix_key_values: Sequence[Tensor] | None = None
    ) -> Sequence[Tensor] | None:
        """Return this call's prefix, L tensors (2, 1 or B, H, P, D), or None."""
        if not use_prefix:
            return None
        if prefix_key_values is not None:
            return prefix_key_values
        if self.prefix_encoder is None:
            return None
        return self.prefix_encoder(self.word_embeddings.weight.dtype)

    def _place(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        given_positions: Tensor | None,
        past_key_values: Cache | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return positions (B, 2, S) and visible keys (B, 1, S, K), None when all are visible."""
        num_queries = input_ids.shape[1]
        num_keys, past = num_queries, cast(int | Tensor, 0)
        if past_key_values is not None:
            num_keys = past_key_values.get_mask_sizes(num_queries, 0)[0]
            past = past_key_values.get_seq_length()
        started = isinstance(past, Tensor) or past > 0
        context = None
        if not started or (isinstance(past, Tensor) and num_queries > 1):
            context = self.find_context(
                input_ids, None if _is_ready(attention_mask) else attention_mask
            )
            if past_key_values is not None:
                past_key_values.glm_context = context  # type: ignore[attr-defined]
        elif given_positions is None:
            context = getattr(past_key_values, "glm_context", None)
            if context is None or context.end.shape[0] != input_ids.shape[0]:
                raise ValueError(
                    "past_key_values is filled, but not by this model for these rows, so the 2-D positions of the "
                    "new tokens are unknown; give position_ids (B, 2, S)."
                )
        if given_positions is None:
            assert context is not None, "a context is found above whenever positions are not given"
            given_positions = position_ids(context, past, num_queries)
        if _is_ready(attention_mask):
            return given_positions, attention_mask
        if started and num_queries == 1 and attention_mask is None and not isinstance(past, Tensor):
            return given_positions, None
        # Queries behind a filled cache are all past their context: plain causal order covers it.
        end = context.end if context is not None else torch.zeros_like(input_ids[:, 0])
        return given_positions, visible_keys(end, attention_mask, past, num_queries, num_keys)

    def find_context(self, input_ids: Tensor, attention_mask: Tensor | None) -> Context:
        """Find each row's context with this model's token ids."""
        return find_context(
            input_ids,
            attention_mask,
            bos_token_id=cast(int, self.config.bos_token_id),
            mask_token_id=self.config.mask_token_id,
            gmask_token_id=self.config.gmask_token_id,
        )


def _is_ready(attention_mask: Tensor | None) -> bool:
    return attention_mask is not None and attention_mask.dim() == 4


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, GenerationMixin):
    """ChatGLM with its output head, the published class that `chat` and `generate` use."""

    accepts_loss_kwargs = True
    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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
        """Attach a fresh float32 prefix, table N(0, 1), and record it in the config; replaces an attached one."""
        encoder = self.transformer.new_prefix_encoder(prefix_length, project=project)
        return self.attach_prefix(encoder)

    def attach_prefix(self, encoder: PrefixEncoder) -> PrefixEncoder:
        """Attach a prefix encoder built for this model's sizes, on this model's device, kept in float32."""
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
        input_ids: Tensor,
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
        inputs_embeds: None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Return logits (B, S, V); with labels (B, S), the shifted loss instead and logits None.

        The arguments are ChatGLMModel.forward's. The loss is the mean over labels that are not -100, or their sum
        over num_items_in_batch. logits_to_keep keeps the last n positions, 0 for all.
        """
        outputs = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache if labels is None else False,
            use_prefix=use_prefix,
            prefix_key_values=prefix_key_values,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            inputs_embeds=inputs_embeds,
        )
        hidden_states = outputs.last_hidden_state  # (B, S, E)
        logits = loss = None
        if labels is not None:
            loss = self.answer_loss(hidden_states, labels, num_items_in_batch)
        else:
            keep = (
                slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            )
            logits = self.lm_head(hidden_states[:, keep])
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def answer_loss(
        self, hidden_states: Tensor, labels: Tensor, num_items_in_batch: int | Tensor | None = None
    ) -> Tensor:
        """Return the cross-entropy of the next tokens, with the head applied where a label is and nowhere else."""
        targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)  # (B, S), shifted
        wanted = targets != IGNORED_LABEL
        logits = self.lm_head(hidden_states[wanted]).float()  # (number of answer tokens, V)
        total = functional.cross_entropy(logits, targets[wanted].to(logits.device), reduction="sum")
        if num_items_in_batch is None:
            return total / wanted.sum()
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does, with the prefix computed once; use_prefix=False leaves it out.

        Every row must end its prompt with [gMASK] <sop>, which the tokenizer appends; ValueError otherwise.
        """
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        if input_ids is not None:
            self._check_prompts(input_ids)
        generation_config = kwargs.get("generation_config") or self.generation_config
        if kwargs.get("prefill_chunk_size", getattr(generation_config, "prefill_chunk_size", None)):
            raise ValueError(
                "prefill_chunk_size is set; ChatGLM reads its context in one piece, so leave it out."
            )
        if (
            kwargs.get("use_prefix", True)
            and kwargs.get("prefix_key_values") is None
            and self.prefix_encoder
        ):
            with torch.no_grad():
                kwargs["prefix_key_values"] = self.transformer.prefix_for(True)
        return super().generate(inputs, *args, **kwargs)

    def _check_prompts(self, input_ids: Tensor) -> None:
        has_sop = (input_ids == self.config.bos_token_id).any(dim=1)
        if not bool(has_sop.all()):
            row = int((~has_sop).nonzero()[0, 0])
            raise ValueError(
                f"prompt {row} has no <sop> (id {self.config.bos_token_id}); a prompt ends with [gMASK] <sop>: "
                "encode it with this model's tokenizer and add_special_tokens=True (the default)."
            )

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
    ) -> None:
        """Leave positions to prepare_inputs_for_generation: they are two-dimensional and not a running count."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Slice off the tokens the cache holds and give the rest their positions, from the full input_ids (B, all)."""
        num_new = input_ids.shape[1] if next_sequence_length is None else next_sequence_length
        first_new = input_ids.shape[1] - num_new
        context = self.transformer.find_context(input_ids, attention_mask)
        inputs = {
            key: value for key, value in kwargs.items() if value is not None and key != "labels"
        }
        if past_key_values is not None and past_key_values.is_compileable:
            num_keys = past_key_values.get_mask_sizes(num_new, 0)[0]
            attention_mask = visible_keys(context.end, attention_mask, first_new, num_new, num_keys)
        inputs.update(
            input_ids=input_ids[:, first_new:].contiguous(),
            position_ids=position_ids(context, first_new, num_new),
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
        )
        return inputs
