"""ChatGLM-6B from the block to the loss, with the prefix of P-Tuning v2.

Read it from top to bottom: `FeedForward` and `Layer` make one block, `ChatGLMModel` puts L blocks
between word embedding and final norm, `ChatGLMForConditionalGeneration` adds output head and loss.
See also `attention`, `positions` (2-D positions, mask, rotary embedding), `prefix_encoder`;
`generation` checks arguments, `cache` places tokens, `loss` has the loss.
Unlike GPT it has two position channels, bidirectional attention within the context, and a skip
connection that carries the normalised input, scaled by SKIP_SCALE.
Module and parameter names are the keys of published checkpoints.
Source: https://huggingface.co/THUDM/chatglm-6b/blob/8b7d335/modeling_chatglm.py
Shapes: B batch, S tokens of this call, T real tokens of all rows, N tokens whose output is read, C
columns: cached tokens and these, P prefix, L layers, H heads, D head width, E = H x D hidden, V
vocabulary. Hidden states are (B, S, E), or flat, rows end to end without padding: (1, T, E).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple

from ptuning.model.attention import Attention, LayerInputs
from ptuning.model.cache import (
    ChatGLMCache,
    is_filled,
    place_tokens,
    refuse_filled,
)
from ptuning.model.checkpoint.load import load_pretrained, prepare_for_config_
from ptuning.model.config import ChatGLMConfig
from ptuning.model.cpu.linear import Linear, gelu
from ptuning.model.cpu.varlen_attention import find_rows
from ptuning.model.generation import (
    ChatGLMGenerationMixin,
    check_attention,
    check_positions,
    check_tokens,
    refuse_unknown,
    wants_output,
    warn_of_context,
)
from ptuning.model.loss import labelled_layout, mean_loss, shift_left, without_padding
from ptuning.model.positions import (
    Context,
    FlatLayout,
    additive_mask,
    find_context,
    flatten_positions,
    flatten_rows,
    inverse_frequencies,
    is_full_mask,
    keep_needed,
    padding_layout,
    rotation_at,
    unflatten_rows,
)
from ptuning.model.prefix_encoder import PrefixEncoder, PrefixLinear, PrefixTable

# sqrt(2 * 28): the published code never passes the layer count to the block, so 28 holds at any
# depth.
SKIP_SCALE = 56**0.5


class FeedForward(nn.Module):
    """Two linear layers with the tanh form of GELU between them, under the published names."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (B, S, E) to (B, S, E)."""
        return self.dense_4h_to_h(gelu(self.dense_h_to_4h(hidden_states)))


class Layer(GradientCheckpointingLayer):
    """Attention and feed-forward; gradient checkpointing recomputes it in the backward pass."""

    dropout: float | None = None  # of both sublayers' outputs, in training

    def __init__(self, config: ChatGLMConfig, layer_index: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = Attention(config, layer_index)
        self.post_attention_layernorm = nn.LayerNorm(
            config.hidden_size, eps=config.layernorm_epsilon
        )
        self.mlp = FeedForward(config)

    def forward(
        self,
        hidden_states: Tensor,
        shared: LayerInputs,
        prefix: Tensor | None,
        past_key_values: Cache | None = None,
        only_needed: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the next hidden states (B, S, E) and the attention weights, None unless eager.

        Flat hidden states are (1, T, E); only_needed keeps the N that the layout needs, if it says.
        """
        normalised = self.input_layernorm(hidden_states)
        attended, weights = self.attention(
            normalised, shared, prefix, past_key_values, only_needed=only_needed
        )
        if only_needed and shared.layout is not None:
            normalised = keep_needed(normalised, shared.layout)  # (1, N, E)
        hidden_states = torch.add(self._drop(attended), normalised, alpha=SKIP_SCALE)
        normalised = self.post_attention_layernorm(hidden_states)
        return torch.add(self._drop(self.mlp(normalised)), normalised, alpha=SKIP_SCALE), weights

    def _drop(self, output: Tensor) -> Tensor:
        """Apply dropout to a sublayer's output in training.

        Unlike in functional.dropout the probability is an operand, so that the layers of a compiled
        model share one graph, and the mask has one byte an entry on a CPU too.
        """
        if not self.training or self.dropout is None:
            return output
        keep = torch.rand_like(output, dtype=torch.float32) >= self.dropout
        return output * keep / (1 - self.dropout)


def layer_dropouts(num_layers: int, top: float) -> list[float]:
    """Return each layer's dropout: it rises linearly from 0 at the bottom.

    Source: LIMA, section 3, https://arxiv.org/abs/2305.11206

    >>> layer_dropouts(3, 0.2)
    [0.0, 0.1, 0.2]
    """
    return [top * index / max(num_layers - 1, 1) for index in range(num_layers)]


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
        """Initialise one module: the prefix as published, others N(0, initializer_range)."""
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
    """Word embedding, L layers and the final norm; carries the prefix encoder if there is one."""

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
        layout: FlatLayout | None = None,
        next_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the hidden states (B, S, E) of input_ids (B, S), or with a layout (1, N, E).

        Args:
            attention_mask: (B, cached + S) of 0/1 marking padding on either side, or a full bool
                mask (B, 1, S, C).
            position_ids: (B, 2, S), in place of the derived ones.
            use_prefix: False leaves the prefix out of this call.
            prefix_key_values: L tensors (2, 1 or B, H, P, D), in place of the model's own prefix.
            output_hidden_states: also return the L inputs of the layers and the final output.
            layout: only its needed tokens are returned; without one, padding may return zeros.
            next_labels: (B, S) each token's next token's label, only looked at for a warning.
        """
        input_ids = check_tokens(input_ids, inputs_embeds)
        refuse_unknown(kwargs)
        check_attention(self.config._attn_implementation)
        check_positions(position_ids, input_ids)
        if self.training and self.gradient_checkpointing:
            refuse_filled(past_key_values)
        if use_cache is None:
            use_cache = self.config.use_cache
        if self.training:
            use_cache = False  # nothing is generated while training
        if use_cache and past_key_values is None:
            past_key_values = ChatGLMCache()
        wants_states = wants_output(self.config, "output_hidden_states", output_hidden_states)
        wants_attentions = wants_output(self.config, "output_attentions", output_attentions)

        flat = None  # the layout of the hidden states while they are flat
        if not (wants_states or is_filled(past_key_values) or is_full_mask(attention_mask)):
            flat = padding_layout(input_ids, attention_mask) if layout is None else layout
        positions, visible, found = place_tokens(
            input_ids, attention_mask, position_ids, past_key_values, self.find_context
        )
        if position_ids is None and (layout is None or next_labels is not None):
            warn_of_context(found, input_ids, attention_mask, next_labels, self)
        prefix = self.prefix_for(use_prefix, prefix_key_values)
        shared = self._layer_inputs(
            positions, visible, prefix, flat, has_cache=past_key_values is not None
        )

        hidden_states = self.word_embeddings(input_ids)  # (B, S, E)
        if flat is not None:
            hidden_states = flatten_rows(hidden_states, flat)  # (1, T, E)
        all_hidden_states, all_weights = [], []
        layers = self.layers[: self.config.num_layers]  # fewer in an assistant with an early exit
        for index, layer in enumerate(layers):
            all_hidden_states.append(hidden_states)
            hidden_states, weights = layer(
                hidden_states,
                shared,
                None if prefix is None else prefix[index],
                past_key_values=past_key_values,
                only_needed=index == len(layers) - 1,
            )
            all_weights.append(weights)
        hidden_states = self.final_layernorm(hidden_states)
        all_hidden_states.append(hidden_states)
        if flat is not None and layout is None:
            hidden_states = unflatten_rows(hidden_states, flat)  # (B, S, E)
        elif flat is None and layout is not None:
            hidden_states = flatten_rows(hidden_states, layout, only_needed=True)  # (1, N, E)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(all_hidden_states) if wants_states else None,
            attentions=tuple(all_weights) if wants_attentions else None,
        )

    def find_context(self, input_ids: Tensor, attention_mask: Tensor | None) -> Context:
        """Find each row's context by this model's token ids."""
        return find_context(
            input_ids,
            attention_mask,
            bos_token_id=self.config.bos_token_id,
            mask_token_id=self.config.mask_token_id,
            gmask_token_id=self.config.gmask_token_id,
        )

    def prefix_for(
        self, use_prefix: bool, prefix_key_values: Sequence[Tensor] | None = None
    ) -> Sequence[Tensor] | None:
        """Return this call's prefix, L tensors (2, 1 or B, H, P, D), or None."""
        if not use_prefix:
            return None
        if prefix_key_values is not None:
            num_heads, head_dim = self.config.num_attention_heads, self.config.head_dim
            shape = tuple(prefix_key_values[0].shape)
            if len(prefix_key_values) != len(self.layers) or shape[2::2] != (num_heads, head_dim):
                raise ValueError(
                    f"prefix_key_values has {len(prefix_key_values)} layers of {shape}; this model "
                    f"needs {len(self.layers)} of (2, 1 or B, {num_heads}, P, {head_dim}): compute "
                    "it with this model's prefix_for(True)."
                )
        if prefix_key_values is not None or self.prefix_encoder is None:
            return prefix_key_values
        # The norms keep the model's floating type where other weights are quantised.
        return self.prefix_encoder(self.final_layernorm.weight.dtype)

    def _layer_inputs(
        self,
        positions: Tensor,
        visible: Tensor | None,
        prefix: Sequence[Tensor] | None,
        flat: FlatLayout | None,
        *,
        has_cache: bool,
    ) -> LayerInputs:
        """Return what the layers share; every token sees the prefix."""
        dropout = 0.0
        if self.training and self.prefix_encoder is not None:
            dropout = self.prefix_encoder.dropout
        dtype = self.final_layernorm.weight.dtype
        prefix_length = 0 if prefix is None else prefix[0].shape[3]
        if flat is not None and visible is not None and not has_cache and self.uses_varlen():
            rotation = rotation_at(positions, self.inverse_frequencies)
            rows = find_rows(
                flat,
                additive_mask(visible, dtype),
                rotation,
                num_heads=self.config.num_attention_heads,
                prefix_length=prefix_length,
            )
            return LayerInputs(rotation, None, dropout, flat, rows)
        if flat is not None:
            positions = flatten_positions(positions, flat)  # (1, 2, T)
        rotation = rotation_at(positions, self.inverse_frequencies)
        if visible is not None and prefix_length:
            visible = functional.pad(visible, (prefix_length, 0), value=True)  # (B, 1, S, P + C)
        mask = None if visible is None else additive_mask(visible, dtype)
        return LayerInputs(rotation, mask, dropout, flat)

    def uses_varlen(self) -> bool:
        """Return whether flat rows are attended without a grid: on a CPU, unless eager."""
        on_cpu = self.inverse_frequencies.device.type == "cpu"
        return on_cpu and self.config._attn_implementation != "eager"

    def new_prefix_encoder(self, prefix_length: int, *, project: bool) -> PrefixEncoder:
        """Build a prefix encoder of this model's sizes without attaching it."""
        return PrefixEncoder(
            prefix_length=prefix_length,
            num_layers=self.config.num_layers,
            num_heads=self.config.num_attention_heads,
            head_dim=self.config.head_dim,
            project=project,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ChatGLMModel":
        """Move or cast, but keep the frequencies float32: bfloat16 would change the angles."""
        super()._apply(fn, recurse)
        exact = inverse_frequencies(self.config.head_dim)
        self.inverse_frequencies = exact.to(self.inverse_frequencies.device)
        return self

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embedding (V, E)."""
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embedding."""
        self.word_embeddings = value


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, ChatGLMGenerationMixin):
    """ChatGLM with its output head: the published class."""

    accepts_loss_kwargs = True
    _tied_weights_keys = {  # noqa: RUF012
        "lm_head.weight": "transformer.word_embeddings.weight"
    }

    loss_chunk_tokens: int | None = None  # tokens per chunk of the loss; None: by device
    label_smoothing: float = 0.0  # of the training loss

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head: nn.Module = Linear(config.hidden_size, config.vocab_size, bias=False)
        prepare_for_config_(self)
        self.post_init()

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
        """Return logits (B, S, V); with labels the loss as well, and in training only the loss.

        The arguments are ChatGLMModel.forward's, except layout and next_labels, and:

        Args:
            labels: (B, S), -100 where there is none. The loss is the mean over labels whose
                preceding token is not padding, or their sum divided by num_items_in_batch.
            shift_labels: in place of labels: the next token's label at each position.
            logits_to_keep: keep the last n positions (0: all), or those in a tensor of indices.
            tokens, needed, targets: (T,), (N,), (N,), what labels and attention_mask say, as
                indices (from `ptuning.data.tokenization.pad_right`). With labels and all three only
                the loss is computed, and the host never waits for the device.
        """
        input_ids = check_tokens(input_ids, inputs_embeds)
        next_labels = shift_left(input_ids, labels, kwargs.pop("shift_labels", None))
        refuse_unknown(kwargs)
        wants_logits = next_labels is None or not self.training
        layout = labels_to_check = None
        if next_labels is None or torch.compiler.is_compiling():
            targets = None  # no shape of a graph may depend on the labels
        elif tokens is not None and needed is not None and targets is not None:
            layout = FlatLayout((input_ids.shape[0], input_ids.shape[1]), tokens, needed)
            wants_logits = False
        else:
            layout, targets = labelled_layout(next_labels, attention_mask)
            labels_to_check = next_labels

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
            layout=None if wants_logits else layout,
            next_labels=labels_to_check,
            return_dict=True,
        )
        hidden_states = outputs.last_hidden_state  # (B, S, E), or (1, N, E) without logits
        logits = loss = None
        if next_labels is not None:
            answers = hidden_states
            may_ignore = targets is None
            if targets is None:
                targets = without_padding(next_labels, attention_mask).flatten()  # (B * S,)
            elif layout is not None and wants_logits:
                answers = flatten_rows(hidden_states, layout, only_needed=True)  # (1, N, E)
            loss = mean_loss(
                answers.flatten(0, 1),  # (N, E)
                self.lm_head,
                targets,
                num_items_in_batch,
                chunk_tokens=self.loss_chunk_tokens,
                label_smoothing=self.label_smoothing if self.training else 0.0,
                may_ignore=may_ignore,
            )
        if wants_logits:
            kept = (
                slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            )
            logits = self.lm_head(hidden_states[:, kept])  # (B, S, V)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @property
    def prefix_encoder(self) -> PrefixEncoder | None:
        """The attached prefix encoder, or None."""
        return self.transformer.prefix_encoder

    def set_layer_dropout(self, top: float) -> None:
        """Set the residual dropout of training, which rises from 0 to top; not part of config."""
        layers = self.transformer.layers
        for layer, probability in zip(layers, layer_dropouts(len(layers), top), strict=True):
            layer.dropout = probability or None

    def add_prefix(self, prefix_length: int, *, project: bool = False) -> PrefixEncoder:
        """Attach a new prefix, its table drawn from N(0, 1), in place of an attached one."""
        encoder = self.transformer.new_prefix_encoder(prefix_length, project=project)
        return self.attach_prefix(encoder)

    def attach_prefix(self, encoder: PrefixEncoder) -> PrefixEncoder:
        """Attach a prefix encoder in float32, on this model's device, and record it in config."""
        self.transformer.prefix_encoder = encoder.to(device=self.device, dtype=torch.float32)
        self.config.pre_seq_len = encoder.prefix_length
        self.config.prefix_projection = encoder.project
        return encoder

    def remove_prefix(self) -> None:
        """Detach the prefix; the base stays as it is."""
        self.transformer.prefix_encoder = None
        self.config.pre_seq_len = None
        self.config.prefix_projection = False

    def freeze_base(self) -> None:
        """Train the prefix only."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("prefix_encoder." in name)

    def base_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield names and parameters, without the prefix's."""
        for name, parameter in self.named_parameters():
            if "prefix_encoder." not in name:
                yield name, parameter

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


# transformers' label smoothing shifts the labels only for a class named here.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[ChatGLMConfig.model_type] = (
    ChatGLMForConditionalGeneration.__name__
)
