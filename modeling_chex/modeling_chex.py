"""ChEX: interactive localisation and description of regions in chest X-rays (Müller et al., ECCV 2024)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import initialization as init
from transformers.generation import GenerationConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPVisionModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_chex import ChexConfig
from .outputs import ChexImageFeatures, ChexOutput
from .post_decoder import ChexPostDecoder
from .prompt_detector import ChexAttention, ChexDecoderLayer, ChexLayerScale, ChexPromptDetector, clip_boxes
from .sentence_generator import ChexSentenceGenerator


class ChexPreTrainedModel(PreTrainedModel):
    config: ChexConfig
    base_model_prefix = "chex"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = [
        "ChexDecoderLayer",
        "CLIPEncoderLayer",
        "CLIPVisionEmbeddings",
        "CLIPTextEmbeddings",
        "GPT2Block",
    ]
    _skip_keys_device_placement = ["past_key_values", "prefix"]
    _can_record_outputs = {
        "hidden_states": OutputRecorder(ChexDecoderLayer, index=0),
        "attentions": OutputRecorder(ChexAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(ChexAttention, index=1, layer_name="cross_attn"),
    }

    @classmethod
    def is_custom_code(cls) -> bool:
        # Code from outside the library is expected to overwrite loaded weights when it initialises, so modules without
        # parameters of their own, such as attention, are skipped. `_init_weights` below respects what is loaded.
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        # The encoders and the generator are models of their own and initialise themselves.
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        else:
            super()._init_weights(module)
        if isinstance(module, ChexAttention):
            for projection in (module.q_proj, module.k_proj, module.v_proj):
                # Xavier bound of the three matrices stacked, (6 / 4d)^0.5, as in torch's multi-head attention
                bound = (6 / (4 * projection.in_features)) ** 0.5
                init.uniform_(projection.weight, -bound, bound)
                init.zeros_(projection.bias)
            init.zeros_(module.out_proj.bias)
        elif isinstance(module, ChexLayerScale):
            init.constant_(module.lambda1, module.initial_value)
        elif isinstance(module, ChexPromptDetector):
            std = module.config.region_token_std or module.region_tokens.shape[-1] ** -0.5
            init.normal_(module.region_tokens, std=std)
        elif isinstance(module, ChexPostDecoder):
            init.zeros_(module.gate)
        elif isinstance(module, ChexModel):
            for projection in (module.visual_projection, module.text_projection):
                init.normal_(projection.weight, std=projection.in_features**-0.5)


class ChexCanGenerate:
    """
    `can_generate` of a class whose models have a sentence generator or not. Of the class it is false, since it has no
    generation loop of its own; of a model it tells whether there is a generation configuration to save and load.
    """

    def __get__(self, model: "ChexModel | None", model_class: type) -> Callable[[], bool]:
        return lambda: model is not None and model.config.generator_config is not None


class ChexModel(ChexPreTrainedModel):
    r"""
    ChEX answers queries about chest X-rays. A query is a text or a box; the answer is boxes, scores and a feature that
    can be classified against prompts or described in a sentence.

    ```python
    >>> inputs = processor(images=["scan.png"], text=["Pleural effusion", "Right lower lung zone"])
    >>> output = model(**inputs)  # boxes, scores and features for each query
    >>> token_ids = model.generate(**inputs, image_features=output.image_features)  # a sentence for each query
    ```
    """

    can_generate = ChexCanGenerate()

    def __init__(self, config: ChexConfig):
        super().__init__(config)
        self._set_attn_implementation_of_parts({})
        self.vision_model = CLIPVisionModel._from_config(config.vision_config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        self.text_model = CLIPTextModel._from_config(config.text_config)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.detector = ChexPromptDetector(config)
        self.post_decoder = ChexPostDecoder(config) if config.post_decoder_config is not None else None
        self.sentence_generator = (
            ChexSentenceGenerator._from_config(config.generator_config)
            if config.generator_config is not None
            else None
        )
        self.post_init()

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The sentence generator's, `None` without one. It is saved and loaded with the model."""
        generator = self._modules.get("sentence_generator")
        return generator.generation_config if generator is not None else None

    @generation_config.setter
    def generation_config(self, value: GenerationConfig):
        if self._modules.get("sentence_generator") is not None:  # not while the base class is being initialised
            self.sentence_generator.generation_config = value

    def adjust_generation_fn(self, *args, **kwargs):
        """Loads the generation configuration, called by `from_pretrained`."""
        self.sentence_generator.adjust_generation_fn(*args, **kwargs)

    def _set_gradient_checkpointing(self, *args, **kwargs):
        super()._set_gradient_checkpointing(*args, **kwargs)
        if self.sentence_generator is not None:
            self.sentence_generator.avoid_reentrant_checkpoints()

    def _set_attn_implementation_of_parts(self, requested: str | dict[str, str] | None):
        """Of detector and post decoder, which the base class passes over as they are no models of their own."""
        for name in ("detector_config", "post_decoder_config"):
            if (part := getattr(self.config, name)) is None:
                continue
            implementation = requested
            if isinstance(requested, dict):
                implementation = requested.get(name, part._attn_implementation)
            part._attn_implementation_internal = self.get_correct_attn_implementation(
                implementation or self.config._attn_implementation
            )

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], *args, **kwargs):
        self._set_attn_implementation_of_parts(attn_implementation)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> ChexImageFeatures:
        r"""
        Image encoder: patch tokens, image token and projected positions. Unlike CLIP, every token passes the final
        layer norm and the projection, not only the image token; nothing is L2-normalised.

        Args:
            pixel_values (`torch.Tensor` of shape `(N, 3, S, S)`): Normalised grey image, repeated to three channels.
        """
        if pixel_values.shape[0] > 0:
            outputs = self.vision_model(pixel_values=pixel_values, return_dict=True, **kwargs)
        else:  # which the vision model does not take
            size = (0, self.vision_model.embeddings.num_positions, self.config.vision_config.hidden_size)
            outputs = BaseModelOutputWithPooling(last_hidden_state=pixel_values.new_zeros(size, dtype=self.dtype))
        tokens = self.visual_projection(self.vision_model.post_layernorm(outputs.last_hidden_state))
        # Called rather than its weight read, which may be offloaded
        embeddings = self.vision_model.embeddings
        positions = self.visual_projection(embeddings.position_embedding(embeddings.position_ids[:, 1:]))
        grid = (
            pixel_values.shape[-2] // self.config.vision_config.patch_size,
            pixel_values.shape[-1] // self.config.vision_config.patch_size,
        )
        return ChexImageFeatures(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=tokens[:, 0],
            patch_features=tokens[:, 1:].unflatten(1, grid),
            position_embeddings=positions.unflatten(1, grid),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def get_prompt_features(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        r"""
        Prompt encoder: one feature for each text, not normalised.

        Args:
            input_ids (`torch.LongTensor` of shape `(Q, T)` or `(N, Q, T)`): Start token, text, end token, padding.
            attention_mask (`torch.Tensor` of the same shape, *optional*): Accepted for convenience. The encoder is
                causal and pooled at the first end token, so padding after it has no influence.

        Returns:
            `torch.Tensor` of shape `(Q, D)` or `(N, Q, D)`.
        """
        shape = input_ids.shape[:-1]
        if input_ids.numel() == 0:
            size = (*shape, self.config.projection_dim)
            return torch.zeros(size, dtype=self.dtype, device=input_ids.device)
        outputs = self.text_model(input_ids=input_ids.flatten(0, -2))
        return self.text_projection(outputs.pooler_output).view(*shape, -1)

    def _refine(
        self,
        features: torch.Tensor,
        image_features: ChexImageFeatures,
        query_mask: torch.Tensor | None,
        region_keep_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Post decoder on features (N, Q, G, D)."""
        patches = image_features.patch_features + image_features.position_embeddings
        source = torch.cat([patches.flatten(1, 2), image_features.pooler_output[:, None]], dim=1)
        return self.post_decoder(features, source, query_mask, region_keep_mask, **kwargs)

    def _use_post_decoder(self, use_post_decoder: bool | None) -> bool:
        if use_post_decoder and self.post_decoder is None:
            raise ValueError(
                "This model has no post decoder (`config.post_decoder_config` is None, as after training stage 1). "
                "Call it with `use_post_decoder=False`, or load a model of stage 2 or 3."
            )
        return self.post_decoder is not None if use_post_decoder is None else use_post_decoder

    def encode_boxes(
        self,
        image_features: ChexImageFeatures,
        boxes: torch.Tensor | Sequence[torch.Tensor],
        box_mask: torch.BoolTensor | None = None,
        prompt_features: torch.Tensor | None = None,
        use_post_decoder: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        r"""
        Features of given regions.

        Args:
            image_features ([`ChexImageFeatures`]): Of N images.
            boxes (`torch.Tensor` of shape `(N, M, 4)`): Normalised cxcywh; or a list of N tensors `(m, 4)`, of which
                the longest has M boxes.
            box_mask (`torch.BoolTensor` of shape `(N, M)`, *optional*): Valid boxes; features of others are zero. Not
                with a list.
            prompt_features (`torch.Tensor` of shape `(N, M, D)`, *optional*): A text for each box. Its region tokens
                are decoded, averaged, and averaged with the feature of the box.
            use_post_decoder (`bool`, *optional*): Defaults to whether the model has one.

        Returns:
            `torch.Tensor` of shape `(N, M, D)`.
        """
        patch_features = image_features.patch_features
        if not isinstance(boxes, torch.Tensor):
            if box_mask is not None or len(boxes) != len(patch_features):
                raise ValueError(
                    "A list of boxes has a tensor (m, 4) for each image and takes no `box_mask`, but there are "
                    f"{len(boxes)} tensors for {len(patch_features)} images and "
                    f"{'no' if box_mask is None else 'a'} `box_mask`."
                )
            box_mask = pad_sequence([own.new_ones(len(own), dtype=torch.bool) for own in boxes], batch_first=True)
            boxes = pad_sequence(list(boxes), batch_first=True)
        box_mask = box_mask.bool() if box_mask is not None else None
        tokens = None
        if prompt_features is not None:
            tokens = self.detector.decode(
                patch_features,
                image_features.position_embeddings,
                prompt_features.to(self.dtype),
                box_mask,
                **kwargs,
            )
            tokens = tokens.unflatten(1, (boxes.shape[1], self.config.detector_config.num_regions)).mean(2)
        features = self.detector.pool(patch_features, boxes, tokens)
        if box_mask is not None:
            features = features * box_mask[..., None]
        if self._use_post_decoder(use_post_decoder):
            features = self._refine(features[:, :, None], image_features, box_mask, **kwargs).squeeze(2)
        return features

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        prompt_features: torch.Tensor | None = None,
        query_mask: torch.BoolTensor | None = None,
        query_boxes: torch.Tensor | None = None,
        box_mask: torch.BoolTensor | None = None,
        image_features: ChexImageFeatures | None = None,
        roi_skip: bool | torch.Tensor | None = True,
        use_post_decoder: bool | None = None,
        region_keep_mask: torch.BoolTensor | None = None,
        clip_boxes: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ChexOutput:
        r"""
        Answers Q text queries and M box queries for each of N images; with both, the query axis of the output holds
        the text queries first, then the box queries.

        Args:
            pixel_values (`torch.Tensor` of shape `(N, 3, S, S)`): Images; or give `image_features`.
            input_ids (`torch.LongTensor` of shape `(Q, T)` or `(N, Q, T)`, *optional*): Texts, shared or per image.
            attention_mask (`torch.Tensor`, *optional*): Of the texts.
            prompt_features (`torch.Tensor` of shape `(Q, D)` or `(N, Q, D)`, *optional*): Encoded texts, instead of
                `input_ids`.
            query_mask (`torch.BoolTensor` of shape `(Q,)` or `(N, Q)`, *optional*): Valid text queries.
            query_boxes (`torch.Tensor` of shape `(N, M, 4)`, *optional*): Box queries, normalised cxcywh.
            box_mask (`torch.BoolTensor` of shape `(N, M)`, *optional*): Valid box queries.
            image_features ([`ChexImageFeatures`], *optional*): Encoded images from an earlier call.
            roi_skip (`bool`, `torch.BoolTensor` of shape `(N, Q*R)` or `None`): Whether region features are averaged
                with the decoder token. `None` draws at random while training (and is `True` otherwise).
            use_post_decoder (`bool`, *optional*): Defaults to whether the model has one. Detection and grounding are
                evaluated without.
            region_keep_mask (`torch.BoolTensor` of shape `(N, Q, R)`, *optional*): Regions that the post
                decoder sees.
            clip_boxes (`bool`): Clamp boxes to the image, after the enclosing box was formed.
        """
        if image_features is None:
            if pixel_values is None:
                raise ValueError("ChexModel needs `pixel_values`, or `image_features` of images encoded before.")
            image_features = self.get_image_features(pixel_values)
        num_images = image_features.patch_features.shape[0]
        refine = self._use_post_decoder(use_post_decoder)
        if input_ids is None and prompt_features is None and query_boxes is None:
            raise ValueError("ChexModel needs queries: `input_ids`, `prompt_features` or `query_boxes`.")
        if input_ids is not None and prompt_features is not None:
            raise ValueError("Text queries are given twice: pass either `input_ids` or `prompt_features`, not both.")

        parts = []
        if input_ids is not None:
            prompt_features = self.get_prompt_features(input_ids, attention_mask)
        if prompt_features is not None:
            if prompt_features.ndim == 2:
                prompt_features = prompt_features[None].expand(num_images, -1, -1)
            prompt_features = prompt_features.to(self.dtype)  # features kept from earlier may be float32
            if query_mask is not None:
                query_mask = query_mask.bool().expand(num_images, -1)
            part = self.detector(
                image_features.patch_features,
                image_features.position_embeddings,
                prompt_features,
                query_mask,
                roi_skip,
                **kwargs,
            )
            if refine:
                features = torch.cat([part["query_features"][:, :, None], part["region_features"]], dim=2)
                features = self._refine(features, image_features, query_mask, region_keep_mask, **kwargs)
                part["query_features"], part["region_features"] = features[:, :, 0], features[:, :, 1:]
            part["query_mask"] = _full_mask(query_mask, prompt_features)
            parts.append(part)
        if query_boxes is not None:
            features = self.encode_boxes(image_features, query_boxes, box_mask, use_post_decoder=refine, **kwargs)
            parts.append(self._box_answers(query_boxes, features, _full_mask(box_mask, query_boxes)))

        fields = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
        if clip_boxes:
            fields["boxes"], fields["region_boxes"] = _clip(fields["boxes"]), _clip(fields["region_boxes"])
        return ChexOutput(**fields, image_features=image_features)

    def _box_answers(
        self, boxes: torch.Tensor, features: torch.Tensor, mask: torch.BoolTensor
    ) -> dict[str, torch.Tensor]:
        """The answer to a box query: the box itself with score 1, and its feature in every region."""
        num_regions = self.config.detector_config.num_regions
        boxes = boxes * mask[..., None]
        region_mask = mask[..., None].expand(-1, -1, num_regions)
        return {
            "boxes": boxes,
            "region_boxes": boxes[:, :, None].expand(-1, -1, num_regions, -1),
            "region_scores": region_mask.to(boxes.dtype),
            "query_scores": mask.to(boxes.dtype),
            "query_features": features,
            "region_features": features[:, :, None].expand(-1, -1, num_regions, -1),
            "present": mask,
            "region_present": region_mask,
            "query_mask": mask,
        }

    @staticmethod
    def classify(
        features: torch.Tensor,
        positive: torch.Tensor,
        negative: torch.Tensor,
        temperature: float = 1.0,
        normalize: bool = True,
    ) -> torch.Tensor:
        r"""
        Zero-shot classification against a pair of prompt ensembles:
        \(p = \sigma((\cos(f, q^+) - \cos(f, q^-)) / \tau)\), which equals the softmax over the pair.

        Args:
            features (`torch.Tensor` of shape `(..., D)`): Region or query features.
            positive, negative (`torch.Tensor` of shape `(C, D)`): Mean prompt feature of each class, present and
                absent; or of a shape that broadcasts with `features[..., None, :]`.
            temperature (`float`): \(\tau\).
            normalize (`bool`): Cosine similarity if true, else the dot product.

        Returns:
            `torch.Tensor` of shape `(..., C)`: Probability that the class is present.
        """
        features, positive, negative = features.float(), positive.float(), negative.float()
        if normalize:
            features, positive, negative = (nn.functional.normalize(x, dim=-1) for x in (features, positive, negative))
        difference = (features[..., None, :] * positive).sum(-1) - (features[..., None, :] * negative).sum(-1)
        return (difference / temperature).sigmoid()

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        prompt_features: torch.Tensor | None = None,
        query_mask: torch.BoolTensor | None = None,
        query_boxes: torch.Tensor | None = None,
        box_mask: torch.BoolTensor | None = None,
        image_features: ChexImageFeatures | None = None,
        query_features: torch.Tensor | None = None,
        image_frames: torch.Tensor | None = None,
        original_sizes: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **generation_kwargs,
    ) -> torch.LongTensor | ModelOutput:
        r"""
        A sentence for every query of every image, in one padded batch. The arguments are those of `forward` followed
        by any generation arguments; `query_features` (N, Q, D) of an earlier `forward` save computing them again, and
        then `query_mask` (N, Q) tells which of them are valid. `image_frames` and `original_sizes` (from the
        processor) are accepted and not used.

        Returns:
            `torch.LongTensor` of shape `(N, Q, T)`: Token ids that start with the start token; padded queries hold
            padding only. With `num_return_sequences=K > 1`, `(N, Q, K, T)`. With `return_dict_in_generate=True`, the
            output of `GenerationMixin.generate` whose `sequences` have that shape; its other fields run over the
            valid queries, flattened. If no query is valid, ids of shape `(N, Q, 0)`, whatever the arguments.

        Raises:
            ValueError: The model has no sentence generator, or no queries are given.
        """
        if self.sentence_generator is None:
            raise ValueError(
                "This model has no sentence generator (`config.generator_config` is None, as after training stages 1 "
                "and 2): it can locate and classify, but not describe. Load a model of stage 3 to generate sentences."
            )
        if query_features is None:
            output = self(
                pixel_values=pixel_values,
                input_ids=input_ids,
                attention_mask=attention_mask,
                prompt_features=prompt_features,
                query_mask=query_mask,
                query_boxes=query_boxes,
                box_mask=box_mask,
                image_features=image_features,
            )
            query_features, query_mask = output.query_features, output.query_mask
        query_mask = _full_mask(query_mask, query_features)
        if not query_mask.any():
            return query_features.new_zeros((*query_mask.shape, 0), dtype=torch.long)
        generated = self.sentence_generator.generate(
            features=query_features[query_mask], generation_config=generation_config, **generation_kwargs
        )
        if isinstance(generated, torch.Tensor):
            return self._per_query(generated, query_mask)
        generated.sequences = self._per_query(generated.sequences, query_mask)
        return generated

    @torch.no_grad()
    def report(
        self,
        pixel_values: torch.Tensor | None = None,
        image_features: ChexImageFeatures | None = None,
        *,
        processor: Any,
        original_sizes: torch.Tensor | None = None,
        image_frames: torch.Tensor | None = None,
        preset: str = "found",
        queries: Any = None,
        generation: dict[str, Any] | None = None,
        **options: Any,
    ) -> list[dict[str, Any]]:
        r"""
        A report about each image: a sentence for each finding and region that is worth one, filtered by sign, without
        repetitions, and each with the boxes of the prompt that it answers (ChEX, report generation).

        ```python
        >>> inputs = processor(images=["scan.png"])
        >>> (report,) = model.report(**inputs, processor=processor, preset="paper")
        ```

        Args:
            pixel_values (`torch.Tensor` of shape `(N, 3, S, S)`): Images; or give `image_features`.
            image_features ([`ChexImageFeatures`]): Images that were encoded before.
            processor ([`ChexProcessor`]): The processor of this model. It holds the prompts, the tokenizers and the
                steps of a report.
            original_sizes, image_frames (`torch.Tensor` of shapes `(N, 2)` and `(N, 4)`, *optional*): As the processor
                gives them. Without sizes, boxes are relative to the square network input.
            preset (`str`): `"found"` asks for eight common findings and describes those that are found; `"paper"` asks
                for the 14 of CheXpert and describes all, greedily. Both describe regions that look abnormal.
            queries (*optional*): Encoded prompts, as from `processor.report_queries`.
            generation (`dict`, *optional*): Arguments of `generate`.
            options: Steps of the report in place of the preset's: `findings`, `regions`, `select_findings`,
                `select_regions`, `sign`, `threshold`, `negatives`, `prefer`, `max_sentences`, `order`, ...; see
                `ReportOptions` in `processing_chex/report.py`.

        Returns:
            `list` of N dictionaries with `text`, the report, and `sentences`, dictionaries of `text`, `name` (of the
            finding class or region), `prompt`, `kind` ("finding" or "region"), `score` of the query, `abnormality`,
            `box` around everything that was found (xyxy pixels of the original image, or `None`), `regions` (what
            scores above the threshold, without duplicates, best first) and `candidates` (all regions of the query),
            both as dictionaries of `box` and `score`.

        Raises:
            ValueError: The model has no sentence generator, no image is given, or an option is not allowed.
        """
        if image_features is None:
            if pixel_values is None:
                raise ValueError("ChexModel needs `pixel_values`, or `image_features` of images encoded before.")
            image_features = self.get_image_features(pixel_values)
        return processor.write_reports(
            self, image_features, original_sizes, image_frames, preset, queries, generation, **options
        )

    def _per_query(self, sequences: torch.LongTensor, query_mask: torch.BoolTensor) -> torch.LongTensor:
        """Puts K sequences (V*K, T) for each of V valid queries into their places: (N, Q, T), or (N, Q, K, T)."""
        sequences = sequences.unflatten(0, (int(query_mask.sum()), -1))
        if sequences.shape[1] == 1:
            sequences = sequences.squeeze(1)
        padding = self.config.generator_config.pad_token_id
        placed = sequences.new_full((*query_mask.shape, *sequences.shape[1:]), padding)
        placed[query_mask] = sequences
        return placed


# `ChexModel.forward` has an argument of the same name
_clip = clip_boxes


def _full_mask(mask: torch.Tensor | None, queries: torch.Tensor) -> torch.BoolTensor:
    """The mask (N, Q) of queries (N, Q, ...), all true if there is none."""
    if mask is None:
        return torch.ones(queries.shape[:2], dtype=torch.bool, device=queries.device)
    return mask.bool().expand(queries.shape[:2])


__all__ = ["ChexModel", "ChexPreTrainedModel"]
