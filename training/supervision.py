"""The trained modules: a model together with its supervision, from a batch to named loss terms."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from modeling_chex import ChexImageFeatures, ChexModel, ChexOutput, ChexSentenceGenerator
from modeling_chex.prompt_detector import soft_roi_pool
from processing_chex.image_processing_chex import ChexImageProcessor, per_channel
from processing_chex.prompt_sets import PromptSet, anatomy_prompts
from processing_chex.vocabulary import ANATOMY_NAMES, MULTI_ANATOMY_MEMBERS
from training.collate import Batch, TextTable
from training.configuration import ObjectiveConfig
from training.distributed import process_collectives
from training.objectives import (
    Collectives,
    ObjectiveMode,
    StepTotals,
    anatomy_objective,
    choose_for_generation,
    choose_synonyms,
    generation_loss,
    image_draws,
    padded_length,
    paired_iou,
    pathology_objective,
    presence_loss,
    random_order,
    random_subset,
    sentence_detection_loss,
    sentence_objective,
    statement_loss,
    subsample_classes,
    weighted_sum,
)
from training.objectives.reduction import full_precision, masked_mean
from training.text_features import FeatureDtype, FeatureTable, TextFeatures, TokenTable
from training.transforms import Augmentation, normalise


# Keys of what is drawn for each image of a step, besides the seed of the step
SENTENCES, PHRASES, DESCRIBED_SENTENCES, DESCRIBED_ANATOMIES, ANATOMIES, ANATOMY_TEXTS, FINDING_TEXTS = range(101, 108)
ROI_SKIP = {"sentences": 111, "phrases": 112, "anatomies": 113, "classes": 114}
REGION_DROP = {name: key + 10 for name, key in ROI_SKIP.items()}
# Terms about the boxes that the answers to names of anatomies have
ASKED_BY_NAME = frozenset({"anatomy_detection", "anatomy_presence"})
BLOCKS = {"CLIPEncoderLayer", "ChexDecoderLayer", "GPT2Block"}


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

    What is drawn depends on the seed and the numbers of the images, and averages are over the images of all processes:
    how images are dealt to processes makes no difference. With the `totals` of a step in several parts, they are over
    all its parts.
    """

    def __init__(self, model: nn.Module, keep_frozen_in_train_mode: bool = False):
        super().__init__()
        self.model = model
        self.keep_frozen_in_train_mode = keep_frozen_in_train_mode

    @property
    def _no_split_modules(self) -> list[str]:
        """Blocks that `accelerate` shards one by one, those that there are."""
        return sorted({type(module).__name__ for module in self.modules()} & BLOCKS)

    def train(self, mode: bool = True) -> "Supervision":
        super().train(mode)
        if mode and not self.keep_frozen_in_train_mode:
            for part in self.model.children():
                if not any(parameter.requires_grad for parameter in part.parameters()):
                    part.eval()
        return self

    @torch.no_grad()
    def count(self, batch: Batch | Tensor, seed: int, epoch: int, totals: StepTotals) -> None:
        """Adds what the averages of this part of a step are over to the totals, without running the model."""
        self(batch, seed=seed, epoch=epoch, totals=totals)

    def blank(self, batch: Batch | Tensor) -> Batch | Tensor:
        """A batch of the same shape that teaches nothing, for a process that has nothing of a step."""
        return batch.blank() if isinstance(batch, Batch) else torch.full_like(batch, -1)


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

    def prepare(self, batch: Batch, epoch: int, counting: bool = False) -> tuple[Tensor | None, Batch]:
        """Pixel values (N, 3, S, S), unless only counting, and the batch with moved boxes; augmented in training."""
        images = None
        if self.training:
            draws = self.augmentation.draws(batch.index, epoch)
            transform = self.augmentation.geometry(draws).to(batch.images.device)
            if not counting:
                images = self.augmentation.pixels(batch.images, transform, draws, self.side)
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
        elif not counting:
            images = batch.images.float().div_(255)  # `float` has made a copy
            if images.shape[-1] != self.side:
                images = F.interpolate(images, size=(self.side, self.side), mode="bilinear", align_corners=False)
        if counting:
            return None, batch
        return normalise(images, self.image_mean, self.image_std).expand(-1, 3, -1, -1), batch


class ChexSupervision(ImageSupervision):
    """
    Stages 1 to 3 of the paper: sentence, anatomy and pathology queries with the objectives that have a coefficient.

    Queries are independent in grouped attention mode, so one detector pass decodes all of them; in legacy mode the
    three kinds get a pass of their own, as in the official code.

    With `objective_mode="official"`, what is wrong with the official objectives is done as there: the losses of
    `training.objectives` that have such a mode; boxes of region pairs are those before augmentation; classes are drawn
    for boxes and for labels apart; and skip connections and dropped regions are drawn in validation as well.
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
        objective_mode: ObjectiveMode = "corrected",
    ):
        super().__init__(model, image_processor, augmentation, texts, keep_frozen_in_train_mode)
        self.objectives, self.objective_mode = objectives, objective_mode
        self.terms = objectives.weights.active()
        if asked_by_name := sorted(self.terms & ASKED_BY_NAME):
            # in steps that ask by box, these terms are left out
            encoding = objectives.region_encoding
            if encoding == "bbox" or (encoding == "random" and len(asked_by_name) == len(self.terms)):
                raise ValueError(
                    f"{' and '.join(asked_by_name)} cannot be learned with objectives.region_encoding={encoding}, "
                    "which asks for anatomies by their boxes: set it to token."
                )
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

    def forward(self, batch: Batch, seed: int, epoch: int = 0, totals: StepTotals | None = None) -> dict[str, Tensor]:
        # for draws that all processes share
        shared, collectives = torch.Generator().manual_seed(seed), process_collectives(totals)
        model = Outline(self.model, len(batch.images)) if collectives.counting else self.model
        official, recorded = self.objective_mode == "official", batch
        pixel_values, batch = self.prepare(batch, epoch, collectives.counting)
        image_features = model.get_image_features(pixel_values)
        options, terms = self.objectives, self.terms
        num_images, device = len(batch.images), batch.images.device

        queries: dict[str, tuple[Tensor, Tensor | None]] = {}
        sentences = sentence_features = None
        if terms & {"global_contrastive", "sentence_contrastive", "sentence_mse", "sentence_generation"}:
            sentences = self._choose_sentences(batch, seed)
            sentence_features = self.text_features(sentences)
            if terms & {"sentence_contrastive", "sentence_mse", "sentence_generation"}:
                queries["sentences"] = (sentence_features, sentences >= 0)

        phrase_boxes = phrase_mask = None
        if "sentence_detection" in terms:
            phrases, phrase_boxes, phrase_mask = self._choose_phrases(batch, seed, shared, collectives)
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
            with_boxes, with_labels = self._choose_classes(batch, shared, collectives)
            classes = (with_boxes | with_labels).nonzero().squeeze(1)
            queries["classes"] = (positive[classes].expand(num_images, -1, -1), None)

        answers = self._answer(model, image_features, queries, batch.index, seed)
        losses: dict[str, Tensor] = {}
        if sentences is not None:
            answer = answers.get("sentences", {})
            losses |= sentence_objective(
                answer.get("query_features"),
                sentence_features,
                sentences >= 0,
                patch_features=image_features.patch_features,
                sentence_ids=None if options.sentence.identical_negatives else sentences,
                terms=terms,
                options=options.sentence,
                collectives=collectives,
            )
            if "sentence_generation" in terms:
                draws = image_draws(batch.index, sentences.shape[1:], seed, DESCRIBED_SENTENCES)
                losses["sentence_generation"] = self._generation_loss(
                    model, answer["query_features"], sentences, draws, collectives.of("sentence_generation")
                )
        if phrase_boxes is not None:
            losses["sentence_detection"] = sentence_detection_loss(
                answers["phrases"]["region_boxes"],
                answers["phrases"]["region_scores"],
                phrase_boxes,
                phrase_mask,
                phrases >= 0,
                options.pathology.detection,
                self.objective_mode,
                collectives.of("sentence_detection"),
            )
        if anatomies is not None:
            losses |= self._anatomy_terms(
                model,
                answers.get("anatomies"),
                image_features,
                batch,
                recorded if official else batch,
                anatomies,
                kept,
                positive,
                negative,
                seed,
                shared,
                collectives,
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
                (batch.has_class_boxes & with_boxes)[:, classes],
                batch.class_labels[:, classes],
                (batch.has_class_labels & with_labels)[:, classes],
                terms=terms,
                options=options.pathology,
                objective_mode=self.objective_mode,
                collectives=collectives,
            )
        metrics = {name: losses.pop(name) for name in list(losses) if name.startswith("metric/")}
        return {"loss": weighted_sum(losses, options.weights)} | losses | metrics

    def _choose_sentences(self, batch: Batch, seed: int) -> Tensor:
        """Drops columns without sentences; with a limit, draws so many sentences of each image."""
        limit, sentences = self.objectives.sentences_per_image, batch.sentences
        if limit is not None and self.training:
            draws = image_draws(batch.index, sentences.shape[1:], seed, SENTENCES)
            sentences = sentences.gather(1, random_order(sentences >= 0, draws)[:, :limit])
        return sentences[:, (sentences >= 0).any(0)]

    def _choose_classes(
        self, batch: Batch, shared: torch.Generator, collectives: Collectives
    ) -> tuple[Tensor, Tensor]:
        """
        Classes of this step whose boxes count, and whose labels do: (C,), the same in all processes. One draw decides
        both, so that `classes_per_step` is the number of queries; officially there is one draw for each.
        """
        limit = self.objectives.classes_per_step if self.training else None
        if self.objective_mode == "corrected":
            annotated = (batch.has_class_boxes | batch.has_class_labels).sum(0)
            both = subsample_classes(collectives.sum(annotated) > 0, limit, shared)
            return both, both
        with_boxes, with_labels = (
            subsample_classes(collectives.sum(annotated.sum(0)) > 0, limit, shared)
            for annotated in (batch.has_class_boxes, batch.has_class_labels)
        )
        none = torch.zeros_like(with_boxes)  # what no term learns from is not drawn
        return (
            with_boxes if "pathology_detection" in self.terms else none,
            with_labels if "pathology_classification" in self.terms else none,
        )

    def _choose_phrases(
        self, batch: Batch, seed: int, shared: torch.Generator, collectives: Collectives
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Two phrases for each image (N, 2), -1 for none, and their boxes (N, 2, T, 4) with their mask: one of its own
        that is grounded, and one of another image of the step which has no box here, since it is about classes that
        are absent. A phrase that is written about several classes has the boxes of all of them.
        """
        count, slots = batch.class_phrases.shape[1:]
        grounded = batch.class_box_mask.flatten(1) & (batch.class_phrases.flatten(1) >= 0)
        draws = image_draws(batch.index, (slots, count), seed, PHRASES).mT.flatten(1)
        chosen = random_order(grounded, draws)[:, :1]
        own = batch.class_phrases.flatten(1).gather(1, chosen).masked_fill(~grounded.gather(1, chosen), -1)
        written = batch.class_box_mask & (batch.class_phrases == own[..., None]) & (own[..., None] >= 0)  # (N, C, T)
        about = written.any(2)  # (N, C)
        boxes, mask = _own_boxes_first(batch.class_boxes, written, chosen.squeeze(1) // slots)

        # Images stand in the order of their numbers, and each gets the phrase of the one so many places before it.
        numbers = batch.index + 1
        offers = collectives.gather(torch.cat([numbers[:, None], own, about.long()], dim=1))
        offers = offers[offers[:, 0] > 0]  # neither padding nor stand-ins
        offers = offers[offers[:, 0].argsort(stable=True)]
        shift = int(torch.randint(1, max(2, len(offers)), (1,), generator=shared))
        places = torch.searchsorted(offers[:, 0].contiguous(), numbers) - shift
        if len(offers):
            offered = offers[places % len(offers)]
            foreign, about = offered[:, 1], offered[:, 2:].bool()
            absent = batch.has_class_labels & ~batch.class_labels.bool()
            foreign = foreign.masked_fill(~(absent | ~about).all(1), -1)[:, None]
        else:
            foreign = torch.full_like(own, -1)
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
        self,
        model: "ChexModel | Outline",
        image_features: ChexImageFeatures,
        queries: dict[str, tuple[Tensor, Tensor | None]],
        index: Tensor,
        seed: int,
    ) -> dict[str, dict[str, Tensor]]:
        fields = ("query_features", "region_boxes", "region_scores", "region_features", "boxes")
        detector, post_decoder = self.model.detector, self.model.post_decoder
        regions = detector.config.num_regions
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
            sizes = [queries[name][0].shape[1] for name in group]
            # what these parts would otherwise draw from the random numbers of this process
            roi_skip, region_keep_mask = True, None
            always = self.objective_mode == "official"  # in validation, too
            if detector.training or always:
                draws = _region_draws(index, seed, [ROI_SKIP[name] for name in group], sizes, regions)
                roi_skip = draws.flatten(1).to(features.device) < detector.config.roi_skip_probability
            dropping = post_decoder is not None and (post_decoder.training or always)
            if dropping and post_decoder.config.region_drop > 0:
                draws = _region_draws(index, seed, [REGION_DROP[name] for name in group], sizes, regions)
                region_keep_mask = draws.to(features.device) >= post_decoder.config.region_drop
            output = model(
                image_features=image_features,
                prompt_features=features,
                query_mask=mask,
                roi_skip=roi_skip,
                region_keep_mask=region_keep_mask,
            )
            for field in fields:
                for name, part in zip(group, output[field].split(sizes, dim=1), strict=True):
                    answers.setdefault(name, {})[field] = part
        return answers

    def _anatomy_terms(
        self,
        model: "ChexModel | Outline",
        answer: dict[str, Tensor] | None,
        image_features: ChexImageFeatures,
        batch: Batch,
        pairs: Batch,
        anatomies: Tensor,
        kept: Tensor,
        positive: Tensor,
        negative: Tensor,
        seed: int,
        shared: torch.Generator,
        collectives: Collectives,
    ) -> dict[str, Tensor]:
        """The terms of the anatomies with these numbers; `pairs` is the batch that has the boxes of region pairs."""
        options, terms, count = self.objectives, self.terms, len(anatomies)
        boxes, present = batch.anatomy_boxes[:, anatomies], batch.anatomy_present[:, anatomies]
        arguments: dict[str, Tensor] = {}
        if answer is None:
            features = model.encode_boxes(image_features, boxes)
            terms = terms - {"anatomy_detection"}
        else:
            features = answer["query_features"][:, :count]
            arguments = {"region_boxes": answer["region_boxes"][:, :count], "target_boxes": boxes}
            arguments["has_boxes"] = batch.has_anatomy_boxes[:, None].expand_as(present)
            if self._detects_multi():
                arguments |= {
                    "multi_region_boxes": answer["region_boxes"][:, count:],
                    "multi_region_scores": answer["region_scores"][:, count:],
                    "multi_target_boxes": pairs.anatomy_boxes[:, self.members],
                    "multi_target_mask": pairs.anatomy_present[:, self.members],
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
            objective_mode=self.objective_mode,
            generator=shared,
            collectives=collectives,
            **arguments,
        )
        if "anatomy_statement" in terms:
            labels, observed, asked = batch.anatomy_labels[:, anatomies], present, features
            if answer is not None:
                # Also of every annotated box: regions are classified from boxes, and pooling costs little.
                given = model.encode_boxes(image_features, batch.anatomy_boxes)
                asked = torch.cat([features, given], dim=1)
                labels = torch.cat([labels, batch.anatomy_labels], dim=1)
                observed = torch.cat([present, batch.anatomy_present], dim=1)
            losses["anatomy_statement"] = statement_loss(
                asked,
                positive,
                negative,
                labels,
                observed[..., None] & batch.has_anatomy_labels[:, None],
                collectives=collectives.of("anatomy_statement"),
            )
        if "anatomy_presence" in terms and answer is not None:
            losses["anatomy_presence"] = presence_loss(
                answer["region_scores"][:, :count],
                present,
                batch.has_anatomy_boxes[:, None].expand_as(present),
                collectives.of("anatomy_presence"),
            )
        if "anatomy_generation" in terms:
            texts = batch.anatomy_texts[:, anatomies].masked_fill(~(present & kept), -1)
            draws = image_draws(batch.index, (len(ANATOMY_NAMES),), seed, DESCRIBED_ANATOMIES)[:, anatomies.cpu()]
            losses["anatomy_generation"] = self._generation_loss(
                model, features, texts, draws, collectives.of("anatomy_generation")
            )
        if answer is not None and not self.training:
            iou = paired_iou(answer["boxes"][:, :count], boxes)
            counted = collectives.of("metric/anatomy_miou")
            mean = masked_mean(iou, present, counted)
            if counted.total(present.sum()) > 0:
                losses["metric/anatomy_miou"] = mean
        return losses

    def _generation_loss(
        self, model: "ChexModel | Outline", features: Tensor, texts: Tensor, draws: Tensor, collectives: Collectives
    ) -> Tensor:
        """Cross-entropy of some of the texts (N, Q), -1 for none, given the features (N, Q, D) of their queries."""
        chosen = choose_for_generation(
            texts >= 0, self.objectives.sentences_per_generation, draws=draws, collectives=collectives
        )
        return sentence_loss(
            model.sentence_generator,
            features[chosen],
            texts[chosen],
            self.text_tokens,
            collectives,
            self.objective_mode,
            candidates=texts[texts >= 0],
        )


def _own_boxes_first(boxes: Tensor, chosen: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """
    The chosen boxes of each image, whatever their class.

    Args:
        boxes: (N, C, T, 4).
        chosen: (N, C, T) bool.
        classes: (N,) class whose boxes come first, in their T places. Those of other classes follow, without any that
            are there already.

    Returns:
        Boxes (N, T', 4) with T' = T unless any image has others, and their mask (N, T').
    """
    rows = torch.arange(len(boxes), device=boxes.device)
    own_boxes, own = boxes[rows, classes], chosen[rows, classes]
    others = chosen.clone()
    others[rows, classes] = False
    if not others.any():
        return own_boxes, own
    others, boxes = others.flatten(1), boxes.flatten(1, 2)
    order = (~others).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(others.sum(1).max())]
    boxes = torch.cat([own_boxes, boxes.gather(1, order[..., None].expand(-1, -1, 4))], dim=1)
    mask = torch.cat([own, others.gather(1, order)], dim=1)
    same = (boxes[:, :, None] == boxes[:, None]).all(-1) & mask[:, :, None] & mask[:, None]  # (N, T', T')
    repeated = same.tril(-1).any(2)
    repeated[:, : own.shape[1]] = False
    return boxes, mask & ~repeated


def _region_draws(index: Tensor, seed: int, keys: Sequence[int], sizes: Sequence[int], regions: int) -> Tensor:
    """Draws (N, Q, R) for the regions of groups of queries, each of which has a key and a size (their sum is Q)."""
    draws = [image_draws(index, (size, regions), seed, key) for key, size in zip(keys, sizes, strict=True)]
    return torch.cat(draws, dim=1)


def sentence_loss(
    sentence_generator: ChexSentenceGenerator,
    features: Tensor,
    texts: Tensor,
    tokens: TokenTable,
    collectives: Collectives,
    objective_mode: ObjectiveMode = "corrected",
    candidates: Tensor | None = None,
) -> Tensor:
    """
    The `generation_loss` of texts (S,) given features (S, D) or (S, L, D). Texts of -1 have none. With
    `objective_mode="official"`, the texts are padded to the longest of the candidates, by default themselves.
    """
    if len(tokens.lengths) == 0:
        return features.sum() * 0.0
    longest = 0
    if objective_mode == "official":
        candidates = texts if candidates is None else candidates
        longest = padded_length(tokens.lengths[candidates[candidates >= 0]], collectives)
    if len(texts) == 0:  # a generator that is spread over the processes needs all of them in every pass
        features, texts = features.sum(0, keepdim=True), texts.new_full((1,), -1)
    ids, mask = tokens(texts.clamp_min(0), longest)
    logits = sentence_generator(input_ids=ids, attention_mask=mask, features=features).logits
    written = mask * (texts[:, None] >= 0)
    return generation_loss(logits, ids, written, objective_mode, collectives)


class Outline:
    """
    Stands in for a model while a part of a step is only counted: outputs of its shapes, all zero.

    Args:
        model: Whose part it takes.
        num_images: N of this part.
    """

    def __init__(self, model: ChexModel, num_images: int):
        config = model.config
        self.num_images, self.size, self.regions = (
            num_images,
            config.projection_dim,
            config.detector_config.num_regions,
        )
        self.zeros = torch.zeros((), device=model.device)
        self.sentence_generator = GeneratorOutline()

    def get_image_features(self, pixel_values: None) -> ChexImageFeatures:
        images = self.zeros.expand(self.num_images, self.size)
        return ChexImageFeatures(pooler_output=images, patch_features=images[:, None, None])

    def get_prompt_features(self, ids: Tensor) -> Tensor:
        return self.zeros.expand(len(ids), self.size)

    def encode_boxes(self, image_features: ChexImageFeatures, boxes: Tensor) -> Tensor:
        return self.zeros.expand(*boxes.shape[:2], self.size)

    def __call__(self, image_features: ChexImageFeatures, prompt_features: Tensor, **others: object) -> ChexOutput:
        queries = (self.num_images, prompt_features.shape[1])
        return ChexOutput(
            boxes=self.zeros.expand(*queries, 4),
            query_features=self.zeros.expand(*queries, self.size),
            region_boxes=self.zeros.expand(*queries, self.regions, 4),
            region_scores=self.zeros.expand(*queries, self.regions),
            region_features=self.zeros.expand(*queries, self.regions, self.size),
        )


class GeneratorOutline:
    """The same for a sentence generator; nothing depends on the size of its vocabulary."""

    def __call__(self, input_ids: Tensor, features: Tensor, **others: object) -> SimpleNamespace:
        return SimpleNamespace(logits=(features.sum() * 0.0).expand(*input_ids.shape, 1))


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

    def forward(self, batch: Batch, seed: int, epoch: int = 0, totals: StepTotals | None = None) -> dict[str, Tensor]:
        collectives = process_collectives(totals)
        model = Outline(self.model, len(batch.images)) if collectives.counting else self.model
        scales = torch.zeros_like(self.logit_scale) if collectives.counting else self.logit_scale
        pixel_values, batch = self.prepare(batch, epoch, collectives.counting)
        image_features = model.get_image_features(pixel_values)

        # Texts and images of all processes are compared; each of them computes the whole of these two losses.
        draws = image_draws(batch.index, batch.sentences.shape[1:], seed, SENTENCES)
        chosen = batch.sentences.gather(1, random_order(batch.sentences >= 0, draws)[:, : self.sentences_per_image])
        boxes, texts, mask = self._regions(batch, seed)
        regions = soft_roi_pool(image_features.patch_features, boxes)
        # Numbers grow by one, as what is gathered is padded with zeros.
        numbers = [part + 1 for part in (batch.index, batch.sentences, chosen, texts)]
        pooled, regions, mask, *numbers = collectives.gather_all(
            [image_features.pooler_output, regions, mask, *numbers]
        )
        index, written, chosen, texts = (part - 1 for part in numbers)
        real, sentences = index >= 0, chosen[chosen >= 0].unique()
        positives = (written[real][:, :, None] == sentences).any(1)  # (N, U): sentence u is true for image n
        global_loss = self._loss(
            model, pooled[real], sentences, positives, scales[0], collectives.of("global_contrastive")
        )

        texts, own = texts[mask].unique(return_inverse=True)
        positives = F.one_hot(own, len(texts)).bool()
        region_loss = self._loss(
            model, regions[mask], texts, positives, scales[1], collectives.of("region_contrastive")
        )
        classification_loss = self._classification(
            model, image_features, batch, scales[2], collectives.of("region_classification")
        )
        return {
            "loss": global_loss + region_loss + classification_loss,
            "global_contrastive": global_loss.detach(),
            "region_contrastive": region_loss.detach(),
            "region_classification": classification_loss.detach(),
        }

    def _classification(
        self,
        model: "ChexModel | Outline",
        image_features: ChexImageFeatures,
        batch: Batch,
        logit_scale: Tensor,
        collectives: Collectives,
    ) -> Tensor:
        """Pooled patches of every annotated region choose between "X" and "No X" for every finding."""
        prompts = model.get_prompt_features(self.text_tokens(self.statements.flatten())[0])
        positive, negative = prompts.unflatten(0, self.statements.shape)
        pooled = soft_roi_pool(image_features.patch_features, batch.anatomy_boxes)
        observed = batch.anatomy_present[..., None] & batch.has_anatomy_labels[:, None]
        temperature = logit_scale.clamp(max=4.6052).neg().exp()
        return statement_loss(pooled, positive, negative, batch.anatomy_labels, observed, temperature, collectives)

    def _regions(self, batch: Batch, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (N, K, 4), their texts (N, K) and valid ones (N, K): some anatomies and all findings of each image."""
        draws = image_draws(batch.index, batch.anatomy_present.shape[1:], seed, ANATOMIES)
        order = random_order(batch.anatomy_present, draws)[:, : self.regions_per_image]
        boxes = torch.cat(
            [batch.anatomy_boxes.gather(1, order[..., None].expand(-1, -1, 4)), batch.class_boxes.flatten(1, 2)], 1
        )
        mask = torch.cat([batch.anatomy_present.gather(1, order), batch.class_box_mask.flatten(1)], 1)
        written = torch.cat([batch.anatomy_texts.gather(1, order), batch.class_phrases.flatten(1)], 1)
        count, slots = batch.class_boxes.shape[1:3]
        class_names = self.class_names.repeat_interleave(slots, 0).expand(len(order), -1, -1)
        width = max(self.region_names.shape[1], class_names.shape[2])
        names = torch.cat(
            [F.pad(part, (0, width - part.shape[2]), value=-1) for part in (self.region_names[order], class_names)], 1
        )
        of_anatomies = image_draws(batch.index, (order.shape[1], width + 1), seed, ANATOMY_TEXTS)
        of_findings = image_draws(batch.index, (slots, count, width + 1), seed, FINDING_TEXTS)
        draws = torch.cat([of_anatomies, of_findings.transpose(1, 2).flatten(1, 2)], 1)  # (N, K, width + 1)
        names = names.gather(2, random_order(names >= 0, draws[..., :-1])[..., :1]).squeeze(2)
        by_name = draws[..., -1].to(written.device) < 0.5
        texts = torch.where(by_name | (written < 0), names, written)
        return boxes, texts, mask

    def _loss(
        self,
        model: "ChexModel | Outline",
        features: Tensor,
        texts: Tensor,
        positives: Tensor,
        logit_scale: Tensor,
        collectives: Collectives,
    ) -> Tensor:
        if len(texts) == 0:
            return features.sum() * 0.0
        return _contrastive_loss(
            features, self._encode(model, texts, collectives), positives, logit_scale, collectives
        )

    def _encode(self, model: "ChexModel | Outline", texts: Tensor, collectives: Collectives) -> Tensor:
        """Features (U, D) of texts (U,), the same ones in all processes, each of which encodes a share."""
        state = PartialState()
        share = -(-len(texts) // state.num_processes)
        # the last share is filled up, so that all have the same length
        padded = torch.cat([texts, texts[-1:].expand(share * state.num_processes - len(texts))])
        ids, _ = self.text_tokens(padded[share * state.process_index :][:share])
        return collectives.gather(model.get_prompt_features(ids))[: len(texts)]


@full_precision
def _contrastive_loss(
    features: Tensor, text_features: Tensor, positives: Tensor, logit_scale: Tensor, collectives: Collectives
) -> Tensor:
    """Both directions between features (N, D) and text features (U, D), of which those in the mask (N, U) belong."""
    scale = logit_scale.clamp(max=4.6052).exp()
    logits = scale * F.normalize(features, dim=-1) @ F.normalize(text_features, dim=-1).mT
    losses = [_multi_positive_loss(logits, positives, collectives)]
    losses.append(_multi_positive_loss(logits.mT, positives.mT, collectives))
    return sum(losses) / 2


def _multi_positive_loss(logits: Tensor, positives: Tensor, collectives: Collectives) -> Tensor:
    """Mean negative log-likelihood of the positives of each row, over the rows that have any."""
    log_likelihood = (logits.log_softmax(-1) * positives).sum(-1) / positives.sum(-1).clamp_min(1)
    return -masked_mean(log_likelihood, positives.any(-1), collectives)


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
        objective_mode: ObjectiveMode = "corrected",
    ):
        super().__init__(generator)
        self.objective_mode = objective_mode
        self.text_features = text_features
        self.text_tokens = TokenTable(
            generator_tokenizer, texts, generator.config.max_generation_length, start_and_end=True
        )
        self.feature_dropout = nn.Dropout(feature_dropout)
        self.max_copies = max_copies

    def forward(self, batch: Tensor, seed: int, epoch: int = 0, totals: StepTotals | None = None) -> dict[str, Tensor]:
        collectives = process_collectives(totals)
        model = GeneratorOutline() if collectives.counting else self.model
        copies = int(torch.randint(1, self.max_copies + 1, (1,), generator=torch.Generator().manual_seed(seed)))
        features = self.feature_dropout(self.text_features(batch)[:, None].repeat(1, copies, 1))
        loss = sentence_loss(
            model, features, batch, self.text_tokens, collectives.of("generation"), self.objective_mode
        )
        return {"loss": loss, "generation": loss.detach()}


__all__ = [
    "ChexSupervision",
    "ContrastiveSupervision",
    "GeneratorSupervision",
    "PromptBank",
    "Supervision",
]
