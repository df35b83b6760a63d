"""
The test mixins that Transformers keeps for its own models, pointed at ChEX.

They are not part of the installed library, only of its source distribution, so these tests are skipped unless
`CHEX_TRANSFORMERS_TESTS` names an unpacked source tree of the installed version. `make test-slow` fetches it.

docs/contract.md lists what is overridden here and why.
"""

import importlib
import os
import sys
import types
import unittest
import unittest.mock
from pathlib import Path

import pytest
import torch
import transformers
from transformers import set_seed

from modeling_chex import ChexConfig, ChexGeneratorConfig, ChexModel, ChexSentenceGenerator
from processing_chex import ChexImageProcessor, ChexProcessor
from training.build_tokenizers import build_tokenizers

from .test_modeling import END_OF_TEXT, tiny_config


SOURCE = os.environ.get("CHEX_TRANSFORMERS_TESTS")
if not SOURCE:
    pytest.skip(
        "CHEX_TRANSFORMERS_TESTS does not name an unpacked transformers source tree, which holds the mixins",
        allow_module_level=True,
    )
pytest.importorskip("parameterized", reason="the mixins need the package `parameterized`")
pytestmark = pytest.mark.slow
# The mixins use markers of their own, and `--strict-markers` would refuse them. Pytest has no public way to register
# one from a test module.
for marker in ("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test"):
    pytest.mark._config.addinivalue_line("markers", f"{marker}: of the upstream tests")


def provide(name: str, **contents):
    """A module in place of one that the source distribution lacks."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        module = types.ModuleType(name)
        module.__dict__.update(contents)
        sys.modules[name] = module


def upstream(name: str) -> types.ModuleType:
    """A module of the upstream `tests` package, under another name than our own `tests`."""
    return importlib.import_module(f"upstream_tests.{name}")


package = types.ModuleType("upstream_tests")
package.__path__ = [str(Path(SOURCE).resolve() / "tests")]
sys.modules["upstream_tests"] = package
for parent in ("generation", "exporters", "utils"):
    provide(f"upstream_tests.{parent}", __path__=[])
# A git checkout has the first two; the source distribution holds the test modules of its top folder only.
provide("upstream_tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
provide("upstream_tests.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
provide(
    "upstream_tests.utils.test_configuration_utils",
    config_common_kwargs={
        "return_dict": False,
        "output_hidden_states": True,
        "output_attentions": True,
        "dtype": "float16",
        "chunk_size_feed_forward": 5,
        "architectures": ["BertModel"],
        "problem_type": "regression",
        "id2label": {0: "label"},
        "label2id": {"label": "0"},
        "name_or_path": "some/path",
    },
)
provide("fetch_hub_objects_for_ci", url_to_local_path=lambda url: url)

ModelTesterMixin = upstream("test_modeling_common").ModelTesterMixin
GenerationTesterMixin = upstream("generation.test_utils").GenerationTesterMixin
# It would import the package from the source tree beside its file, which is not complete either.
with unittest.mock.patch("transformers.utils.direct_transformers_import", return_value=transformers):
    ConfigTester = upstream("test_configuration_common").ConfigTester
ProcessorTesterMixin = upstream("test_processing_common").ProcessorTesterMixin
image_processing_common = upstream("test_image_processing_common")


class ChexModelTester:
    """Images with three prompts each. The layers are one block of the detector and one of the post decoder."""

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent
        self.batch_size = 3
        self.num_hidden_layers = 2
        self.hidden_size = 16
        self.num_attention_heads = 4
        self.encoder_seq_length = 3  # tokens of a query, which attend to each other
        self.is_training = False  # the losses of ChEX live in `training.objectives`

    def get_config(self) -> ChexConfig:
        config = tiny_config()
        config.detector_config.num_layers = 1
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[ChexConfig, dict[str, torch.Tensor]]:
        ids = torch.randint(0, 50, (self.batch_size, 3, 8))
        ids[..., 0], ids[..., 6:] = END_OF_TEXT - 1, END_OF_TEXT
        inputs = {
            "pixel_values": torch.randn(self.batch_size, 3, 32, 32),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "query_mask": torch.ones(self.batch_size, 3, dtype=torch.bool),
        }
        return self.get_config(), inputs


class ChexModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (ChexModel,)
    test_can_init_all_missing_weights_before_2023 = True
    _is_composite = True
    additional_model_inputs = ["input_ids"]

    def setUp(self):
        set_seed(0)
        self.model_tester = ChexModelTester(self)
        self.config_tester = ConfigTester(
            self, config_class=ChexConfig, has_text_modality=False, common_properties=["projection_dim"]
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_hidden_states_output(self):
        self.model_tester.encoder_seq_length = 9  # hidden states hold the tokens of all queries
        super().test_hidden_states_output()

    @unittest.skip("Subtracts every output tensor, also the boolean ones; `test_contract_model.py` has its twin.")
    def test_model_outputs_equivalence(self):
        pass


class ChexSentenceGeneratorTester:
    """Token ids with one conditioning feature for each sentence."""

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent
        self.batch_size = 3
        self.seq_length = 7
        self.key_length = 7 + 3  # with the prefix
        self.num_hidden_layers = 2
        self.hidden_size = 32
        self.num_attention_heads = 2
        self.is_training = True

    def get_config(self) -> ChexGeneratorConfig:
        return tiny_config().generator_config

    def prepare_config_and_inputs_for_common(self) -> tuple[ChexGeneratorConfig, dict[str, torch.Tensor]]:
        ids = torch.randint(0, 38, (self.batch_size, self.seq_length))
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "features": torch.randn(self.batch_size, 16),
        }
        return self.get_config(), inputs


class ChexSentenceGeneratorTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (ChexSentenceGenerator,)
    test_can_init_all_missing_weights_before_2023 = True
    additional_model_inputs = ["features"]

    def setUp(self):
        set_seed(0)
        self.model_tester = ChexSentenceGeneratorTester(self)
        self.config_tester = ConfigTester(self, config_class=ChexGeneratorConfig, n_embd=37, n_head=1)

    def test_config(self):
        self.config_tester.run_common_tests()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        return inputs | {"labels": inputs["input_ids"]} if return_labels else inputs


class ChexProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = ChexProcessor

    @unittest.skip("Takes `input_ids[0]` for one sequence, but ChEX has a query axis: (images, queries, tokens).")
    def test_kwargs_overrides_default_subprocessor_kwargs_0_images(self):
        pass

    @unittest.skip("Takes `input_ids[0]` for one sequence, but ChEX has a query axis: (images, queries, tokens).")
    def test_subprocessor_defaults_preserved_by_kwargs_0_images(self):
        pass

    @unittest.skip("A prompt of ChEX is always about an image.")
    def test_processor_text_has_no_visual(self):
        pass

    @classmethod
    def _setup_image_processor(cls):
        return ChexImageProcessor(size=32)

    @classmethod
    def _setup_tokenizer(cls):
        return cls.tokenizers()[0]

    @classmethod
    def _setup_generator_tokenizer(cls):
        return cls.tokenizers()[1]

    @staticmethod
    def tokenizers():
        sentences = ["No pleural effusion.", "The heart is enlarged.", "A nodule in the right upper lung zone."] * 3
        return build_tokenizers(sentences, 600, 300, context_length=77)


class ChexImageProcessingTester(image_processing_common.ImageProcessingTester):
    def __init__(self, parent: unittest.TestCase, **kwargs):
        kwargs.setdefault("size", {"height": 18, "width": 18})
        super().__init__(parent, **kwargs)

    def _get_image_processing_classes(self):
        return {"pil": ChexImageProcessor}


class ChexImageProcessingTest(image_processing_common.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = ChexImageProcessingTester

    @unittest.skip("The image encoder takes three equal channels, whatever the image has.")
    def test_call_numpy_4_channels(self):
        pass

    @unittest.skip("There is one backend, so that results do not depend on torchvision being installed.")
    def test_new_models_require_torchvision_backend(self):
        pass


# The imported bases are no tests of their own.
del ModelTesterMixin, GenerationTesterMixin, ProcessorTesterMixin
