"""The trained modules: a model together with its supervision, from a batch to named loss terms."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase
from transformers.image_transforms import center_to_corners_format
from transformers.loss.loss_for_object_detection import box_iou

from modeling_chex import ChexImageFeatures, ChexModel, ChexSentenceGenerator
from modeling_chex.prompt_detector import soft_roi_pool
from processing_chex.image_processing_chex import ChexImageProcessor, per_channel
from processing_chex.prompt_sets import PromptSet, anatomy_prompts
from processing_chex.vocabulary import ANATOMY_NAMES, MULTI_ANATOMY_MEMBERS
from training.collate import Batch, TextTable
from training.configuration import ObjectiveConfig
from training.distributed import process_collectives
from training.objectives import (
    anatomy_objective,
    choose_for_generation,
    choose_synonyms,
    pathology_objective,
    presence_loss,
    random_subset,
    sentence_detection_loss,
    sentence_objective,
    statement_loss,
    subsample_classes,
    weighted_sum,
)
from training.objectives.reduction import full_precision
from training.text_features import FeatureDtype, FeatureTable, TextFeatures, TokenTable
from training.transforms import Augmentation


class PromptBank(nn.Module):
    """Features of the prompts of some classes (or anatomies), each with one or more synonyms."""

    def __init__(self, prompts: Mapping[str, Sequence[str]], text_features: TextFeatures):
        super().__init__()
        self.names = tuple(prompts)
        texts = [text for synonyms in prompts.values() for text in synonyms]
        counts = torch.tensor([len(synonyms) for synonyms in prompts.values()], dtype=torch.int64)
        self.register_buffer("features", text_features.encode(texts), persistent=False)
        self.register_buffer("counts", counts, persistent=False)
        self.register_buffer("offsets", counts.cumsum(0) - counts, persistent=False)

    def mean(self) -> Tensor:
        """Mean feature over the synonyms of each class (C, D), as in evaluation."""
        owner = torch.repeat_interleave(torch.arange(len(self.names), device=self.counts.device), self.counts)
        total = self.features.new_zeros(len(self.names), self.features.shape[1]).index_add_(0, owner, self.features)
        return total / self.counts[:, None]

    def sample(self, generator: torch.Generator) -> Tensor:
        """One synonym of each class (C, D), as in training."""
        return self.features[self.offsets + choose_synonyms(self.counts, generator)]


class Supervision(nn.Module):
    """
    A model with its losses. Calling it with a batch and a seed returns the named terms with their weighted sum under
    `loss`; being one module, it is what `accelerate` prepares. Parts that are not trained stay in eval mode.
    """

    def __init__(self, model: nn.Module, keep_frozen_in_train_mode: bool = False):
        super().__init__()
        self.model = model
        self.keep_frozen_in_train_mode = keep_frozen_in_train_mode

    def train(self, mode: bool = True) -> "Supervision":
        super().train(mode)
        if mode and not self.keep_frozen_in_train_mode:
            for part in self.model.children():
                if not any(parameter.requires_grad for parameter in part.parameters()):
                    part.eval()
        return self

    @staticmethod
    def generators(seed: int) -> tuple[torch.Generator, torch.Generator]:
        """For draws that all processes share (classes, synonyms), and for those of this process (sentences)."""
        rank = PartialState().process_index
        return torch.Generator().manual_seed(seed), torch.Generator().manual_seed((rank + 1) * 1_000_003 + seed)


class ImageSupervision(Supervision):
    """Shared by the stages that see images: augmentation and normalisation."""

    def __init__(
        self,
        model: ChexModel,
        image_processor: ChexImageProcessor,
        augmentation: Augmentation,
        texts: TextTable,
        keep_frozen_in_train_mode: bool = False,
    ):
        super().__init__(model, keep_frozen_in_train_mode)
        self.augmentation = augmentation
        self.side = image_processor.size["height"]
        for name in ("image_mean", "image_std"):
            values = torch.from_numpy(per_channel(name, getattr(image_processor, name)))
            self.register_buffer(name, values, persistent=False)
        mirror_ids = texts.mirror_ids() if augmentation.config.flip == "consistent" else None
        self.register_buffer("mirror_ids", mirror_ids, persistent=False)

    def prepare(self, batch: Batch, epoch: int) -> tuple[Tensor, Batch]:
        """Pixel values (N, 3, S, S) and the batch with its boxes moved; augmented in training mode."""
        images = batch.images.float() / 255
        if self.training:
            draws = self.augmentation.draws(batch.index, epoch)
            transform = self.augmentation.geometry(draws).to(images.device)
            images = self.augmentation.intensity(transform.images(images, self.side), draws)
            anatomy_boxes, anatomy_present = transform.boxes(batch.anatomy_boxes, batch.anatomy_present)
            class_boxes, class_box_mask = transform.boxes(batch.class_boxes, batch.class_box_mask)
            batch = batch.replace(
                anatomy_boxes=anatomy_boxes,
                anatomy_present=anatomy_present,
                class_boxes=class_boxes,
                class_box_mask=class_box_mask,
            )
            if self.mirror_ids is not None:
                batch = batch.swap_sides(transform.mirrored, self.mirror_ids)
        elif images.shape[-1] != self.side:
            images = F.interpolate(images, size=(self.side, self.side), mode="bilinear", align_corners=False)
        return ((images - self.image_mean) / self.image_std).expand(-1, 3, -1, -1), batch


class ChexSupervision(ImageSupervision):
    """
    Stages 1 to 3 of the paper: sentence, anatomy and pathology queries with the objectives that have a coefficient.

    Queries are independent in grouped attention mode, so one detector pass decodes all of them; in legacy mode the
    three kinds get a pass of their own, as in the official code.
    """

    def __init__(
        self,
        model: ChexModel,
        image_processor: ChexImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        generator_tokenizer: PreTrainedTokenizerBase | None,
        class_prompts: PromptSet,
        texts: TextTable,
        objectives: ObjectiveConfig,
        augmentation: Augmentation,
        keep_frozen_in_train_mode: bool = False,
        text_cache: Path | None = None,
        text_feature_dtype: FeatureDtype = "float32",
    ):
        super().__init__(model, image_processor, augmentation, texts, keep_frozen_in_train_mode)
        self.objectives = objectives
        self.terms = objectives.weights.active()
        names = class_prompts.names
        features = TextFeatures(model, tokenizer, text_cache, text_feature_dtype)
        self.anatomies = PromptBank(anatomy_prompts(synonyms=True), features)
        self.positives = PromptBank({name: class_prompts.positive[name] for name in names}, features)
        self.negatives = PromptBank({name: class_prompts.negative[name] for name in names}, features)
        self.text_features = features.table(texts.texts)
        self.register_buffer("members", torch.tensor(MULTI_ANATOMY_MEMBERS), persistent=False)
        if model.sentence_generator is not None:
            longest = model.config.generator_config.max_generation_length
            self.text_tokens = TokenTable(generator_tokenizer, texts.texts, longest, start_and_end=True)

    def forward(self, batch: Batch, seed: int, epoch: int = 0) -> dict[str, Tensor]:
        (shared, local), collectives = self.generators(seed), process_collectives()
        pixel_values, batch = self.prepare(batch, epoch)
        image_features = self.model.get_image_features(pixel_values)
        options, terms = self.objectives, self.terms
        num_images, device = len(batch.images), batch.images.device

        queries: dict[str, tuple[Tensor, Tensor | None]] = {}
        sentences = sentence_features = None
        if terms & {"global_contrastive", "sentence_contrastive", "sentence_mse", "sentence_generation"}:
            sentences = self._choose_sentences(batch.sentences, local)
            sentence_features = self.text_features(sentences)
            if terms & {"sentence_contrastive", "sentence_mse", "sentence_generation"}:
                queries["sentences"] = (sentence_features, sentences >= 0)

        phrase_boxes = phrase_mask = None
        if "sentence_detection" in terms:
            phrases, phrase_boxes, phrase_mask = self._choose_phrases(batch, local)
            queries["phrases"] = (self.text_features(phrases), phrases >= 0)

        anatomies, kept, from_boxes = None, None, False
        if any(term.startswith("anatomy") for term in terms):
            anatomies, kept = self._choose_anatomies(shared)
            coin = torch.rand(1, generator=shared).item() < 0.5
            from_boxes = options.region_encoding == "bbox" or (options.region_encoding == "random" and coin)
            if not from_boxes:
                prompts = self.anatomies.sample(shared) if self.training else self.anatomies.mean()
                chosen = torch.cat([anatomies, torch.arange(len(ANATOMY_NAMES), len(prompts), device=device)])
                chosen = chosen if self._detects_multi() else anatomies
                queries["anatomies"] = (prompts[chosen].expand(num_images, -1, -1), None)

        positive, negative = (
            bank.sample(shared) if self.training else bank.mean() for bank in (self.positives, self.negatives)
        )
        classes = None
        if terms & {"pathology_detection", "pathology_classification"}:
            # agreed on by all processes, which draw the same classes
            annotated = (batch.has_class_boxes | batch.has_class_labels).sum(0)
            available = collectives.sum(annotated) > 0
            limit = options.classes_per_step if self.training else None
            classes = subsample_classes(available, limit, shared).nonzero().squeeze(1)
            queries["classes"] = (positive[classes].expand(num_images, -1, -1), None)

        answers = self._answer(image_features, queries)
        losses: dict[str, Tensor] = {}
        if sentences is not None:
            answer = answers.get("sentences", {})
            losses |= sentence_objective(
                answer.get("query_features"),
                sentence_features,
                sentences >= 0,
                patch_features=image_features.patch_features,
                terms=terms,
                options=options.sentence,
                collectives=collectives,
            )
            if "sentence_generation" in terms:
                losses["sentence_generation"] = self._generation_loss(
                    answer["query_features"], sentences, sentences >= 0, local
                )
        if phrase_boxes is not None:
            losses["sentence_detection"] = sentence_detection_loss(
                answers["phrases"]["region_boxes"],
                answers["phrases"]["region_scores"],
                phrase_boxes,
                phrase_mask,
                phrases >= 0,
                options.pathology.detection,
                options.mode,
                collectives,
            )
        if anatomies is not None:
            losses |= self._anatomy_terms(
                answers.get("anatomies"), image_features, batch, anatomies, kept, positive, negative, shared, local
            )
        if classes is not None:
            answer = answers["classes"]
            losses |= pathology_objective(
                answer["query_features"],
                answer["region_boxes"],
                answer["region_scores"],
                answer["region_features"],
                positive[classes],
                negative[classes],
                batch.class_boxes[:, classes],
                batch.class_box_mask[:, classes],
                batch.has_class_boxes[:, classes],
                batch.class_labels[:, classes],
                batch.has_class_labels[:, classes],
                terms=terms,
                options=options.pathology,
                objective_mode=options.mode,
                collectives=collectives,
            )
        metrics = {name: losses.pop(name) for name in list(losses) if name.startswith("metric/")}
        return {"loss": weighted_sum(losses, options.weights)} | losses | metrics

    def _choose_sentences(self, sentences: Tensor, generator: torch.Generator) -> Tensor:
        """Drops columns without sentences; with a limit, draws so many sentences of each image."""
        limit = self.objectives.sentences_per_image
        if limit is not None and self.training and sentences.shape[1] > limit:
            sentences = sentences.gather(1, _random_order(sentences >= 0, generator)[:, :limit])
        return sentences[:, (sentences >= 0).any(0)]

    def _choose_phrases(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """
        Two phrases for each image (N, 2), -1 for none, and their boxes (N, 2, T, 4) with their mask: one of its own
        that is grounded, and one of another image about a class that is absent here, which has no box.
        """
        slots = batch.class_phrases.shape[2]
        grounded = batch.class_box_mask.flatten(1) & (batch.class_phrases.flatten(1) >= 0)
        chosen = _random_order(grounded, generator)[:, :1]
        own = batch.class_phrases.flatten(1).gather(1, chosen).masked_fill(~grounded.gather(1, chosen), -1)
        rows, classes = torch.arange(len(chosen), device=chosen.device), chosen.squeeze(1) // slots
        mask = batch.class_box_mask[rows, classes] & (batch.class_phrases[rows, classes] == own)

        shift = int(torch.randint(1, max(2, len(own)), (1,), generator=generator))
        place = (rows, classes.roll(shift))
        absent = batch.has_class_labels[place] & ~batch.class_labels[place].bool()
        foreign = own.roll(shift, 0).masked_fill(~absent[:, None], -1)
        boxes = batch.class_boxes[rows, classes]
        return (
            torch.cat([own, foreign], dim=1),
            torch.stack([boxes, torch.zeros_like(boxes)], dim=1),
            torch.stack([mask, torch.zeros_like(mask)], dim=1),
        )

    def _choose_anatomies(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Single anatomies to decode in this step (indices), and which of them count for detection and MSE."""
        options, device = self.objectives, self.members.device
        every = torch.ones(len(ANATOMY_NAMES), dtype=torch.bool, device=device)
        if not self.training:
            return every.nonzero().squeeze(1), every
        if options.anatomies_per_classification is not None:
            chosen = random_subset(every, options.anatomies_per_classification, generator).nonzero().squeeze(1)
            return chosen, every[chosen]
        kept = subsample_classes(every, options.anatomies_per_step, generator)
        if "anatomy_classification" in self.terms:  # it has no sub-sampling, so every anatomy is decoded
            return every.nonzero().squeeze(1), kept
        chosen = kept.nonzero().squeeze(1)
        return chosen, every[chosen]

    def _detects_multi(self) -> bool:
        return self.objectives.multi_anatomies and "anatomy_detection" in self.terms

    def _answer(
        self, image_features: ChexImageFeatures, queries: dict[str, tuple[Tensor, Tensor | None]]
    ) -> dict[str, dict[str, Tensor]]:
        fields = ("query_features", "region_boxes", "region_scores", "region_features", "boxes")
        roi_skip = None if self.training else True
        groups = [[name] for name in queries] if self.model.config.attention_mode == "legacy" else [list(queries)]
        answers = {}
        for group in groups:
            if not group:
                continue
            features = torch.cat([queries[name][0] for name in group], dim=1)
            masks = [queries[name][1] for name in group]
            mask = None
            if any(part is not None for part in masks):
                mask = torch.cat(
                    [
                        part if part is not None else features.new_ones(queries[name][0].shape[:2], dtype=torch.bool)
                        for name, part in zip(group, masks, strict=True)
                    ],
                    dim=1,
                )
            output = self.model(
                image_features=image_features, prompt_features=features, query_mask=mask, roi_skip=roi_skip
            )
            sizes = [queries[name][0].shape[1] for name in group]
            for field in fields:
                for name, part in zip(group, output[field].split(sizes, dim=1), strict=True):
                    answers.setdefault(name, {})[field] = part
        return answers

    def _anatomy_terms(
        self,
        answer: dict[str, Tensor] | None,
        image_features: ChexImageFeatures,
        batch: Batch,
        anatomies: Tensor,
        kept: Tensor,
        positive: Tensor,
        negative: Tensor,
        shared: torch.Generator,
        local: torch.Generator,
    ) -> dict[str, Tensor]:
        options, terms, count = self.objectives, self.terms, len(anatomies)
        boxes, present = batch.anatomy_boxes[:, anatomies], batch.anatomy_present[:, anatomies]
        arguments: dict[str, Tensor] = {}
        if answer is None:
            features = self.model.encode_boxes(image_features, boxes)
            terms = terms - {"anatomy_detection"}
        else:
            features = answer["query_features"][:, :count]
            arguments = {"region_boxes": answer["region_boxes"][:, :count], "target_boxes": boxes}
            arguments["has_boxes"] = batch.has_anatomy_boxes[:, None].expand_as(present)
            if self._detects_multi():
                arguments |= {
                    "multi_region_boxes": answer["region_boxes"][:, count:],
                    "multi_region_scores": answer["region_scores"][:, count:],
                    # from the moved single boxes: the official targets ignore the augmentation
                    "multi_target_boxes": batch.anatomy_boxes[:, self.members],
                    "multi_target_mask": batch.anatomy_present[:, self.members],
                }
        sentences = batch.anatomy_sentences[:, anatomies]
        has_sentences = sentences >= 0
        text_features = self.text_features(sentences)
        losses = anatomy_objective(
            features,
            present,
            positive=positive,
            negative=negative,
            labels=batch.anatomy_labels[:, anatomies],
            has_labels=batch.has_anatomy_labels[:, None].expand(-1, count, -1),
            sentence_features=text_features.sum(2) / has_sentences.sum(2).clamp_min(1)[..., None],
            has_sentences=has_sentences.any(2),
            kept=kept,
            terms=terms,
            options=options.anatomy,
            objective_mode=options.mode,
            generator=shared,
            collectives=process_collectives(),
            **arguments,
        )
        if "anatomy_statement" in terms:
            labels, observed, asked = batch.anatomy_labels[:, anatomies], present, features
            if answer is not None:
                # Also of every annotated box: regions are classified from boxes, and pooling costs little.
                given = self.model.encode_boxes(image_features, batch.anatomy_boxes)
                asked = torch.cat([features, given], dim=1)
                labels = torch.cat([labels, batch.anatomy_labels], dim=1)
                observed = torch.cat([present, batch.anatomy_present], dim=1)
            losses["anatomy_statement"] = statement_loss(
                asked,
                positive,
                negative,
                labels,
                observed[..., None] & batch.has_anatomy_labels[:, None],
                collectives=process_collectives(),
            )
        if "anatomy_presence" in terms and answer is not None:
            losses["anatomy_presence"] = presence_loss(
                answer["region_scores"][:, :count],
                present,
                batch.has_anatomy_boxes[:, None].expand_as(present),
                process_collectives(),
            )
        if "anatomy_generation" in terms:
            texts = batch.anatomy_texts[:, anatomies]
            losses["anatomy_generation"] = self._generation_loss(features, texts, (texts >= 0) & present & kept, local)
        if answer is not None and not self.training and present.any():
            corners = center_to_corners_format(answer["boxes"][:, :count])
            targets = center_to_corners_format(boxes)
            iou = torch.stack([box_iou(c, t)[0].diagonal() for c, t in zip(corners, targets, strict=True)])
            losses["metric/anatomy_miou"] = iou[present].mean()
        return losses

    def _generation_loss(self, features: Tensor, texts: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """Cross-entropy of the sentences (N, Q) given the features (N, Q, D) of the chosen queries."""
        images, queries = choose_for_generation(mask, self.objectives.sentences_per_generation, generator)
        if len(images) == 0:
            return features.sum() * 0.0
        chosen = texts[images, queries]
        return sentence_loss(self.model.sentence_generator, features[images, queries], *self.text_tokens(chosen))


def sentence_loss(sentence_generator: ChexSentenceGenerator, features: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Teacher-forced cross-entropy of token ids (S, T) given features (S, D) or (S, L, D), padding left out."""
    labels = sentence_generator.target_labels(ids, mask)
    return sentence_generator(input_ids=ids, attention_mask=mask, features=features, labels=labels).loss


class ContrastiveSupervision(ImageSupervision):
    """
    Contrastive pre-training of the two encoders: the stand-in for CheXzero's weights.

    The image token is contrasted with sentences of the reports, and pooled patch features of annotated boxes with
    what is written there: the region's sentence or name, the finding's phrase or class. A text is a positive for every
    image (box) of the batch that it was written about. Regions are also classified against "X" and "No X" for every
    finding. A small model learns much faster from boxes than from whole images.
    """

    def __init__(
        self,
        model: ChexModel,
        image_processor: ChexImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        class_prompts: PromptSet,
        texts: TextTable,
        augmentation: Augmentation,
        sentences_per_image: int | None = 2,
        regions_per_image: int = 4,
    ):
        super().__init__(model, image_processor, augmentation, texts)
        names = [anatomy_prompts(synonyms=True)[name] for name in ANATOMY_NAMES]
        classes = [class_prompts.positive[name] for name in class_prompts.names]
        for buffer, prompts in (("region_names", names), ("class_names", classes)):
            ids = [torch.tensor([texts.add(text) for text in synonyms]) for synonyms in prompts]
            self.register_buffer(buffer, pad_sequence(ids, batch_first=True, padding_value=-1), persistent=False)
        statements = [
            [texts.add(prompts[name][0]) for name in class_prompts.names]
            for prompts in (class_prompts.positive, class_prompts.negative)
        ]
        self.register_buffer("statements", torch.tensor(statements), persistent=False)
        self.text_tokens = TokenTable(tokenizer, texts.texts, model.config.text_config.max_position_embeddings)
        self.logit_scale = nn.Parameter(torch.full((3,), 2.6592))  # as CLIP's; for each loss
        self.sentences_per_image, self.regions_per_image = sentences_per_image, regions_per_image

    def forward(self, batch: Batch, seed: int, epoch: int = 0) -> dict[str, Tensor]:
        _, generator = self.generators(seed)
        pixel_values, batch = self.prepare(batch, epoch)
        image_features = self.model.get_image_features(pixel_values)

        sentences = batch.sentences.gather(
            1, _random_order(batch.sentences >= 0, generator)[:, : self.sentences_per_image]
        )
        image_texts = sentences[sentences >= 0].unique()
        positives = (batch.sentences[:, :, None] == image_texts).any(1)  # (N, U): sentence u is true for image n
        global_loss = self._loss(image_features.pooler_output, image_texts, positives, self.logit_scale[0])

        boxes, texts, mask = self._regions(batch, generator)
        pooled = soft_roi_pool(image_features.patch_features, boxes)[mask]
        region_texts, own = texts[mask].unique(return_inverse=True)
        positives = F.one_hot(own, len(region_texts)).bool()
        region_loss = self._loss(pooled, region_texts, positives, self.logit_scale[1])
        classification_loss = self._classification(image_features, batch)
        return {
            "loss": global_loss + region_loss + classification_loss,
            "global_contrastive": global_loss.detach(),
            "region_contrastive": region_loss.detach(),
            "region_classification": classification_loss.detach(),
        }

    def _classification(self, image_features: ChexImageFeatures, batch: Batch) -> Tensor:
        """Pooled patches of every annotated region choose between "X" and "No X" for every finding."""
        prompts = self.model.get_prompt_features(self.text_tokens(self.statements.flatten())[0])
        positive, negative = prompts.unflatten(0, self.statements.shape)
        pooled = soft_roi_pool(image_features.patch_features, batch.anatomy_boxes)
        observed = batch.anatomy_present[..., None] & batch.has_anatomy_labels[:, None]
        temperature = self.logit_scale[2].clamp(max=4.6052).neg().exp()
        return statement_loss(pooled, positive, negative, batch.anatomy_labels, observed, temperature)

    def _regions(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (N, K, 4), their texts (N, K) and valid ones (N, K): some anatomies and all findings of each image."""
        order = _random_order(batch.anatomy_present, generator)[:, : self.regions_per_image]
        boxes = torch.cat(
            [batch.anatomy_boxes.gather(1, order[..., None].expand(-1, -1, 4)), batch.class_boxes.flatten(1, 2)], 1
        )
        mask = torch.cat([batch.anatomy_present.gather(1, order), batch.class_box_mask.flatten(1)], 1)
        written = torch.cat([batch.anatomy_texts.gather(1, order), batch.class_phrases.flatten(1)], 1)
        slots = batch.class_boxes.shape[2]
        class_names = self.class_names.repeat_interleave(slots, 0).expand(len(order), -1, -1)
        width = max(self.region_names.shape[1], class_names.shape[2])
        names = torch.cat(
            [F.pad(part, (0, width - part.shape[2]), value=-1) for part in (self.region_names[order], class_names)], 1
        )
        names = names.gather(2, _random_order(names >= 0, generator)[..., :1]).squeeze(2)
        by_name = torch.rand(written.shape, generator=generator).to(written.device) < 0.5
        texts = torch.where(by_name | (written < 0), names, written)
        return boxes, texts, mask

    def _loss(self, features: Tensor, texts: Tensor, positives: Tensor, logit_scale: Tensor) -> Tensor:
        if len(texts) == 0:
            return features.sum() * 0.0
        text_features = self.model.get_prompt_features(self.text_tokens(texts)[0])
        return _contrastive_loss(features, text_features, positives, logit_scale)


def _random_order(mask: Tensor, generator: torch.Generator) -> Tensor:
    """Indices along the last axis in random order, the valid ones (bool mask of the same shape) first."""
    draws = torch.rand(mask.shape, generator=generator).to(mask.device)
    return draws.masked_fill(~mask, 2.0).argsort(-1)


@full_precision
def _contrastive_loss(features: Tensor, text_features: Tensor, positives: Tensor, logit_scale: Tensor) -> Tensor:
    """Both directions between features (N, D) and text features (U, D), of which those in the mask (N, U) belong."""
    scale = logit_scale.clamp(max=4.6052).exp()
    logits = scale * F.normalize(features, dim=-1) @ F.normalize(text_features, dim=-1).mT
    return (_multi_positive_loss(logits, positives) + _multi_positive_loss(logits.mT, positives.mT)) / 2


def _multi_positive_loss(logits: Tensor, positives: Tensor) -> Tensor:
    """Mean negative log-likelihood of the positives of each row, over the rows that have any."""
    log_likelihood = (logits.log_softmax(-1) * positives).sum(-1) / positives.sum(-1).clamp_min(1)
    valid = positives.any(-1)
    return -(log_likelihood * valid).sum() / valid.sum().clamp_min(1)


class GeneratorSupervision(Supervision):
    """
    Generator pre-training: a sentence is reconstructed from its own prompt feature, which is repeated
    one to four times and partly dropped.
    """

    def __init__(
        self,
        generator: ChexSentenceGenerator,
        text_features: FeatureTable,
        generator_tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        feature_dropout: float = 0.3,
        max_copies: int = 4,
    ):
        super().__init__(generator)
        self.text_features = text_features
        self.text_tokens = TokenTable(
            generator_tokenizer, texts, generator.config.max_generation_length, start_and_end=True
        )
        self.feature_dropout = nn.Dropout(feature_dropout)
        self.max_copies = max_copies

    def forward(self, batch: Tensor, seed: int, epoch: int = 0) -> dict[str, Tensor]:
        copies = int(torch.randint(1, self.max_copies + 1, (1,), generator=self.generators(seed)[0]))
        features = self.feature_dropout(self.text_features(batch)[:, None].repeat(1, copies, 1))
        loss = sentence_loss(self.model, features, *self.text_tokens(batch))
        return {"loss": loss, "generation": loss.detach()}


__all__ = [
    "ChexSupervision",
    "ContrastiveSupervision",
    "GeneratorSupervision",
    "PromptBank",
    "Supervision",
]
