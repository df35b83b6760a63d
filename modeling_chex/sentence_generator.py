"""Sentence generator: GPT-2 conditioned on region features through a key/value prefix (ChEX, ECCV 2024)."""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.modeling_utils import PreTrainedModel
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_chex import ChexGeneratorConfig


class ChexPrefixProjection(nn.Module):
    """Maps a feature to the keys and values of `prefix_length` positions in every layer of the language model."""

    def __init__(self, config: ChexGeneratorConfig):
        super().__init__()
        self.config = config
        self.fc1 = nn.Linear(config.feature_size, config.prefix_hidden_size)
        self.activation_fn = ACT2FN[config.prefix_act]
        self.fc2 = nn.Linear(
            config.prefix_hidden_size, config.prefix_length * config.num_hidden_layers * 2 * config.hidden_size
        )
        self.dropout = nn.Dropout(config.prefix_dropout)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """
        Args:
            features (`torch.Tensor` of shape `(S, L, D)`): L conditioning features for each of S sentences.

        Returns:
            `torch.Tensor` of shape `(layers, 2, S, heads, L * prefix_length, head_dim)`: keys and values.
        """
        config = self.config
        prefix = self.dropout(self.fc2(self.dropout(self.activation_fn(self.fc1(features)))))
        prefix = prefix.view(
            features.shape[0],
            features.shape[1] * config.prefix_length,
            config.num_hidden_layers,
            2,
            config.num_attention_heads,
            config.hidden_size // config.num_attention_heads,
        )
        return prefix.permute(2, 3, 0, 4, 1, 5)


class ChexPrefixLayer(DynamicLayer):
    """Keys and values that are read and never written, so that a checkpointed block can be computed a second time."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


def insert_prefix(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """
    Hook before a block of GPT-2, whose model hands no cache to blocks that are checkpointed: their cache becomes the
    keyword `prefix`.
    """
    prefix = kwargs.pop("prefix", None)
    return (args if prefix is None else (args[0], prefix, *args[2:])), kwargs


class ChexSentenceGenerator(PreTrainedModel, GenerationMixin):
    r"""
    Prefix projection and GPT-2. It is the part `sentence_generator` of [`ChexModel`], and a model of its own for
    generator pre-training:

    ```python
    >>> generator = ChexSentenceGenerator(ChexGeneratorConfig())
    >>> token_ids = generator.generate(features=region_features, num_beams=3)  # (S, D) -> (S, length)
    ```
    """

    config: ChexGeneratorConfig
    base_model_prefix = "language_model"
    main_input_name = "input_ids"
    input_modalities = ("text",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["GPT2Block"]
    _skip_keys_device_placement = ["past_key_values", "prefix"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _tied_weights_keys = {"language_model.lm_head.weight": "language_model.transformer.wte.weight"}

    def __init__(self, config: ChexGeneratorConfig):
        super().__init__(config)
        self.prefix_projection = ChexPrefixProjection(config)
        self.language_model = GPT2LMHeadModel(config)
        self.language_model.loss_type = "ForCausalLM"
        for block in self.language_model.transformer.h:
            block.register_forward_pre_hook(insert_prefix, with_kwargs=True)
        self.post_init()
        if self.generation_config.max_length is None:
            self.generation_config.max_length = config.max_generation_length

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # see `ChexPreTrainedModel`

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Linear):  # the prefix projection; GPT-2 initialises itself
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        else:
            super()._init_weights(module)

    def _set_gradient_checkpointing(self, *args, **kwargs):
        super()._set_gradient_checkpointing(*args, **kwargs)
        self.avoid_reentrant_checkpoints()

    def avoid_reentrant_checkpoints(self):
        """Reentrant checkpoints give gradients to positional tensors only, and the prefix is none."""
        for block in self.language_model.transformer.h:
            if hasattr(block, "_gradient_checkpointing_func"):
                block._gradient_checkpointing_func = partial(block._gradient_checkpointing_func, use_reentrant=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.language_model.set_output_embeddings(new_embeddings)

    def prefix_length(self, features: torch.Tensor) -> int:
        """Prefix positions of features (S, D) or (S, L, D)."""
        return self.config.prefix_length * (features.shape[1] if features.ndim == 3 else 1)

    def prefix_cache(self, features: torch.Tensor, cache: Cache | None = None) -> Cache:
        """
        Fills an empty cache, by default a new `DynamicCache`, with the prefix of the features (S, D) or (S, L, D), and
        notes its length as `cache.prefix_length`, since the prefix does not count in token positions. The language
        model appends its own keys and values, so every call needs a cache of its own.
        """
        cache = cache if cache is not None else DynamicCache(config=self.config)
        cache.prefix_length = self.prefix_length(features)
        if features.ndim == 2:
            features = features[:, None]
        prefix = self.prefix_projection(features.to(self.dtype))
        for layer, (key, value) in enumerate(prefix):
            cache.update(key, value, layer)
        return cache

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        features: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithCrossAttentions:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(S, T)`): Start token, sentence, end token, padding.
            attention_mask (`torch.Tensor`, *optional*): 1 for valid tokens. It covers the T tokens, or the tokens in
                the cache too, or these and the prefix; what it leaves out at the front is visible. A mask of four
                dimensions is used as it is.
            position_ids (`torch.LongTensor` of shape `(S, T)`, *optional*): By default the tokens are counted from
                `config.position_offset`; the prefix does not count.
            past_key_values (`Cache`, *optional*): Prefix and tokens seen so far.
            features (`torch.Tensor` of shape `(S, D)` or `(S, L, D)`, *optional*): Conditioning features, put into an
                empty cache as prefix. Without them the language model is unconditional.
            labels (`torch.LongTensor` of shape `(S, T)`, *optional*): Targets before shifting; -100 is ignored. See
                `target_labels`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("ChexSentenceGenerator needs either `input_ids` or `inputs_embeds`.")
        if features is not None and (past_key_values is None or past_key_values.get_seq_length() == 0):
            past_key_values = self.prefix_cache(features, past_key_values)
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        prefix_length = getattr(past_key_values, "prefix_length", 0)
        tokens = input_ids if input_ids is not None else inputs_embeds
        batch_size, length = tokens.shape[:2]
        if attention_mask is None and not getattr(past_key_values, "is_compileable", False):
            # GPT-2 would warn, as the start token is its padding too.
            attention_mask = torch.ones((batch_size, past_length + length), dtype=torch.long, device=tokens.device)
        if attention_mask is not None and attention_mask.ndim == 2:
            # The mask may cover the tokens only: prefix and earlier tokens are visible.
            unmasked = past_length + length - attention_mask.shape[1]
            if unmasked > 0:
                attention_mask = torch.cat([attention_mask.new_ones((batch_size, unmasked)), attention_mask], dim=1)
            if position_ids is None:
                token_mask = attention_mask[:, prefix_length:]
                position_ids = (token_mask.long().cumsum(-1) - 1).masked_fill(token_mask == 0, 1)[:, -length:]
                position_ids = position_ids + self.config.position_offset
        elif position_ids is None:
            position_ids = torch.arange(length, device=tokens.device)[None] + past_length - prefix_length
            position_ids = position_ids + self.config.position_offset
        if self.language_model.transformer.gradient_checkpointing and self.training and prefix_length > 0:
            if past_length != prefix_length:
                raise ValueError("With gradient checkpointing the cache may hold a prefix, but no tokens.")
            attention_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
            for layer in past_key_values.layers:
                layer.__class__ = ChexPrefixLayer
            kwargs["prefix"], past_key_values, use_cache = past_key_values, None, False
        return self.language_model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    @staticmethod
    def target_labels(
        input_ids: torch.LongTensor, attention_mask: torch.Tensor, ignore_padding: bool = True
    ) -> torch.LongTensor:
        """
        Labels (S, T) for `forward`. The official code counts the padding after the end token in its mean
        (`ignore_padding=False`), which makes the loss depend on the longest sentence of the batch.
        """
        return input_ids.masked_fill(attention_mask == 0, -100) if ignore_padding else input_ids

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        features: torch.Tensor | None = None,
        **kwargs,
    ):
        r"""
        Generates one sentence for each feature; everything that `GenerationMixin.generate` offers is available.

        Args:
            inputs (`torch.Tensor`, *optional*): The features, or token ids `(S, T)` that the sentences start with, by
                default the start token alone.
            features (`torch.Tensor` of shape `(S, D)` or `(S, L, D)`, *optional*): Conditioning features. Without them
                and with token ids, the language model goes on unconditionally.
            kwargs: Generation arguments. `max_length` and `attention_mask` count the start token, but not the prefix.

        Returns:
            `torch.LongTensor` of shape `(S, length)` that starts with the start token, or a `ModelOutput` with
            `return_dict_in_generate=True`.

        Raises:
            ValueError: Neither features nor the beginning of a sentence are given.
        """
        if inputs is not None and inputs.is_floating_point():
            inputs, features = None, inputs
        if inputs is None and kwargs.keys().isdisjoint({"input_ids", "inputs_embeds"}):
            if features is None:
                raise ValueError(
                    "`generate` needs `features` of shape (sentences, feature_size) to describe, or `input_ids` to go "
                    "on from."
                )
            inputs = torch.full((features.shape[0], 1), self.config.bos_token_id, device=features.device)
            # Start and padding are the same token, so it takes a mask to tell one from the other.
            kwargs.setdefault("attention_mask", torch.ones_like(inputs))
        return super().generate(inputs, generation_config=generation_config, features=features, **kwargs)

    def adjust_generation_fn(self, *args, **kwargs):
        default = self.generation_config
        super().adjust_generation_fn(*args, **kwargs)
        loaded = self.generation_config
        if loaded._from_model_config and loaded.max_length is None and loaded.max_new_tokens is None:
            self.generation_config = default  # there was no file, and the model configuration knows no default length

    def _prepare_generation_config(self, *args, **kwargs) -> tuple[GenerationConfig, dict[str, Any]]:
        generation_config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        if generation_config.max_new_tokens is not None:  # the default is a `max_length`, and both would be a conflict
            generation_config.max_length = None
        return generation_config, model_kwargs

    def _prepare_position_ids_for_generation(self, *args, **kwargs) -> torch.LongTensor:
        return super()._prepare_position_ids_for_generation(*args, **kwargs) + self.config.position_offset

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, mode, batch_size, max_cache_length):
        if model_kwargs.get("features") is not None:
            max_cache_length += self.prefix_length(model_kwargs["features"])
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, mode, batch_size, max_cache_length
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        features: torch.Tensor | None = None,
        **kwargs,
    ) -> dict[str, Any]:
        if past_key_values is not None:
            if features is not None and past_key_values.get_seq_length() == 0:
                self.prefix_cache(features, past_key_values)  # before masks are made, which have to cover it
            elif is_first_iteration and next_sequence_length is not None:
                # going on from an earlier cache: how much of it are tokens was counted with the prefix
                next_sequence_length += getattr(past_key_values, "prefix_length", 0)
            prefix_length = getattr(past_key_values, "prefix_length", 0)
            if attention_mask is not None and attention_mask.ndim == 2 and prefix_length > 0:
                prefix_mask = attention_mask.new_ones((attention_mask.shape[0], prefix_length))
                attention_mask = torch.cat([prefix_mask, attention_mask], dim=1)
            features = None
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            features=features,
            **kwargs,
        )


__all__ = ["ChexSentenceGenerator"]
