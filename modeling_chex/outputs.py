"""Outputs of ChEX models."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput


@dataclass
class ChexImageFeatures(BaseModelOutputWithPooling):
    r"""
    Output of [`ChexModel.get_image_features`]. N images, a grid of H x W patches, joint width D.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(N, 1 + H*W, vision_hidden_size)`):
            Hidden state of the vision transformer before its final layer norm, class token first.
        pooler_output (`torch.FloatTensor` of shape `(N, D)`): Projected image token.
        patch_features (`torch.FloatTensor` of shape `(N, H, W, D)`): Projected patch tokens, row-major.
        position_embeddings (`torch.FloatTensor` of shape `(1, H, W, D)`): Projected position embeddings of the
            patches, the same for every image.
    """

    patch_features: torch.FloatTensor | None = None
    position_embeddings: torch.FloatTensor | None = None


@dataclass
class ChexOutput(ModelOutput):
    r"""
    Output of [`ChexModel`]: for each of N images and Q queries, R regions. Boxes are (center x, center y, width,
    height) relative to the square network input. Text queries come first on the query axis, then box queries.

    Args:
        boxes (`torch.FloatTensor` of shape `(N, Q, 4)`): Box enclosing all regions of the query; all zero if no region
            is present.
        region_boxes (`torch.FloatTensor` of shape `(N, Q, R, 4)`): Box of each region.
        region_scores (`torch.FloatTensor` of shape `(N, Q, R)`): Score of each region in [0, 1]; 0 for padded queries.
        query_scores (`torch.FloatTensor` of shape `(N, Q)`): Score of the query, its region scores weighted by
            themselves.
        query_features (`torch.FloatTensor` of shape `(N, Q, D)`): Aggregated feature of the query, after the post
            decoder where it was used.
        region_features (`torch.FloatTensor` of shape `(N, Q, R, D)`): Feature of each region.
        present (`torch.BoolTensor` of shape `(N, Q)`): Whether any region of the query is present.
        region_present (`torch.BoolTensor` of shape `(N, Q, R)`): Whether the score of the region is above the
            threshold.
        query_mask (`torch.BoolTensor` of shape `(N, Q)`): Valid queries.
        image_features ([`ChexImageFeatures`]): The encoded images; hand them back to ask further questions.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*): Tokens entering the first block of the prompt detector,
            then those leaving each block of it, and of the post decoder where it was used.
        attentions, cross_attentions (`tuple(torch.FloatTensor)`, *optional*): Attention weights of the same blocks
            (`attn_implementation="eager"` only): within the groups of tokens, and to the image.
    """

    boxes: torch.FloatTensor | None = None
    region_boxes: torch.FloatTensor | None = None
    region_scores: torch.FloatTensor | None = None
    query_scores: torch.FloatTensor | None = None
    query_features: torch.FloatTensor | None = None
    region_features: torch.FloatTensor | None = None
    present: torch.BoolTensor | None = None
    region_present: torch.BoolTensor | None = None
    query_mask: torch.BoolTensor | None = None
    image_features: ChexImageFeatures | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None


__all__ = ["ChexImageFeatures", "ChexOutput"]
