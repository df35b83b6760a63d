"""Prompt detector: decodes prompt tokens into region boxes and region features (ChEX, ECCV 2024)."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.image_transforms import center_to_corners_format, corners_to_center_format
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_chex import ChexConfig, ChexDetectorConfig, ChexPostDecoderConfig


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    attn_weights = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask
    attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attn_weights = nn.functional.dropout(attn_weights, p=dropout, training=module.training)
    attn_output = torch.matmul(attn_weights, value).transpose(1, 2).contiguous()
    return attn_output, attn_weights


def additive_attention_mask(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    Additive mask (N, 1, T, S) from a boolean one (N, T, S), True = visible. A row that sees nothing sees everything:
    such rows belong to padding, and an empty softmax would turn the whole sample into NaN.
    """
    visible = visible | ~visible.any(dim=-1, keepdim=True)
    return torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]


def legacy_visibility(mask: torch.Tensor, group_size: int) -> torch.Tensor:
    """
    Visibility (N, T, T) as the official code combines its group mask with a key mask (N, T): a key is hidden only
    from its own group and only if it is masked; everything else, other queries included, is visible.
    """
    group = torch.arange(mask.shape[1], device=mask.device) // group_size
    same_group = group[:, None] == group[None, :]
    return ~(same_group[None] & ~mask[:, None, :])


def soft_roi_weights(
    boxes: torch.Tensor, height: int, width: int, beta: float | torch.Tensor = 2.0, legacy: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Soft RoI map of the paper, which is separable:
    \(s(h, w) = \exp(-(|x_w - c_x| / b_w)^\beta) \exp(-(|y_h - c_y| / b_h)^\beta)\), scaled to a maximum of 1 over the
    grid. Note that the full width and height are the scale, and that pooling is a sum, not a mean.

    Args:
        boxes (`torch.Tensor` of shape `(..., 4)`): Normalised cxcywh.
        height, width (`int`): Size of the patch grid.
        beta (`float` or `torch.Tensor` of shape `(...)`): Exponent.
        legacy (`bool`): Divide by the maximum plus 1e-12, as the official code does, so that a box which is far
            smaller than a patch and off all patch centres has an all-zero map. By default the maximum is taken off in
            log space and such a box pools its nearest patch. A box of no size on a patch centre pools that patch in
            both modes; officially it is not a number.

    Returns:
        The factors over rows `(..., height)` and columns `(..., width)` in float32; their outer product is the map.
    """
    boxes = boxes.float()
    if isinstance(beta, torch.Tensor):
        beta = beta[..., None]

    def factor(center: torch.Tensor, extent: torch.Tensor, size: int) -> torch.Tensor:
        grid = (torch.arange(size, device=boxes.device, dtype=boxes.dtype) + 0.5) / size
        distance = (grid - center[..., None]).abs()
        if legacy:
            smallest = torch.finfo(boxes.dtype).tiny
            return torch.exp(-((distance / extent[..., None].clamp_min(smallest)) ** beta))
        exponent = -((distance / extent[..., None].clamp_min(1e-4)) ** beta)
        return torch.exp(exponent - exponent.amax(dim=-1, keepdim=True))

    center_x, center_y, box_width, box_height = boxes.unbind(-1)
    rows, columns = factor(center_y, box_height, height), factor(center_x, box_width, width)
    if legacy:
        rows = rows / (rows.amax(-1, keepdim=True) * columns.amax(-1, keepdim=True) + 1e-12)
    return rows, columns


def soft_roi_pool(
    features: torch.Tensor, boxes: torch.Tensor, beta: float | torch.Tensor = 2.0, legacy: bool = False
) -> torch.Tensor:
    """
    Sum of the patch features weighted with the soft RoI map of each box.

    Args:
        features (`torch.Tensor` of shape `(N, H, W, D)`): Patch features.
        boxes (`torch.Tensor` of shape `(N, K, 4)`): Normalised cxcywh.

    Returns:
        `torch.Tensor` of shape `(N, K, D)`, in the dtype of the features.
    """
    height, width = features.shape[1:3]
    rows, columns = soft_roi_weights(boxes, height, width, beta, legacy)
    if legacy:  # the official sum carries this factor, which is 1 for the square inputs of ChEX
        rows = rows * (width / height)
    weights = (rows[..., :, None] * columns[..., None, :]).flatten(2)
    return torch.bmm(weights, features.flatten(1, 2).float()).to(features.dtype)


def enclosing_boxes(boxes: torch.Tensor) -> torch.Tensor:
    """Smallest box around all boxes of the second last axis: cxcywh `(..., R, 4)` to cxcywh `(..., 4)`."""
    corners = center_to_corners_format(boxes)
    return corners_to_center_format(torch.cat([corners[..., :2].amin(-2), corners[..., 2:].amax(-2)], dim=-1))


def clip_boxes(boxes: torch.Tensor) -> torch.Tensor:
    """Clamps the corners of cxcywh boxes `(..., 4)` to the unit square."""
    return corners_to_center_format(center_to_corners_format(boxes).clamp(0, 1))


class ChexDropPath(nn.Module):
    """Stochastic depth per sample, the first axis (Huang et al., 2016)."""

    def __init__(self, drop_probability: float):
        super().__init__()
        self.drop_probability = drop_probability

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.training or self.drop_probability == 0.0:
            return hidden_states
        keep_probability = 1.0 - self.drop_probability
        keep = hidden_states.new_empty((hidden_states.shape[0],) + (1,) * (hidden_states.ndim - 1))
        return hidden_states * keep.bernoulli_(keep_probability).div_(keep_probability)

    def extra_repr(self) -> str:
        return f"p={self.drop_probability}"


class ChexLayerScale(nn.Module):
    def __init__(self, hidden_size: int, initial_value: float):
        super().__init__()
        self.initial_value = initial_value
        self.lambda1 = nn.Parameter(torch.full((hidden_size,), float(initial_value)))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.lambda1


class ChexMLP(nn.Module):
    """Linear, activation, dropout, linear, dropout; preceded by a layer norm if `layer_norm_eps` is given."""

    def __init__(
        self,
        config: ChexDetectorConfig | ChexPostDecoderConfig,
        hidden_size: int,
        intermediate_size: int,
        output_size: int,
        layer_norm: bool = True,
        final_dropout: bool = True,
    ):
        super().__init__()
        self.layer_norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps) if layer_norm else nn.Identity()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(intermediate_size, output_size)
        self.dropout = nn.Dropout(config.dropout)
        self.final_dropout = nn.Dropout(config.dropout if final_dropout else 0.0)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.activation_fn(self.fc1(self.layer_norm(hidden_states)))
        return self.final_dropout(self.fc2(self.dropout(hidden_states)))


class ChexAttention(nn.Module):
    """Multi-head attention over `key_value_states`, or over the hidden states themselves."""

    def __init__(self, config: ChexConfig, part_config: ChexDetectorConfig | ChexPostDecoderConfig):
        super().__init__()
        self.config = part_config  # holds the attention implementation
        hidden_size = config.projection_dim
        self.num_heads = part_config.num_attention_heads
        self.head_dim = hidden_size // self.num_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = part_config.attention_dropout
        self.is_causal = False
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if key_value_states is None:
            key_value_states = hidden_states
        heads = (self.num_heads, self.head_dim)
        query = self.q_proj(hidden_states).unflatten(-1, heads).transpose(1, 2)
        key = self.k_proj(key_value_states).unflatten(-1, heads).transpose(1, 2)
        value = self.v_proj(key_value_states).unflatten(-1, heads).transpose(1, 2)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        return self.out_proj(attn_output.reshape(hidden_states.shape)), attn_weights


class ChexDecoderLayer(GradientCheckpointingLayer):
    """
    Pre-norm block: self-attention among the tokens of a group, cross-attention to the image, feed-forward; each
    branch has LayerScale. The detector has no stochastic depth on cross-attention, the post decoder has.
    """

    def __init__(
        self,
        config: ChexConfig,
        part_config: ChexDetectorConfig | ChexPostDecoderConfig,
        cross_attn_drop_path: float,
    ):
        super().__init__()
        hidden_size, eps = config.projection_dim, part_config.layer_norm_eps
        self.self_attn_layer_norm = nn.LayerNorm(hidden_size, eps=eps)
        self.self_attn = ChexAttention(config, part_config)
        self.self_attn_layer_scale = ChexLayerScale(hidden_size, part_config.layer_scale_init)
        self.cross_attn_layer_norm = nn.LayerNorm(hidden_size, eps=eps)
        self.source_layer_norm = nn.LayerNorm(hidden_size, eps=eps)
        self.cross_attn = ChexAttention(config, part_config)
        self.cross_attn_layer_scale = ChexLayerScale(hidden_size, part_config.layer_scale_init)
        self.ff_layer_norm = nn.LayerNorm(hidden_size, eps=eps)
        self.fc1 = nn.Linear(hidden_size, part_config.intermediate_size)
        self.activation_fn = ACT2FN[part_config.hidden_act]
        self.fc2 = nn.Linear(part_config.intermediate_size, hidden_size)
        self.ff_layer_scale = ChexLayerScale(hidden_size, part_config.layer_scale_init)
        self.dropout = nn.Dropout(part_config.dropout)
        self.drop_path = ChexDropPath(part_config.drop_path)
        self.cross_attn_drop_path = ChexDropPath(cross_attn_drop_path)

    def forward(
        self,
        hidden_states: torch.Tensor,
        source: torch.Tensor,
        group_size: int,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(N, T, D)`): Tokens, the tokens of a group being neighbours.
            source (`torch.Tensor` of shape `(N, P, D)`): Image tokens.
            group_size (`int`): Tokens attend within groups of this size; `T` means over everything.
            attention_mask (`torch.Tensor`, *optional*, broadcastable to `(N*T/group_size, heads, group_size,
                group_size)`): Additive mask.
        """
        if hidden_states.numel() == 0:  # no queries; the attention functions of the library reject empty batches
            return hidden_states
        shape = hidden_states.shape
        tokens = self.self_attn_layer_norm(hidden_states).reshape(-1, group_size, shape[-1])
        tokens, _ = self.self_attn(tokens, attention_mask=attention_mask, **kwargs)
        tokens = self.dropout(tokens.reshape(shape))
        hidden_states = hidden_states + self.drop_path(self.self_attn_layer_scale(tokens))

        tokens = self.cross_attn_layer_norm(hidden_states)
        tokens, _ = self.cross_attn(tokens, key_value_states=self.source_layer_norm(source), **kwargs)
        tokens = self.cross_attn_layer_scale(self.dropout(tokens))
        hidden_states = hidden_states + self.cross_attn_drop_path(tokens)

        tokens = self.activation_fn(self.fc1(self.ff_layer_norm(hidden_states)))
        tokens = self.dropout(self.fc2(self.dropout(tokens)))
        return hidden_states + self.drop_path(self.ff_layer_scale(tokens))


class ChexPatchProjection(nn.Module):
    def __init__(self, config: ChexDetectorConfig, hidden_size: int):
        super().__init__()
        self.layer_norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.dense(self.layer_norm(hidden_states)))


class ChexPromptDetector(nn.Module):
    """Decodes each prompt token into R region boxes, scores and features."""

    def __init__(self, config: ChexConfig):
        super().__init__()
        detector_config, hidden_size = config.detector_config, config.projection_dim
        self.config = detector_config
        self.legacy = config.attention_mode == "legacy"
        self.region_tokens = nn.Parameter(torch.empty(detector_config.num_regions, hidden_size))
        self.layers = nn.ModuleList(
            ChexDecoderLayer(config, detector_config, cross_attn_drop_path=0.0)
            for _ in range(detector_config.num_layers)
        )
        self.box_head = ChexMLP(detector_config, hidden_size, hidden_size, 4, final_dropout=False)
        self.patch_projection = ChexPatchProjection(detector_config, hidden_size)
        self.output_projection = ChexMLP(detector_config, hidden_size, 4 * hidden_size, hidden_size)
        self.region_weight_head = ChexMLP(
            detector_config, hidden_size, hidden_size, 1, layer_norm=False, final_dropout=False
        )
        self.roi_skip_dropout = nn.Dropout(detector_config.roi_skip_dropout)

    def decode(
        self,
        patch_features: torch.Tensor,
        position_embeddings: torch.Tensor,
        prompt_features: torch.Tensor,
        query_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        Token decoder: prompt plus region tokens attend to the image.

        Args:
            patch_features (`torch.Tensor` of shape `(N, H, W, D)`), position_embeddings (`(1, H, W, D)`).
            prompt_features (`torch.Tensor` of shape `(N, Q, D)`).
            query_mask (`torch.BoolTensor` of shape `(N, Q)`, *optional*): Needed by the legacy mode only; a padded
                query cannot influence others in grouped mode.

        Returns:
            `torch.Tensor` of shape `(N, Q*R, D)`, query-major.
        """
        num_regions = self.config.num_regions
        tokens = (prompt_features[:, :, None] + self.region_tokens.to(prompt_features.dtype)).flatten(1, 2)
        source = (patch_features + position_embeddings).flatten(1, 2)
        group_size, attention_mask = num_regions, None
        if self.legacy and query_mask is not None:
            group_size = tokens.shape[1]
            visible = legacy_visibility(query_mask.repeat_interleave(num_regions, dim=1), num_regions)
            attention_mask = additive_attention_mask(visible, tokens.dtype)
        for layer in self.layers:
            tokens = layer(tokens, source, group_size, attention_mask, **kwargs)
        return tokens

    def pool(
        self,
        patch_features: torch.Tensor,
        boxes: torch.Tensor,
        tokens: torch.Tensor | None = None,
        roi_skip: bool | torch.Tensor | None = True,
    ) -> torch.Tensor:
        """
        Region features from boxes: soft RoI pooling, optionally averaged with the decoder token, then projected.

        Args:
            patch_features (`torch.Tensor` of shape `(N, H, W, D)`).
            boxes (`torch.Tensor` of shape `(N, K, 4)`): Normalised cxcywh.
            tokens (`torch.Tensor` of shape `(N, K, D)`, *optional*): Decoder token of each box.
            roi_skip (`bool` or `torch.BoolTensor` of shape `(N, K)`, *optional*): Average with the token: always,
                never, or for the selected ones. `None`: selected at random while training, always otherwise.

        Returns:
            `torch.Tensor` of shape `(N, K, D)`.
        """
        pooled = soft_roi_pool(self.patch_projection(patch_features), boxes, self.config.roi_beta, self.legacy)
        if roi_skip is None:
            roi_skip = True
            if self.training:
                draws = torch.rand(boxes.shape[:2], device=boxes.device)
                roi_skip = draws < self.config.roi_skip_probability
        if tokens is not None and isinstance(roi_skip, torch.Tensor):
            pooled = torch.where(roi_skip[..., None], (self.roi_skip_dropout(tokens) + pooled) / 2, pooled)
        elif tokens is not None and roi_skip:
            pooled = (tokens + pooled) / 2
        return self.output_projection(pooled)

    def forward(
        self,
        patch_features: torch.Tensor,
        position_embeddings: torch.Tensor,
        prompt_features: torch.Tensor,
        query_mask: torch.Tensor | None = None,
        roi_skip: bool | torch.Tensor | None = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> dict[str, torch.Tensor]:
        """Returns the per-query fields of [`ChexOutput`], before the post decoder."""
        tokens = self.decode(patch_features, position_embeddings, prompt_features, query_mask, **kwargs)
        # Box coordinates and maps stay in float32: half precision has too few bits for a position in the image.
        boxes = self.box_head(tokens).float().sigmoid()
        features = self.pool(patch_features, boxes, tokens, roi_skip)

        groups = (prompt_features.shape[1], self.config.num_regions)
        boxes, features = boxes.unflatten(1, groups), features.unflatten(1, groups)
        if query_mask is not None:
            boxes = boxes * query_mask[..., None, None]
            features = features * query_mask[..., None, None]

        scores = self.region_weight_head(features).float().sigmoid().squeeze(-1)
        # Not a softmax, and not scaled up where the scores sum to less than one.
        weights = scores / scores.sum(-1, keepdim=True).clamp_min(1)
        query_features = (weights[..., None].to(features.dtype) * features).sum(-2)
        query_scores = (weights * scores).sum(-1)
        region_present = scores > self.config.presence_threshold
        if query_mask is not None:
            scores = scores * query_mask[..., None]
            region_present = region_present & query_mask[..., None]
            if not self.legacy:  # the official code leaves the score of padded queries as computed
                query_scores = query_scores * query_mask
        present = region_present.any(-1)
        return {
            "boxes": enclosing_boxes(boxes) * present[..., None],
            "region_boxes": boxes,
            "region_scores": scores,
            "query_scores": query_scores,
            "query_features": query_features,
            "region_features": features,
            "present": present,
            "region_present": region_present,
        }


__all__ = ["ChexPromptDetector", "soft_roi_pool", "soft_roi_weights"]
