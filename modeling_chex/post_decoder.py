"""Post decoder: refines region features with each other and with the image (ChEX, ECCV 2024; stages 2 and 3)."""

import torch
from torch import nn
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_chex import ChexConfig
from .prompt_detector import ChexDecoderLayer, additive_attention_mask, legacy_visibility


class ChexPostDecoder(nn.Module):
    """
    Decoder over groups of tokens: the aggregated feature of a query followed by its R region features, or the single
    feature of a given box. The result passes a gate that starts closed.
    """

    def __init__(self, config: ChexConfig):
        super().__init__()
        post_config, hidden_size = config.post_decoder_config, config.projection_dim
        self.config = post_config
        self.legacy = config.attention_mode == "legacy"
        self.layers = nn.ModuleList(
            ChexDecoderLayer(config, post_config, cross_attn_drop_path=post_config.drop_path)
            for _ in range(post_config.num_layers)
        )
        self.gate = nn.Parameter(torch.zeros(1))
        self.layer_norm = nn.LayerNorm(hidden_size, eps=post_config.layer_norm_eps)

    def forward(
        self,
        features: torch.Tensor,
        source: torch.Tensor,
        query_mask: torch.Tensor | None = None,
        region_keep_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        Args:
            features (`torch.Tensor` of shape `(N, Q, G, D)`): G = 1 + R tokens of a text query, aggregated one first,
                or G = 1 for given boxes.
            source (`torch.Tensor` of shape `(N, P + 1, D)`): Patch tokens with positions, then the image token.
            query_mask (`torch.BoolTensor` of shape `(N, Q)`, *optional*).
            region_keep_mask (`torch.BoolTensor` of shape `(N, Q, R)`, *optional*): Regions that may serve as keys. By
                default `region_drop` of them are hidden at random while training, none otherwise.

        Returns:
            `torch.Tensor` of shape `(N, Q, G, D)`.
        """
        batch_size, num_queries, group_size, _ = features.shape
        if region_keep_mask is None and self.training and group_size > 1 and self.config.region_drop > 0:
            draws = torch.rand((batch_size, num_queries, group_size - 1), device=features.device)
            region_keep_mask = draws >= self.config.region_drop

        keys = None
        if region_keep_mask is not None:
            keys = torch.cat([torch.ones_like(region_keep_mask[..., :1]), region_keep_mask], dim=-1)
        if self.legacy and (query_mask is not None or group_size > 1):
            if keys is None:
                keys = torch.ones(features.shape[:3], dtype=torch.bool, device=features.device)
            if query_mask is not None:
                keys = keys & query_mask[..., None]
            visible = legacy_visibility(keys.flatten(1), group_size)
            attention_mask = additive_attention_mask(visible, features.dtype)
            group_size = num_queries * group_size
        elif keys is not None:
            attention_mask = additive_attention_mask(keys.flatten(0, 1)[:, None], features.dtype)
        else:
            attention_mask = None

        tokens = features.flatten(1, 2)
        for layer in self.layers:
            tokens = layer(tokens, source, group_size, attention_mask, **kwargs)
        output = self.layer_norm(features + self.gate * tokens.view_as(features))
        if query_mask is not None and not self.legacy:
            output = output * query_mask[..., None, None]
        return output


__all__ = ["ChexPostDecoder"]
