"""Sentences: `ChexModel.generate` for queries and `ChexSentenceGenerator` on its own, with tiny random weights."""

import copy
import logging

import pytest
import torch
from transformers import AutoConfig, GenerationConfig
from transformers.utils import ModelOutput

from modeling_chex import ChexGeneratorConfig, ChexModel, ChexSentenceGenerator
from tests.test_modeling import (
    assert_same,
    assert_same_state,
    lively_model,
    prompt_ids,
    random_boxes,
    random_inputs,
    tiny_config,
)


pytestmark = pytest.mark.filterwarnings("error")

END = 39  # start, end and padding
ENDLESS = {"suppress_tokens": [END]}  # every sentence reaches its maximal length


@pytest.fixture(scope="module")
def model() -> ChexModel:
    return lively_model(tiny_config())


@pytest.fixture(scope="module")
def generator(model) -> ChexSentenceGenerator:
    return model.sentence_generator


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    return 2 * torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def no_warnings(caplog):
    """Nothing is logged by transformers, whose logger does not propagate to the root logger."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)
    records = caplog.get_records("call")
    assert not [record.getMessage() for record in records if record.levelno >= logging.WARNING]


def words(sequence: torch.Tensor) -> list[int]:
    """Token ids without the start token, up to the end token."""
    ids = sequence.tolist()[1:]
    return ids[: ids.index(END)] if END in ids else ids


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ({}, (2, 4, 12)),  # `max_generation_length`
        ({"max_length": 7}, (2, 4, 7)),
        ({"max_new_tokens": 5}, (2, 4, 6)),
        ({"max_new_tokens": 15}, (2, 4, 16)),
        ({"max_length": 7, "num_beams": 3}, (2, 4, 7)),
        ({"max_length": 7, "do_sample": True, "top_k": 5}, (2, 4, 7)),
        ({"max_length": 7, "do_sample": True, "num_return_sequences": 3}, (2, 4, 3, 7)),
        ({"max_length": 7, "num_beams": 3, "num_return_sequences": 2}, (2, 4, 2, 7)),
        ({"generation_config": GenerationConfig(max_new_tokens=4, **ENDLESS)}, (2, 4, 5)),
        ({"generation_config": GenerationConfig(max_length=6, num_beams=2, **ENDLESS)}, (2, 4, 6)),
    ],
)
def test_shapes(model, features, no_warnings, arguments, shape):
    torch.manual_seed(0)
    if "generation_config" not in arguments:  # the library wants the one or the other
        arguments = arguments | ENDLESS
    before = copy.deepcopy(arguments)
    sequences = model.generate(query_features=features, **arguments)
    assert arguments == before
    assert sequences.shape == shape
    assert sequences.dtype == torch.long
    assert (sequences[..., 0] == END).all()
    assert (sequences[..., 1:] != END).all()


def test_padded_queries_hold_padding_only(model, features, no_warnings):
    mask = torch.tensor([[True, False, True, True], [False, True, False, False]])
    everything = model.generate(query_features=features, **ENDLESS)
    for padded in (mask, mask.long()):
        sequences = model.generate(query_features=features, query_mask=padded, **ENDLESS)
        assert torch.equal(sequences[mask], everything[mask])
        assert (sequences[~mask] == END).all()
    shared = model.generate(query_features=features, query_mask=mask[0], **ENDLESS)
    assert torch.equal(shared[:, [0, 2, 3]], everything[:, [0, 2, 3]])
    assert (shared[:, 1] == END).all()
    several = model.generate(
        query_features=features, query_mask=mask, num_beams=2, num_return_sequences=2, max_length=6, **ENDLESS
    )
    assert several.shape == (2, 4, 2, 6)
    assert (several[~mask] == END).all()
    single = model.generate(
        query_features=features[:1, 2:3], num_beams=2, num_return_sequences=2, max_length=6, **ENDLESS
    )
    assert torch.equal(several[0, 2], single[0, 0])


def test_no_valid_query(model, features, no_warnings):
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    for arguments in ({}, {"num_return_sequences": 2, "num_beams": 2}, {"return_dict_in_generate": True}):
        sequences = model.generate(query_features=features, query_mask=nothing, **arguments)
        assert sequences.shape == (2, 4, 0)
        assert sequences.dtype == torch.long
    assert model.generate(query_features=features[:, :0]).shape == (2, 0, 0)
    pixel_values = random_inputs()["pixel_values"]
    assert model.generate(pixel_values=pixel_values, query_boxes=random_boxes()[:, :0]).shape == (2, 0, 0)


def test_dictionary_with_scores(model, features):
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    output = model.generate(
        query_features=features,
        query_mask=mask,
        max_length=6,
        return_dict_in_generate=True,
        output_scores=True,
        **ENDLESS,
    )
    assert isinstance(output, ModelOutput)
    assert output.sequences.shape == (2, 4, 6)
    assert len(output.scores) == 5
    assert all(step.shape == (4, 40) for step in output.scores)
    best = torch.stack([step.argmax(-1) for step in output.scores], dim=1)
    assert torch.equal(output.sequences[mask][:, 1:], best)


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}])
def test_a_batch_equals_its_sentences_one_by_one(generator, features, no_warnings, arguments):
    flat = features.flatten(0, 1)
    together = generator.generate(features=flat, **arguments)
    assert len({tuple(words(sequence)) for sequence in together}) > 1  # the features matter
    for feature, sequence in zip(flat, together, strict=True):
        assert words(generator.generate(features=feature[None], **arguments)[0]) == words(sequence)


def test_queries_from_images(model, no_warnings):
    ids, mask = prompt_ids(3)
    inputs = {
        "pixel_values": random_inputs()["pixel_values"],
        "input_ids": ids,
        "attention_mask": mask,
        "query_mask": torch.tensor([[True, True, True], [True, False, True]]),
        "query_boxes": random_boxes(),
        "box_mask": torch.tensor([[True, False, False], [True, True, True]]),
    }
    unused = {"image_frames": torch.zeros(2, 4), "original_sizes": torch.zeros(2, 2, dtype=torch.long)}
    sequences = model.generate(**inputs, **unused, max_length=8, **ENDLESS)
    assert sequences.shape == (2, 6, 8)
    output = model(**inputs)
    again = model.generate(query_features=output.query_features, query_mask=output.query_mask, max_length=8, **ENDLESS)
    assert torch.equal(sequences, again)
    inputs["image_features"] = model.get_image_features(inputs.pop("pixel_values"))
    assert torch.equal(sequences, model.generate(**inputs, max_length=8, **ENDLESS))
    assert not output.query_mask.all()
    assert (sequences[~output.query_mask] == END).all()


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_teacher_forced_logits_equal_those_of_each_step(generator, features, use_cache, offset):
    generator = copy.deepcopy(generator)
    generator.config.position_offset = offset
    flat = features.flatten(0, 1)
    output = generator.generate(
        features=flat,
        max_length=9,
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_logits=True,
        **ENDLESS,
    )
    forced = generator(input_ids=output.sequences, features=flat).logits
    assert_same(torch.stack(output.logits, dim=1), forced[:, :-1])
    padded = torch.cat([output.sequences, torch.full((8, 2), END)], dim=1)
    mask = (torch.arange(11) < 9).long().expand(8, -1)
    assert_same(generator(input_ids=padded, attention_mask=mask, features=flat).logits[:, :9], forced)


@torch.no_grad()
def test_loss_ignores_padding(generator, features):
    flat = features.flatten(0, 1)
    ids = torch.randint(0, 38, (8, 5), generator=torch.Generator().manual_seed(6))
    mask = torch.ones_like(ids)
    padded, padded_mask = torch.nn.functional.pad(ids, (0, 3), value=END), torch.nn.functional.pad(mask, (0, 3))
    losses = {}
    for ignore in (True, False):
        labels = generator.target_labels(padded, padded_mask, ignore_padding=ignore)
        output = generator(input_ids=padded, attention_mask=padded_mask, features=flat, labels=labels)
        losses[ignore] = output.loss
    short = generator(input_ids=ids, features=flat, labels=ids)
    assert_same(losses[True], short.loss)
    assert (losses[False] - short.loss).abs() > 1e-3
    by_hand = torch.nn.functional.cross_entropy(short.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_same(short.loss, by_hand)


def test_several_features_for_one_sentence(generator, features, no_warnings):
    sequences = generator.generate(features=features, max_length=6, **ENDLESS)  # two sentences, four features each
    assert sequences.shape == (2, 6)
    cache = generator.prefix_cache(features)
    assert cache.get_seq_length() == 4 * 3


def test_generation_without_generator_or_features(generator):
    inputs = random_inputs()
    for stage in (1, 2):
        earlier = ChexModel(tiny_config(stage)).eval()
        with pytest.raises(ValueError, match="no sentence generator.*Load a model of stage 3"):
            earlier.generate(**inputs)
    with pytest.raises(ValueError, match="needs `features`"):
        generator.generate(max_length=5)


def test_generation_config_is_saved(tmp_path, generator, features):
    assert generator.generation_config.max_length == 12
    changed = copy.deepcopy(generator)
    changed.generation_config.max_length = 9
    changed.generation_config.num_beams = 2
    changed.save_pretrained(tmp_path)
    assert (tmp_path / "generation_config.json").exists()
    loaded = ChexSentenceGenerator.from_pretrained(tmp_path)
    assert (loaded.generation_config.max_length, loaded.generation_config.num_beams) == (9, 2)
    assert loaded.generate(features=features[0], **ENDLESS).shape == (4, 9)


def test_generator_alone(tmp_path, model, generator, features):
    generator.save_pretrained(tmp_path)
    loaded, info = ChexSentenceGenerator.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same_state(loaded, generator)
    assert loaded.language_model.lm_head.weight is loaded.language_model.transformer.wte.weight
    assert isinstance(AutoConfig.from_pretrained(tmp_path), ChexGeneratorConfig)
    ours, theirs = generator.config.to_dict(), loaded.config.to_dict()
    assert {key for key in ours if ours[key] != theirs[key]} <= {"_name_or_path", "architectures", "dtype"}
    flat = features.flatten(0, 1)
    assert torch.equal(loaded.generate(features=flat, **ENDLESS), generator.generate(features=flat, **ENDLESS))


def test_whole_model_keeps_its_default_length(tmp_path, model, features):
    model.save_pretrained(tmp_path)
    loaded = ChexModel.from_pretrained(tmp_path)
    assert loaded.sentence_generator.generation_config.max_length == 12
    assert loaded.generate(query_features=features, **ENDLESS).shape == (2, 4, 12)


def test_resized_vocabulary(tmp_path, model, features):
    larger = copy.deepcopy(model)
    generator = larger.sentence_generator
    torch.manual_seed(0)
    generator.resize_token_embeddings(45)
    assert generator.get_input_embeddings().weight.shape == (45, 32)
    assert generator.get_output_embeddings().weight is generator.get_input_embeddings().weight
    assert torch.equal(
        generator.get_input_embeddings().weight[:40], model.sentence_generator.get_input_embeddings().weight
    )
    assert larger.config.generator_config.vocab_size == 45
    assert larger.config.text_config.vocab_size == 60
    ids = torch.tensor([[END, 44, 2]])
    assert generator(input_ids=ids, features=features[0, :1]).logits.shape == (1, 3, 45)
    larger.save_pretrained(tmp_path)
    assert_same_state(ChexModel.from_pretrained(tmp_path), larger)
