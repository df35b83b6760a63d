"""ChEX for Hugging Face Transformers: models."""

from transformers import AutoConfig, AutoModel

from .configuration_chex import ChexConfig, ChexDetectorConfig, ChexGeneratorConfig, ChexPostDecoderConfig
from .modeling_chex import ChexModel, ChexPreTrainedModel
from .outputs import ChexImageFeatures, ChexOutput
from .sentence_generator import ChexSentenceGenerator


AutoConfig.register("chex", ChexConfig, exist_ok=True)
AutoConfig.register("chex_sentence_generator", ChexGeneratorConfig, exist_ok=True)
AutoModel.register(ChexConfig, ChexModel, exist_ok=True)

__all__ = [
    "ChexConfig",
    "ChexDetectorConfig",
    "ChexGeneratorConfig",
    "ChexImageFeatures",
    "ChexModel",
    "ChexOutput",
    "ChexPostDecoderConfig",
    "ChexPreTrainedModel",
    "ChexSentenceGenerator",
]
