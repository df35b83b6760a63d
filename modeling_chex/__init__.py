"""ChEX for Hugging Face Transformers: models."""

from transformers import AutoConfig, AutoModel
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_chex import ChexConfig, ChexDetectorConfig, ChexGeneratorConfig, ChexPostDecoderConfig
from .modeling_chex import ChexModel, ChexPreTrainedModel
from .outputs import ChexImageFeatures, ChexOutput
from .pipeline_chex import TASK, ChexPipeline, add_code, save_with_code
from .sentence_generator import ChexSentenceGenerator


AutoConfig.register("chex", ChexConfig, exist_ok=True)
AutoConfig.register("chex_sentence_generator", ChexGeneratorConfig, exist_ok=True)
AutoModel.register(ChexConfig, ChexModel, exist_ok=True)
AutoModel.register(ChexGeneratorConfig, ChexSentenceGenerator, exist_ok=True)
if TASK not in PIPELINE_REGISTRY.get_supported_tasks():  # a second registration, as by a reload, would warn
    PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=ChexPipeline, pt_model=AutoModel)

__all__ = [
    "ChexConfig",
    "ChexDetectorConfig",
    "ChexGeneratorConfig",
    "ChexImageFeatures",
    "ChexModel",
    "ChexOutput",
    "ChexPipeline",
    "ChexPostDecoderConfig",
    "ChexPreTrainedModel",
    "ChexSentenceGenerator",
    "add_code",
    "save_with_code",
]
