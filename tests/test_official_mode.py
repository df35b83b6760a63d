"""`objective_mode=official`: what is wrong in the official training is right by default, and comes back with it."""

from types import SimpleNamespace

import datasets
import pytest
import torch
from torch import nn
from transformers import GPT2Tokenizer

import training.supervision as supervision_module
from modeling_chex import ChexModel
from processing_chex import ChexProcessor
from processing_chex.prompt_sets import prompts_for_classes
from processing_chex.vocabulary import MULTI_ANATOMY_MEMBERS, PHANTOM_CLASSES
from tests.conftest import GOLDEN_DIR
from tests.test_cli import save_tiny_model
from tests.test_objectives import NAIVE
from training import pretrain_clip, stage1
from training.collate import RecordDataset, TextTable
from training.configuration import AugmentationConfig, ObjectiveConfig, OptimizationConfig, StageConfig
from training.data.phantom import phantom_record
from training.data.record import record_features
from training.loop import learning_rate_factor
from training.model_setup import set_trainable
from training.objectives import (
    SINGLE_PROCESS,
    ObjectiveWeights,
    SentenceOptions,
    generation_loss,
    image_draws,
    padded_length,
    subsample_classes,
)
from training.pretrain_generator import start
from training.supervision import REGION_DROP, ROI_SKIP, ChexSupervision, sentence_loss
from training.text_features import TokenTable
from training.transforms import Augmentation


WEIGHTS = ObjectiveWeights(
    sentence_contrastive=1.0,
    pathology_detection=1.0,
    pathology_classification=1.0,
    anatomy_detection=1.0,
    sentence_generation=1.0,
)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A tiny model of stage 3 with its processor, and six phantom studies."""
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), stage=3)
    processor = ChexProcessor.from_pretrained(folder)
    torch.manual_seed(0)
    rows = [phantom_record(5, number, size=64) for number in range(6)]
    texts = TextTable()
    records = datasets.Dataset.from_list(rows, features=record_features(PHANTOM_CLASSES))
    data = RecordDataset(records, processor.image_processor, texts)
    return SimpleNamespace(
        folder=folder,
        model=ChexModel.from_pretrained(folder),
        processor=processor,
        texts=texts,
        batch=data.__getitems__(range(6))[0],
    )


def supervise(setting, mode, **objectives):
    """The supervision of the tiny model, in train mode, and with the augmentation that is the default."""
    options = {"weights": WEIGHTS, "classes_per_step": 2, "anatomies_per_step": None} | objectives
    return ChexSupervision(
        setting.model,
        setting.processor.image_processor,
        setting.processor.tokenizer,
        setting.processor.generator_tokenizer,
        prompts_for_classes(PHANTOM_CLASSES),
        setting.texts,
        ObjectiveConfig(**options),
        Augmentation(AugmentationConfig(), seed=3),
        objective_mode=mode,
    ).train()


def spy(monkeypatch, owner, name):
    """Keeps the arguments of all calls of a function."""
    calls, function = [], getattr(owner, name)

    def called(*args, **kwargs):
        calls.append((args, kwargs))
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, called)
    return calls


# --- the generator's loss


@pytest.fixture(scope="module")
def recorded(golden, golden_info):
    """Recorded features of the sentences, and the texts that they should become, as numbers of a table."""
    folder = GOLDEN_DIR / "gpt_tokenizer"
    tokenizer = GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    special = "<|endoftext|>"
    tokenizer.add_special_tokens({"bos_token": special, "eos_token": special, "pad_token": special})
    places = golden["sup/sent/sentence_mask"].nonzero().tolist()
    texts = [golden_info["supervisor_sentences"][n][s] for n, s in places]
    features = golden["sup/sent/region_features"][golden["sup/sent/sentence_mask"]]
    return features, TokenTable(tokenizer, texts, 128, start_and_end=True), torch.arange(len(texts))


@torch.no_grad()
def test_recorded_generation_loss_counts_the_padding(golden, golden_model, recorded):
    features, tokens, numbers = recorded
    generator = golden_model.sentence_generator
    official = sentence_loss(generator, features, numbers, tokens, SINGLE_PROCESS, "official")
    torch.testing.assert_close(official, golden["sup/sent/sent_gen"], rtol=1e-5, atol=1e-5)

    ids, mask = tokens(numbers)
    likelihood = generator(input_ids=ids, attention_mask=mask, features=features).logits.log_softmax(-1)
    chosen = likelihood[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    lengths = mask.sum(1)
    assert lengths.min() < lengths.max(), "there is padding"
    expected = -sum(row[: length - 1].sum() for row, length in zip(chosen, lengths, strict=True)) / (lengths - 1).sum()
    right = sentence_loss(generator, features, numbers, tokens, SINGLE_PROCESS)
    torch.testing.assert_close(right, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(official, -chosen.mean(), rtol=1e-5, atol=1e-5)
    assert abs(official - right) > 1e-3


@torch.no_grad()
def test_the_official_padding_is_that_of_all_candidates(golden_model, recorded):
    """Also of those that are not chosen, so that the loss of one text depends on others."""
    features, tokens, numbers = recorded
    shortest, longest = tokens.lengths.argmin(), int(tokens.lengths.max())
    one = slice(int(shortest), int(shortest) + 1)

    def loss(mode, candidates):
        generator = golden_model.sentence_generator
        arguments = (features[one], numbers[one], tokens, SINGLE_PROCESS, mode, candidates)
        return sentence_loss(generator, *arguments).item()

    assert loss("corrected", numbers) == loss("corrected", None) == loss("official", None)
    ids, mask = tokens(numbers[one], longest)
    assert ids.shape[1] == longest > mask.sum()
    logits = golden_model.sentence_generator(input_ids=ids, attention_mask=mask, features=features[one]).logits
    expected = -logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).mean()
    assert loss("official", numbers) == pytest.approx(expected.item(), rel=1e-5) != loss("corrected", numbers)
    assert padded_length(torch.tensor([3, 9, 4])) == 9
    assert padded_length(torch.zeros(0, dtype=torch.int64)) == 0


def test_stand_ins_have_no_generation_loss():
    logits = torch.randn(2, 4, 7, requires_grad=True)
    ids, mask = torch.tensor([[1, 2, 3, 1], [1, 4, 1, 1]]), torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    for mode in ("corrected", "official"):
        loss = generation_loss(logits, ids, mask, mode)
        expected = nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
        torch.testing.assert_close(loss, expected)
        nothing = generation_loss(logits, ids, torch.zeros_like(mask), mode)
        (gradient,) = torch.autograd.grad(nothing, logits)
        assert nothing == 0 and not gradient.any()


# --- targets and queries


@pytest.mark.parametrize("mode", ["corrected", "official"])
def test_boxes_of_pairs_follow_the_image(setting, monkeypatch, mode):
    calls = spy(monkeypatch, supervision_module, "anatomy_objective")
    supervision = supervise(setting, mode)
    with torch.no_grad():
        supervision(setting.batch, seed=1, epoch=0)
    (_, given), members = calls[0], torch.tensor(MULTI_ANATOMY_MEMBERS)
    recorded = setting.batch.anatomy_boxes, setting.batch.anatomy_present
    moved = supervision.augmentation.geometry(supervision.augmentation.draws(setting.batch.index)).boxes(*recorded)
    assert (moved[0] - recorded[0]).abs().max() > 0.05
    assert torch.equal(given["target_boxes"], moved[0])
    boxes, present = recorded if mode == "official" else moved
    assert torch.equal(given["multi_target_boxes"], boxes[:, members])
    assert torch.equal(given["multi_target_mask"], present[:, members])


def test_classes_of_boxes_and_labels_are_drawn_apart(setting):
    """Officially twice; the queries are those of both draws."""
    right, official = (supervise(setting, mode) for mode in ("corrected", "official"))
    available = torch.ones(len(PHANTOM_CLASSES), dtype=torch.bool)
    sizes = {"corrected": [], "official": []}
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        boxes, labels = right._choose_classes(setting.batch, torch.Generator().manual_seed(seed), SINGLE_PROCESS)
        first = subsample_classes(available, 2, generator)
        assert torch.equal(boxes, first) and torch.equal(labels, first)
        sizes["corrected"].append(int((boxes | labels).sum()))
        boxes, labels = official._choose_classes(setting.batch, torch.Generator().manual_seed(seed), SINGLE_PROCESS)
        assert torch.equal(boxes, first) and torch.equal(labels, subsample_classes(available, 2, generator))
        sizes["official"].append(int((boxes | labels).sum()))
    assert sum(sizes["official"]) > 1.4 * sum(sizes["corrected"])


def test_only_drawn_classes_are_supervised(setting, monkeypatch):
    calls = spy(monkeypatch, supervision_module, "pathology_objective")
    supervision, differs = supervise(setting, "official"), False
    for seed in range(4):
        with torch.no_grad():
            supervision(setting.batch, seed=seed)
        arguments, _ = calls[-1]
        has_boxes, has_labels = arguments[8].any(0), arguments[10].any(0)
        assert (has_boxes | has_labels).all(), "nothing else is asked for"
        differs |= not torch.equal(has_boxes, has_labels)
    assert differs
    boxes, labels = supervise(
        setting, "official", weights=ObjectiveWeights(pathology_classification=1.0)
    )._choose_classes(setting.batch, torch.Generator().manual_seed(0), SINGLE_PROCESS)
    assert labels.any() and not boxes.any()


@pytest.mark.parametrize("mode", ["corrected", "official"])
def test_validation_draws_nothing(setting, monkeypatch, mode):
    """Officially, skip connections and dropped regions are drawn there as well."""
    supervision = supervise(setting, mode).eval()
    calls = spy(monkeypatch, setting.model, "forward")
    with torch.no_grad():
        first, second = (supervision(setting.batch, seed=seed)["loss"].item() for seed in (0, 1))
    _, given = calls[0]
    if mode == "corrected":
        assert given["roi_skip"] is True and given["region_keep_mask"] is None
        return
    assert first != second
    sentences = int((setting.batch.sentences >= 0).sum(1).max())
    count, regions = given["prompt_features"].shape[1], setting.model.config.detector_config.num_regions
    skip = image_draws(setting.batch.index, (sentences, regions), 0, ROI_SKIP["sentences"]) < 0.25
    assert torch.equal(given["roi_skip"].view(6, count, regions)[:, :sentences], skip)
    drop = setting.model.config.post_decoder_config.region_drop
    kept = image_draws(setting.batch.index, (sentences, regions), 0, REGION_DROP["sentences"]) >= drop
    assert drop > 0 and torch.equal(given["region_keep_mask"][:, :sentences], kept)


def test_terms_are_those_of_the_answers_and_annotations(setting, monkeypatch):
    """
    From what the model answers to all queries and what is annotated, by plain loops: each term gets its own. The
    generator's losses are those of the recordings above.
    """
    names = [*WEIGHTS.active() - {"sentence_generation"}, "global_contrastive", "sentence_mse", "anatomy_mse"]
    names += ["anatomy_classification"]
    weights = ObjectiveWeights(**dict.fromkeys(names, 1.0))
    supervision, batch = supervise(setting, "corrected", weights=weights).eval(), setting.batch
    answers, answer = {}, supervision._answer

    def keep(model, image_features, *args):
        answers.update(answer(model, image_features, *args), patches=image_features.patch_features)
        return answers

    monkeypatch.setattr(supervision, "_answer", keep)
    with torch.no_grad():
        losses = supervision(batch, seed=0)
    texts = supervision.text_features
    columns = (batch.sentences >= 0).any(0)
    prompts = {"positive": supervision.positives.mean(), "negative": supervision.negatives.mean()}
    count = batch.anatomy_boxes.shape[1]
    members = torch.tensor(MULTI_ANATOMY_MEMBERS)
    known = batch.anatomy_sentences >= 0
    single, every = (
        {name: value[:, part] for name, value in answers["anatomies"].items()}
        for part in (slice(0, count), slice(count, None))
    )
    inputs = (
        {
            "query_features": answers["sentences"]["query_features"],
            "sentence_features": texts(batch.sentences[:, columns]),
            "sentence_mask": batch.sentences[:, columns] >= 0,
            "patch_features": answers["patches"],
        },
        answers["classes"]
        | prompts
        | {
            "target_boxes": batch.class_boxes,
            "target_mask": batch.class_box_mask,
            "has_boxes": batch.has_class_boxes,
            "labels": batch.class_labels,
            "has_labels": batch.has_class_labels,
        },
        prompts
        | {
            "query_features": single["query_features"],
            "region_boxes": single["region_boxes"],
            "present": batch.anatomy_present,
            "has_boxes": batch.has_anatomy_boxes[:, None].expand(-1, count),
            "target_boxes": batch.anatomy_boxes,
            "multi_region_boxes": every["region_boxes"],
            "multi_region_scores": every["region_scores"],
            "multi_target_boxes": batch.anatomy_boxes[:, members],
            "multi_target_mask": batch.anatomy_present[:, members],
            "labels": batch.anatomy_labels,
            "has_labels": batch.has_anatomy_labels[:, None].expand(-1, count, -1),
            "sentence_features": texts(batch.anatomy_sentences).sum(2) / known.sum(2).clamp_min(1)[..., None],
            "has_sentences": known.any(2),
        },
    )
    for naive, own in zip(NAIVE, inputs, strict=True):
        own = {name: v.double() if v.is_floating_point() else v for name, v in own.items()}
        for name, value in naive(own).items():
            assert losses[name].item() == pytest.approx(value, rel=1e-4), name
            assert value > 0, f"{name} is put to the test"
    total = sum(losses[name].item() for name in weights.active())
    assert losses["loss"].item() == pytest.approx(total, rel=1e-5)


def test_boxes_of_anatomies_are_learned_from_names(setting):
    """Steps that ask by box have no such term, so that nothing must depend on them alone."""
    only = ObjectiveWeights(anatomy_detection=1.0, anatomy_presence=0.5)
    for encoding, weights in (("bbox", only), ("bbox", WEIGHTS), ("random", only)):
        with pytest.raises(ValueError, match=f"anatomy_detection .*cannot be learned .*region_encoding={encoding}"):
            supervise(setting, "corrected", weights=weights, region_encoding=encoding)
    supervise(setting, "corrected", weights=only)
    supervision = supervise(setting, "corrected", region_encoding="random")
    with torch.no_grad():
        found = {"anatomy_detection" in supervision(setting.batch, seed=seed) for seed in range(6)}
    assert found == {True, False}


# --- what surrounds the objectives


def test_official_learning_rates():
    options = OptimizationConfig(warmup_steps=4, learning_rate=1e-2, min_learning_rate=0.0)
    factors = [learning_rate_factor(update, 8, options, official=True) for update in range(6)]
    # behind update j the rate of j is set, which update j + 1 uses; at step 4 of 8, the cosine is halfway
    assert factors == pytest.approx([0, 0, 1 / 4, 2 / 4, 3 / 4, 1 / 2])
    assert [learning_rate_factor(update, 8, options) for update in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    options = OptimizationConfig(warmup_steps=4, gradient_accumulation_steps=2)
    # with two batches to an update, of 8 batches of warm-up: 0 at first, then those of the batches 1, 3, 5
    factors = [learning_rate_factor(update, 8, options, official=True) for update in range(4)]
    assert factors == pytest.approx([0, 1 / 8, 3 / 8, 5 / 8])
    options = OptimizationConfig(warmup_steps=0, min_learning_rate=0.0)
    assert learning_rate_factor(0, 8, options, official=True) == 1


def test_the_norm_before_frozen_blocks(setting):
    vision = setting.model.vision_model
    set_trainable(setting.model, ["vision_model", "detector"], 2)
    assert not vision.pre_layrnorm.weight.requires_grad
    set_trainable(setting.model, ["vision_model", "detector"], 2, first_norm=True)
    assert vision.pre_layrnorm.weight.requires_grad and vision.pre_layrnorm.bias.requires_grad
    assert not any(p.requires_grad for part in (vision.embeddings, vision.post_layernorm) for p in part.parameters())
    set_trainable(setting.model, ["detector"], 2, first_norm=True)
    assert not vision.pre_layrnorm.weight.requires_grad


def test_activation_of_generator_pretraining(setting):
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "prefix_hidden_size": 8, "prefix_dropout": 0.0}
    features = torch.randn(3, 1, 16)
    for mode, activation in (("corrected", nn.functional.gelu), ("official", nn.functional.relu)):
        config = StageConfig(objective_mode=mode, model=sizes)
        generator, _ = start(config, 16, setting.processor)
        network = generator.prefix_projection
        expected = network.fc2(activation(network.fc1(features)))
        torch.testing.assert_close(network(features).flatten().sort()[0], expected.flatten().sort()[0])
        assert generator.config.prefix_act == "gelu", "as stage 3 uses it"
    chosen = StageConfig(objective_mode="official", model=sizes | {"prefix_act": "silu"})
    network = start(chosen, 16, setting.processor)[0].prefix_projection
    torch.testing.assert_close(network.activation_fn(features), nn.functional.silu(features))


def test_stage_1_can_start_with_the_official_attention(setting, monkeypatch):
    """A property of the model, which is saved with it."""
    built = []
    monkeypatch.setattr(stage1, "supervised_stage", lambda config, model, processor: built.append(model))
    for choice in ({}, {"attention_mode": "legacy"}):
        stage1.build(StageConfig(init_from=str(setting.folder), model=choice))
    assert [model.config.attention_mode for model in built] == ["grouped", "legacy"]
    with pytest.raises(ValueError, match="unknown key 'attention_mod'. Did you mean 'attention_mode'?"):
        stage1.build(StageConfig(init_from=str(setting.folder), model={"attention_mod": "legacy"}))


def test_contrastive_pretraining_has_no_official_mode():
    with pytest.raises(ValueError, match="objective_mode=official has no effect in contrastive pre-training"):
        pretrain_clip.build(StageConfig(objective_mode="official"))


# --- options that are right in both modes


@pytest.mark.parametrize("identical_negatives", [True, False])
def test_identical_sentences_as_negatives(setting, monkeypatch, identical_negatives):
    calls = spy(monkeypatch, supervision_module, "sentence_objective")
    options = SentenceOptions(identical_negatives=identical_negatives)
    with torch.no_grad():
        losses = supervise(setting, "corrected", sentence=options).eval()(setting.batch, seed=0)
    ids = calls[0][1]["sentence_ids"]
    if identical_negatives:
        assert ids is None
        return
    assert torch.equal(ids, setting.batch.sentences)
    known = ids[ids >= 0]
    assert len(known.unique()) < len(known), "some sentences occur twice"
    with torch.no_grad():
        paper = supervise(setting, "corrected").eval()(setting.batch, seed=0)
    assert losses["sentence_contrastive"] < paper["sentence_contrastive"]


def phrase_batch():
    """Three images with two classes of two boxes; phrase 7 stands under both classes in the first image."""
    boxes = torch.arange(48, dtype=torch.float32).view(3, 2, 2, 4) / 100
    boxes[0, 1, 1] = boxes[0, 0, 0]  # the same box twice
    phrases = torch.tensor([[[7, 5], [7, 7]], [[-1, -1], [8, -1]], [[-1, -1], [-1, -1]]])
    mask = torch.tensor([[[1, 1], [1, 1]], [[0, 0], [1, 0]], [[0, 0], [0, 0]]]).bool()
    labels = torch.tensor([[1, 1], [0, 1], [0, 0]])
    return SimpleNamespace(
        class_boxes=boxes,
        class_phrases=phrases,
        class_box_mask=mask,
        class_labels=labels,
        has_class_labels=torch.ones(3, 2, dtype=torch.bool),
        index=torch.arange(3),
    )


def test_a_phrase_of_several_classes_has_the_boxes_of_all():
    batch, seen, false = phrase_batch(), set(), set()
    for seed in range(40):
        shared = torch.Generator().manual_seed(seed)
        phrases, boxes, mask = ChexSupervision._choose_phrases(None, batch, seed, shared, SINGLE_PROCESS)
        found = {tuple(box.tolist()) for box in boxes[0, 0][mask[0, 0]]}
        written = batch.class_phrases[0] == phrases[0, 0]
        assert found == {tuple(box.tolist()) for box in batch.class_boxes[0][written]}
        assert mask[0, 0].sum() == len(found), "the same box counts once"
        seen.add(int(phrases[0, 0]))
        # class 1 is present in the second image, so that the phrase about both classes may be true there
        assert phrases[1, 1] != 7
        false |= set(phrases[2:, 1].tolist())
        assert not mask[:, 1].any() and phrases[2, 0] == -1
    assert seen == {5, 7} and {7, 8} <= false


def test_pixels_are_scaled_exactly(setting):
    images = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(images.float().div_(255), images.float() / 255)
    batch = setting.batch
    before = batch.images.clone()
    supervision = supervise(setting, "corrected").eval()
    pixels, _ = supervision.prepare(batch, 0)
    expected = (batch.images.float() / 255 - supervision.image_mean) / supervision.image_std
    assert torch.equal(pixels, expected.expand(-1, 3, -1, -1))
    assert torch.equal(batch.images, before)
