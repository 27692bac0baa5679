"""ChatGLM without its output head: embedding, layers, final norm, and the prefix when there is one.

Module and parameter names are the published ones, so published checkpoints load as they are. The
positions and the mask of GLM are derived from the tokens (`ptuning.model.positions`).
Shapes: B batch, S tokens of this call, K key columns, P prefix, L layers, H heads, D head width,
E hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import can_return_tuple, logging

from ptuning.model.attention import LayerInputs, additive_mask
from ptuning.model.cache import ChatGLMCache, remember_context, remembered_context
from ptuning.model.config import ChatGLMConfig
from ptuning.model.cpu.packing import Packing, find_packing, pack, pack_positions, unpack
from ptuning.model.cpu.varlen_attention import find_rows
from ptuning.model.layers import Layer
from ptuning.model.loss import IGNORED_LABEL
from ptuning.model.positions import Context, find_context, position_ids, visible_keys
from ptuning.model.prefix_encoder import PrefixEncoder, PrefixLinear, PrefixTable
from ptuning.model.rotary import inverse_frequencies, rotation_at

ATTENTIONS = ("eager", "sdpa")  # what `ptuning.model.attention` computes

logger = logging.get_logger(__name__)


class ChatGLMPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of both classes below."""

    config: ChatGLMConfig
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = False
    _can_compile_fullgraph = True  # with a static cache
    # transformers declares these lists as instance attributes, so that ClassVar would be an error.
    _no_split_modules = ["Layer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["prefix_encoder"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"attention\.rotary_emb\.inv_freq"]  # noqa: RUF012
    _keys_to_ignore_on_load_missing = [r"transformer\.prefix_encoder\."]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module: prefix as published, others N(0, initializer_range)."""
        if isinstance(module, PrefixTable):
            init.normal_(module.weight)
        elif isinstance(module, PrefixLinear):
            module.reset_parameters()
        elif isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, ChatGLMModel):
            init.copy_(module.inverse_frequencies, inverse_frequencies(self.config.head_dim))


class ChatGLMModel(ChatGLMPreTrainedModel):
    """Embedding, layers and final norm; carries the prefix encoder when there is one."""

    inverse_frequencies: Tensor

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.word_embeddings: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ChatGLMModel":
        """Move or cast as asked, but leave the frequencies float32: bfloat16 would bend them."""
        super()._apply(fn, recurse)
        exact = inverse_frequencies(self.config.head_dim)
        self.inverse_frequencies = exact.to(self.inverse_frequencies.device)
        return self

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
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        use_prefix: bool = True,
        prefix_key_values: Sequence[Tensor] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        inputs_embeds: Tensor | None = None,
        return_dict: bool | None = None,
        packing: Packing | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the hidden states (B, S, E) of input_ids (B, S).

        attention_mask is (B, cached + S) of 0/1 marking padding on either side, or a ready bool
        mask (B, 1, S, K). position_ids (B, 2, S) override the derived ones. use_prefix=False leaves
        the prefix out of this call; prefix_key_values (L tensors (2, 1 or B, H, P, D)) takes the
        place of the model's own prefix. hidden_states, when asked for, are the L inputs of the
        layers and then the final output. With a packing (`packs` says where one can be taken) only
        the N needed tokens come back, (1, N, E); without, padding may come back as zeros.
        """
        input_ids = check_tokens(input_ids, inputs_embeds)
        refuse_others(kwargs)
        self._check_attention()
        if packing is None and position_ids is None:
            self.warn_of_context(input_ids, attention_mask, past_key_values)
        if self.training and self.gradient_checkpointing and is_filled(past_key_values):
            raise ValueError(
                "past_key_values is filled, as by peft's PrefixTuning, but gradient checkpointing "
                "leaves caches out; turn one of the two off: gradient_checkpointing=False."
            )
        if use_cache is None:
            use_cache = self.config.use_cache
        if self.training:
            use_cache = False  # nothing is generated while training
        if use_cache and past_key_values is None:
            past_key_values = ChatGLMCache()
        wants_hidden_states = self._wants("output_hidden_states", output_hidden_states)
        wants_attentions = self._wants("output_attentions", output_attentions)
        returns_grid = packing is None
        if packing is None and self.packs(attention_mask, past_key_values, output_hidden_states):
            packing = _packing_of_padding(input_ids, attention_mask)
        if position_ids is not None:
            _check_positions(position_ids, input_ids)
        positions, visible = self._place(input_ids, attention_mask, position_ids, past_key_values)
        prefix = self.prefix_for(use_prefix, prefix_key_values)
        shared = self._layer_inputs(
            positions,
            visible,
            prefix,
            packing,
            row_by_row=past_key_values is None and self.attends_by_rows(),
        )

        hidden_states = self.word_embeddings(input_ids)  # (B, S, E)
        if packing is not None:
            hidden_states = pack(hidden_states, packing)  # (1, T, E) until the end
        all_hidden_states, all_weights = [], []
        layers = self.layers[: self.config.num_layers]  # fewer in an assistant with an early exit
        for index, layer in enumerate(layers):
            all_hidden_states.append(hidden_states)
            layer_prefix = None if prefix is None else prefix[index]
            hidden_states, weights = layer(
                hidden_states,
                shared,
                layer_prefix,
                past_key_values=past_key_values,
                only_needed=index == len(layers) - 1,
            )
            all_weights.append(weights)
        hidden_states = self.final_layernorm(hidden_states)
        if packing is not None and returns_grid:
            hidden_states = unpack(hidden_states, packing)  # (B, S, E)
        all_hidden_states.append(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(all_hidden_states) if wants_hidden_states else None,
            attentions=tuple(all_weights) if wants_attentions else None,
        )

    def warn_of_context(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        next_labels: Tensor | None = None,
    ) -> None:
        """Warn, once each, of rows without <sop> or an answer, and of labels on the context.

        next_labels (B, S) holds the label of each token's next one. What continues a cache of this
        model is not looked at, nor what has no values: a traced graph, meta and fake tensors.
        """
        if torch.compiler.is_compiling() or type(input_ids) is not Tensor or input_ids.is_meta:
            return
        if input_ids.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        if past_key_values is not None and remembered_context(past_key_values) is not None:
            return
        num_columns = input_ids.shape[1]
        mask = mask_of_call(attention_mask, num_columns)
        if _is_ready(attention_mask) or (mask is not None and mask.shape != input_ids.shape):
            return
        end = self.find_context(input_ids, mask).end[:, None]
        columns = torch.arange(num_columns, device=input_ids.device)
        if bool((end == num_columns).any()):
            logger.warning_once(
                "A row of input_ids has no <sop> (id %s), so the whole row is context: every token "
                "sees those after it, and its log-probability or loss is meaningless. Encode "
                "question and answer as a pair: tokenizer(question, answer).",
                self.config.bos_token_id,
            )
        elif next_labels is not None:
            if bool(((next_labels != IGNORED_LABEL) & (columns + 1 < end)).any()):
                logger.warning_once(
                    "Some labels are on context tokens (before <sop>, id %s). Context tokens see "
                    "each other, so a loss on them is meaningless; set those labels to -100.",
                    self.config.bos_token_id,
                )
        elif self.training and torch.is_grad_enabled():
            is_answer = columns > end
            if mask is not None:
                is_answer = is_answer & mask.bool()
            if not bool(is_answer.any(dim=1).all()):
                logger.warning_once(
                    "A training row ends with <sop> (id %s), so the whole row is context, whose "
                    "tokens see each other: a loss on them is meaningless. Put the answer after "
                    "<sop>: tokenizer(question, answer).",
                    self.config.bos_token_id,
                )

    def packs(
        self,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        output_hidden_states: bool | None,
    ) -> bool:
        """Say whether a call with these arguments can take a packing.

        It cannot with a filled cache, a ready mask, or when all hidden states are requested.
        """
        return not (
            self._wants("output_hidden_states", output_hidden_states)
            or is_filled(past_key_values)
            or _is_ready(attention_mask)
        )

    def _wants(self, name: str, given: bool | None) -> bool:
        wanted = bool(getattr(self.config, name, False) if given is None else given)
        if wanted and name == "output_attentions" and self.config._attn_implementation != "eager":
            if not torch.compiler.is_compiling():  # a warning breaks a graph
                logger.warning_once(
                    "output_attentions: no weights are returned, since "
                    f"{self.config._attn_implementation!r} attention never forms them; load the "
                    "model with attn_implementation='eager'."
                )
            return False
        return wanted

    def _check_attention(self) -> None:
        if self.config._attn_implementation not in ATTENTIONS:
            raise ValueError(
                f"attn_implementation is {self.config._attn_implementation!r}; ChatGLM has its own "
                "attention: choose 'sdpa' (the default) or 'eager'."
            )

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
        # The norms keep the model's floating type where other weights are quantised.
        return self.prefix_encoder(self.final_layernorm.weight.dtype)

    def _layer_inputs(
        self,
        positions: Tensor,
        visible: Tensor | None,
        prefix: Sequence[Tensor] | None,
        packing: Packing | None,
        *,
        row_by_row: bool,
    ) -> LayerInputs:
        """Return what the layers share; every token sees the prefix."""
        if prefix is not None:
            self._check_prefix(prefix, num_rows=positions.shape[0])
        dropout = 0.0
        if self.training and self.prefix_encoder is not None:
            dropout = self.prefix_encoder.dropout
        dtype = self.final_layernorm.weight.dtype
        if packing is not None and visible is not None and row_by_row:
            rotation = rotation_at(positions, self.inverse_frequencies)
            rows = find_rows(
                packing,
                additive_mask(visible, dtype),
                rotation,
                num_heads=self.config.num_attention_heads,
                prefix_length=0 if prefix is None else prefix[0].shape[3],
            )
            return LayerInputs(rotation, None, dropout, packing, rows)
        if packing is not None:
            positions = pack_positions(positions, packing)  # (1, 2, T)
        rotation = rotation_at(positions, self.inverse_frequencies)
        if prefix is not None and visible is not None:
            visible = functional.pad(visible, (prefix[0].shape[3], 0), value=True)
        mask = None if visible is None else additive_mask(visible, dtype)
        return LayerInputs(rotation, mask, dropout, packing)

    def attends_by_rows(self) -> bool:
        """Say whether packed rows pass attention in groups: on a CPU, unless weights are asked."""
        on_cpu = self.inverse_frequencies.device.type == "cpu"
        return on_cpu and self.config._attn_implementation != "eager"

    def _check_prefix(self, prefix: Sequence[Tensor], *, num_rows: int) -> None:
        """Refuse prefix keys and values that another model, or another batch, was meant to get."""
        config = self.config
        if len(prefix) != len(self.layers):
            raise ValueError(
                f"prefix_key_values has {len(prefix)} layers; this model needs "
                f"{len(self.layers)}: compute it with this model's prefix_for(True)."
            )
        shape = tuple(prefix[0].shape)
        heads = (config.num_attention_heads, config.head_dim)
        if len(shape) != 5 or shape[1] not in (1, num_rows) or (shape[2], shape[4]) != heads:
            raise ValueError(
                f"prefix_key_values has layers of shape {shape}; needed is (2, 1, {heads[0]}, P, "
                f"{heads[1]}) for a prefix of P tokens, or {num_rows} in place of 1 for {num_rows} "
                "rows with one each."
            )

    def _place(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        given_positions: Tensor | None,
        past_key_values: Cache | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return positions (B, 2, S) and visible keys (B, 1, S, K), None when all are visible."""
        is_ready = _is_ready(attention_mask)
        if is_ready and given_positions is not None:
            return given_positions, attention_mask
        num_queries, past = input_ids.shape[1], 0
        num_keys = num_queries
        if past_key_values is not None:
            past = int(past_key_values.get_seq_length())  # a static cache counts in a tensor
            num_keys = past_key_values.get_mask_sizes(num_queries, 0)[0]
        mask = None if is_ready else attention_mask
        if past and mask is not None and mask.shape[1] < past + num_queries:
            raise ValueError(
                f"attention_mask has {mask.shape[1]} columns for {past} cached tokens and "
                f"{num_queries} of this call; give one column for each."
            )
        context = None
        if past == 0 or given_positions is None:
            context = self._context_of(input_ids, mask, past_key_values, past)
            if given_positions is None:
                given_positions = position_ids(context, past, num_queries)
        if is_ready:
            return given_positions, attention_mask
        if past > 0 and num_queries == 1 and mask is None and num_keys == past + 1:
            return given_positions, None
        # The second channel counts from <sop> on; what is cached is visible to every token.
        end = past + (given_positions[:, 1] == 0).sum(dim=1) if context is None else context.end
        return given_positions, visible_keys(end, mask, past, num_queries, num_keys)

    def _context_of(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        past: int,
    ) -> Context:
        """Return the rows' context, and let the cache remember it.

        Keys and values that another program cached (as peft's PrefixTuning does) are a prefix to
        complete prompts: every token sees them, and positions do not count them.
        """
        if past_key_values is None:
            return self.find_context(input_ids, attention_mask)
        num_rows, num_columns = input_ids.shape
        if past > 0:
            context = remembered_context(past_key_values)
            if context is not None and context.end.shape[0] != num_rows:
                raise ValueError(
                    f"past_key_values holds {context.end.shape[0]} row(s) for {num_rows} of "
                    "input_ids; move its rows by its own methods (reorder_cache, "
                    "batch_select_indices, batch_repeat_interleave), or give position_ids "
                    "(B, 2, S)."
                )
            if context is not None:
                return context
        if past > 0:
            attention_mask = mask_of_call(attention_mask, num_columns)
        context = self.find_context(input_ids, attention_mask)
        if past > 0:
            if bool((context.end == num_columns).any()):
                raise ValueError(
                    "past_key_values was filled by another program, and a row of input_ids has no "
                    "<sop>, so the positions of the new tokens are unknown; give position_ids "
                    "(B, 2, S)."
                )
            context = context.behind(past)
        remember_context(past_key_values, context, prefix_length=past)
        return context

    def find_context(self, input_ids: Tensor, attention_mask: Tensor | None) -> Context:
        """Find each row's context with this model's token ids."""
        return find_context(
            input_ids,
            attention_mask,
            bos_token_id=self.config.bos_token_id,
            mask_token_id=self.config.mask_token_id,
            gmask_token_id=self.config.gmask_token_id,
        )


def check_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Return input_ids; ValueError where they are missing, empty or not (B, S)."""
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


def refuse_others(given: dict[str, Any]) -> None:
    """Refuse arguments of other models' forward."""
    names = sorted(name for name, value in given.items() if value is not None)
    if names:
        raise ValueError(
            f"forward got {', '.join(names)}, which ChatGLM does not take: leave it out. (Rows "
            "packed into one row cannot be told apart: give (B, S) with an attention_mask.)"
        )


def mask_of_call(attention_mask: Tensor | None, num_columns: int) -> Tensor | None:
    """Return the columns (B, S) of this call's tokens, without those of the cache."""
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -num_columns:]


def _check_positions(given: Tensor, input_ids: Tensor) -> None:
    num_rows, length = input_ids.shape
    if given.dim() != 3 or given.shape[0] not in (1, num_rows) or given.shape[1:] != (2, length):
        raise ValueError(
            f"position_ids is {tuple(given.shape)} for input_ids {tuple(input_ids.shape)}; ChatGLM "
            f"needs two channels, ({num_rows}, 2, {length}), or leave position_ids out: they are "
            "derived from the tokens."
        )


def is_filled(past_key_values: Cache | None) -> bool:
    """Say whether a cache holds tokens, or may hold some (a static one counts on the device)."""
    if past_key_values is None:
        return False
    length = past_key_values.get_seq_length()
    return isinstance(length, Tensor) or length > 0


def _packing_of_padding(input_ids: Tensor, attention_mask: Tensor | None) -> Packing | None:
    """Return how to leave padding out; None where there is none, or a graph is being traced."""
    if attention_mask is None or attention_mask.shape != input_ids.shape:
        return None
    if torch.compiler.is_compiling():  # a shape that depends on the mask's values breaks a graph
        return None
    return None if bool(attention_mask.all()) else find_packing(attention_mask, None)


def _is_ready(attention_mask: Tensor | None) -> bool:
    """Say whether attention_mask is a finished bool (B, 1, S, K); ValueError for another kind."""
    if attention_mask is None or attention_mask.dim() == 2:
        return False
    if attention_mask.dim() != 4 or attention_mask.dtype != torch.bool:
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)} of {attention_mask.dtype}; give "
            "(B, S) with 0 at padding, or bool (B, 1, S, K) with True for visible."
        )
    return True
