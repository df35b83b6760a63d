"""`ChexSentenceGenerator` as a generating model of Transformers: options of `generate`, caches, checkpointing."""

import copy

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache

from modeling_chex import ChexModel, ChexSentenceGenerator

from .test_modeling import assert_same, lively_model, tiny_config


ENDLESS = {"eos_token_id": None}


@pytest.fixture(scope="module")
def model() -> ChexModel:
    return lively_model(tiny_config())


@pytest.fixture(scope="module")
def generator(model) -> ChexSentenceGenerator:
    return model.sentence_generator


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 38, (3, 6), generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}, {"do_sample": True}, {"num_beams": 2, "do_sample": True}])
def test_static_cache_equals_dynamic_cache(generator, features, arguments):
    sentences = []
    for cache in ("dynamic", "static"):
        torch.manual_seed(0)
        output = generator.generate(
            features=features, cache_implementation=cache, return_dict_in_generate=True, **arguments, **ENDLESS
        )
        sentences.append(output.sequences)
    assert isinstance(output.past_key_values, StaticCache)
    assert torch.equal(*sentences)
    assert sentences[0].shape == (3, 12)


def test_without_cache(generator, features):
    expected = generator.generate(features=features, **ENDLESS)
    assert torch.equal(generator.generate(features=features, use_cache=False, **ENDLESS), expected)


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 2}])
def test_everything_in_the_dictionary(generator, features, arguments):
    eager = copy.deepcopy(generator)  # other implementations have no attention weights
    eager.set_attn_implementation("eager")
    output = eager.generate(
        features=features,
        max_new_tokens=4,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_attentions=True,
        output_hidden_states=True,
        **arguments,
        **ENDLESS,
    )
    rows = 3 * arguments.get("num_beams", 1)
    assert output.sequences.shape == (3, 5)
    assert len(output.scores) == len(output.logits) == len(output.attentions) == len(output.hidden_states) == 4
    assert all(scores.shape == (rows, 40) for scores in output.scores)
    for step, (attentions, hidden_states) in enumerate(zip(output.attentions, output.hidden_states, strict=True)):
        assert len(attentions) == 2 and len(hidden_states) == 3
        assert attentions[0].shape == (rows, 2, 1, 3 + 1 + step)  # prefix, start token, new tokens
        assert hidden_states[0].shape == (rows, 1, 32)
    assert output.past_key_values.get_seq_length() == 3 + 4


def test_scores_are_those_of_a_forward_pass(generator, features):
    output = generator.generate(
        features=features, max_new_tokens=5, return_dict_in_generate=True, output_logits=True, **ENDLESS
    )
    with torch.no_grad():
        logits = generator(input_ids=output.sequences[:, :-1], features=features).logits
    assert_same(torch.stack(output.logits, dim=1), logits)


def test_prompts_are_continued(generator, features, ids):
    expected = generator.generate(features=features, max_new_tokens=6, **ENDLESS)
    by_name = {"input_ids": expected[:, :3], "attention_mask": torch.ones(3, 3), "max_new_tokens": 4} | ENDLESS
    assert torch.equal(generator.generate(features=features, **by_name), expected)
    embeddings = generator.get_input_embeddings()(expected[:, :3])
    from_embeddings = generator.generate(inputs_embeds=embeddings, features=features, max_new_tokens=4, **ENDLESS)
    assert torch.equal(from_embeddings, expected[:, 3:])
    alone = generator.generate(ids, max_new_tokens=3, **ENDLESS)  # no features: an unconditional language model
    assert torch.equal(alone, generator.language_model.generate(ids, max_new_tokens=3, **ENDLESS))


def test_generation_goes_on_from_a_cache(generator, features):
    expected = generator.generate(features=features, max_new_tokens=8, **ENDLESS)
    first = generator.generate(features=features, max_new_tokens=3, return_dict_in_generate=True, **ENDLESS)
    for given in ({"features": features}, {}):
        second = generator.generate(
            input_ids=first.sequences,
            attention_mask=torch.ones_like(first.sequences),
            past_key_values=copy.deepcopy(first.past_key_values),
            max_new_tokens=5,
            **given,
            **ENDLESS,
        )
        assert torch.equal(second, expected)


def test_left_padding_changes_nothing(generator, features, ids):
    expected = generator.generate(ids, features=features, attention_mask=torch.ones_like(ids), **ENDLESS)
    padded = torch.cat([torch.full((3, 4), 39), ids], dim=1)
    mask = torch.cat([torch.zeros(3, 4, dtype=torch.long), torch.ones_like(ids)], dim=1)
    sentences = generator.generate(padded, features=features, attention_mask=mask, max_length=16, **ENDLESS)
    assert torch.equal(sentences[:, 4:], expected)
    with torch.no_grad():
        plain = generator(input_ids=ids, features=features).logits
        assert_same(generator(input_ids=padded, features=features, attention_mask=mask).logits[:, 4:], plain)


@torch.no_grad()
def test_masks_may_cover_tokens_or_prefix_as_well(generator, features, ids):
    expected = generator(input_ids=ids, features=features)
    for length in (6, 9):
        masked = generator(input_ids=ids, features=features, attention_mask=torch.ones(3, length, dtype=torch.long))
        assert_same(masked.logits, expected.logits)
    step_by_step = generator(input_ids=ids[:, :4], features=features, use_cache=True)
    for mask in (None, torch.ones(3, 2), torch.ones(3, 6), torch.ones(3, 9)):
        rest = generator(
            input_ids=ids[:, 4:], attention_mask=mask, past_key_values=copy.deepcopy(step_by_step.past_key_values)
        )
        assert_same(rest.logits, expected.logits[:, 4:])


def test_prompt_lookup_equals_greedy(generator, features):
    greedy = generator.generate(features=features[:1], **ENDLESS)
    looked_up = generator.generate(features=features[:1], prompt_lookup_num_tokens=2, **ENDLESS)
    assert torch.equal(looked_up, greedy)


def test_assistant_equals_greedy(generator, features):
    """A draft model with the same features; a wrong draft costs time, never a token."""
    torch.manual_seed(1)
    assistant = ChexSentenceGenerator(generator.config).eval()
    greedy = generator.generate(features=features[:1], **ENDLESS)
    assert torch.equal(generator.generate(features=features[:1], assistant_model=assistant, **ENDLESS), greedy)


def test_length_of_a_generation_config(model, generator, features):
    config = GenerationConfig(max_new_tokens=4, eos_token_id=None)
    assert generator.generate(features=features, generation_config=config).shape == (3, 5)
    assert config.max_new_tokens == 4 and config.max_length is None  # not changed
    assert model.generate(query_features=features[None], generation_config=config).shape == (1, 3, 5)


def test_the_whole_model_saves_the_generation_config(tmp_path, model, features):
    changed = copy.deepcopy(model)
    changed.generation_config.num_beams = 2
    changed.generation_config.max_length = 7
    assert changed.sentence_generator.generation_config.num_beams == 2
    changed.save_pretrained(tmp_path)
    assert (tmp_path / "generation_config.json").exists()
    loaded = ChexModel.from_pretrained(tmp_path)
    assert loaded.can_generate() and not ChexModel.can_generate()
    assert (loaded.generation_config.num_beams, loaded.generation_config.max_length) == (2, 7)
    assert loaded.generate(query_features=features[None], **ENDLESS).shape == (1, 3, 7)
    (tmp_path / "generation_config.json").unlink()
    loaded = ChexModel.from_pretrained(tmp_path)
    assert loaded.generation_config.max_length == 12  # the default of the configuration
    assert loaded.generation_config.bos_token_id == 39


def test_a_model_without_generator_has_no_generation_config(tmp_path):
    model = ChexModel(tiny_config(2))
    assert model.generation_config is None and not model.can_generate()
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "generation_config.json").exists()
    assert ChexModel.from_pretrained(tmp_path).generation_config is None


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_gradient_checkpointing_keeps_the_prefix(generator, features, ids, use_reentrant, several):
    """Equal loss and gradients, with padding and with more than one feature for a sentence."""
    config = tiny_config(dropout=0.0).generator_config
    plain = ChexSentenceGenerator(config).train()
    plain.load_state_dict(generator.state_dict())
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert checkpointed.language_model.transformer.h[0].gradient_checkpointing
    mask = (torch.arange(6) < torch.tensor([[6], [4], [2]])).long()
    labels = plain.target_labels(ids, mask)
    conditions = torch.stack([features, features.flip(0)], dim=1) if several else features
    losses = []
    for network in (plain, checkpointed):
        loss = network(input_ids=ids, attention_mask=mask, features=conditions, labels=labels).loss
        loss.backward()
        losses.append(loss.detach())
    assert_same(*losses)
    for (name, parameter), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert (parameter.grad - other.grad).abs().max() < 1e-6, name
    assert checkpointed.prefix_projection.fc1.weight.grad.abs().max() > 0


def test_vocabulary_can_be_resized(generator, features):
    resized = copy.deepcopy(generator)
    resized.resize_token_embeddings(48)
    assert resized.config.vocab_size == 48
    assert resized.get_output_embeddings().weight is resized.get_input_embeddings().weight
    sentences = resized.generate(features=features, max_length=6, suppress_tokens=list(range(40, 48)), **ENDLESS)
    assert torch.equal(sentences, generator.generate(features=features, max_length=6, **ENDLESS))


def test_user_errors(generator, features, ids):
    with pytest.raises(ValueError, match="needs `features`"):
        generator.generate()
    with pytest.raises(ValueError, match="either `input_ids` or `inputs_embeds`"):
        generator(features=features)
    with pytest.raises(ValueError, match="either `input_ids` or `inputs_embeds`"):
        generator(input_ids=ids, inputs_embeds=generator.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="not used by the model.*num_beam"):
        generator.generate(features=features, num_beam=2)
    checkpointed = copy.deepcopy(generator).train()
    checkpointed._set_gradient_checkpointing()
    with torch.no_grad():
        cache = generator(input_ids=ids, features=features, past_key_values=DynamicCache()).past_key_values
        with pytest.raises(ValueError, match="may hold a prefix, but no tokens"):
            checkpointed(input_ids=ids, past_key_values=cache)


def test_decoding_compiles_without_graph_breaks(generator, features):
    compiled = copy.deepcopy(generator)
    compiled.forward = torch.compile(compiled.forward, backend="eager", fullgraph=True)
    sentences = compiled.generate(features=features, cache_implementation="static", max_length=6, **ENDLESS)
    assert torch.equal(sentences, generator.generate(features=features, max_length=6, **ENDLESS))
    torch._dynamo.reset()
