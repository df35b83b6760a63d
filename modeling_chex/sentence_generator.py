"""Sentence generator: GPT-2 conditioned on region features through a key/value prefix (ChEX, ECCV 2024)."""

import copy

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationConfig, GenerationMixin
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
    _no_split_modules = ["GPT2Block"]
    _skip_keys_device_placement = "past_key_values"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # Checkpointed GPT-2 blocks drop the cache and with it the prefix, so gradient checkpointing is not offered.
    supports_gradient_checkpointing = False
    _tied_weights_keys = {"language_model.lm_head.weight": "language_model.transformer.wte.weight"}

    def __init__(self, config: ChexGeneratorConfig):
        super().__init__(config)
        self.prefix_projection = ChexPrefixProjection(config)
        self.language_model = GPT2LMHeadModel(config)
        self.language_model.loss_type = "ForCausalLM"
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

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.language_model.set_output_embeddings(new_embeddings)

    def prefix_cache(self, features: torch.Tensor, cache: Cache | None = None) -> Cache:
        """
        Fills an empty cache, by default a new `DynamicCache`, with the prefix of the features (S, D) or (S, L, D). The
        language model appends its own keys and values, so every call needs a cache of its own.
        """
        if features.ndim == 2:
            features = features[:, None]
        cache = cache if cache is not None else DynamicCache(config=self.config)
        prefix = self.prefix_projection(features.to(self.prefix_projection.fc1.weight.dtype))
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
            attention_mask (`torch.Tensor` of shape `(S, T)` or `(S, prefix + T)`, *optional*): 1 for valid tokens.
            position_ids (`torch.LongTensor` of shape `(S, T)`, *optional*): By default the tokens are counted from
                `config.position_offset`; the prefix does not count.
            past_key_values (`Cache`, *optional*): Prefix and tokens seen so far.
            features (`torch.Tensor` of shape `(S, D)` or `(S, L, D)`, *optional*): Conditioning features, put into an
                empty cache as prefix. Without them the language model is unconditional.
            labels (`torch.LongTensor` of shape `(S, T)`, *optional*): Targets before shifting; -100 is ignored. See
                `target_labels`.
        """
        if features is not None and (past_key_values is None or past_key_values.get_seq_length() == 0):
            past_key_values = self.prefix_cache(features, past_key_values)
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        tokens = input_ids if input_ids is not None else inputs_embeds
        batch_size, length = tokens.shape[:2]
        if attention_mask is None:
            attention_mask = torch.ones((batch_size, past_length + length), dtype=torch.long, device=tokens.device)
        if position_ids is None:
            token_mask = attention_mask[:, -length:]
            position_ids = (token_mask.long().cumsum(-1) - 1).masked_fill(token_mask == 0, 1)
            position_ids = position_ids + self.config.position_offset
        unmasked = past_length + length - attention_mask.shape[1]
        if unmasked > 0:  # the mask covers the tokens only: the prefix is always visible
            attention_mask = torch.cat([attention_mask.new_ones((batch_size, unmasked)), attention_mask], dim=1)
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
        features: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs,
    ):
        r"""
        Generates one sentence for each feature; everything that `GenerationMixin.generate` offers is available.

        Args:
            features (`torch.Tensor` of shape `(S, D)` or `(S, L, D)`): Conditioning features.
            kwargs: Generation arguments. `max_length` counts the start token, but not the prefix.

        Returns:
            `torch.LongTensor` of shape `(S, length)` that starts with the start token, or a `ModelOutput` with
            `return_dict_in_generate=True`.
        """
        if features is None:
            raise ValueError("`generate` needs `features` of shape (sentences, feature_size) to describe.")
        num_sentences, device = features.shape[0], features.device
        start = {
            "inputs": torch.full((num_sentences, 1), self.config.bos_token_id, device=device),
            "attention_mask": torch.ones((num_sentences, 1), dtype=torch.long, device=device),
            "position_ids": torch.full((num_sentences, 1), self.config.position_offset, device=device),
        }
        # The two limits exclude each other and the default is a `max_length`, so it has to replace `max_new_tokens`.
        if generation_config is not None and generation_config.max_new_tokens is not None:
            generation_config = copy.deepcopy(generation_config)
            generation_config.update(max_length=generation_config.max_new_tokens + 1, max_new_tokens=None)
        if kwargs.get("max_new_tokens") is not None:
            kwargs |= {"max_length": kwargs["max_new_tokens"] + 1, "max_new_tokens": None}
        return super().generate(features=features, generation_config=generation_config, **(start | kwargs))


__all__ = ["ChexSentenceGenerator"]
