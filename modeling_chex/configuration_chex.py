"""Configuration of ChEX: two CLIP encoders, prompt detector, post decoder and sentence generator."""

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.clip.configuration_clip import CLIPTextConfig, CLIPVisionConfig
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME


def check_block(config: PreTrainedConfig, *rates: str) -> None:
    """Raises `ValueError` for numbers of a decoder that no model can have."""
    for name in ("num_layers", "num_attention_heads", "intermediate_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(config, name)}.")
    check_rates(config, "dropout", "attention_dropout", *rates)
    if not 0 <= config.drop_path < 1:
        raise ValueError(f"`drop_path` must be at least 0 and less than 1, got {config.drop_path}.")


def check_rates(config: PreTrainedConfig, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"`{name}` must lie between 0 and 1, got {getattr(config, name)}.")


@strict
class ChexDetectorConfig(PreTrainedConfig):
    r"""
    Prompt detector (ChEX, ECCV 2024): a DETR-like decoder whose tokens are prompt features.

    Args:
        num_layers (`int`, defaults to 6): Decoder blocks (self-attention, cross-attention, feed-forward).
        num_attention_heads (`int`, defaults to 8): Attention heads; they divide `ChexConfig.projection_dim`.
        intermediate_size (`int`, defaults to 2048): Hidden width of the feed-forward and output networks.
        num_regions (`int`, defaults to 3): Boxes R predicted for each query.
        region_token_std (`float`, *optional*): Standard deviation of the R region tokens at initialisation; defaults
            to `projection_dim ** -0.5`. Tokens that start further apart learn sooner to locate different boxes.
        hidden_act (`str`, defaults to `"gelu"`): Activation of all detector networks.
        dropout, attention_dropout, drop_path (`float`): Regularisation, active in training only.
        layer_scale_init (`float`, defaults to 0.1): Initial value of the LayerScale vectors.
        roi_beta (`float`, defaults to 2.0): Exponent of the soft RoI map; 2 is a Gaussian.
        roi_skip_probability (`float`, defaults to 0.25): With `roi_skip=None`, the probability per region token of
            averaging the RoI feature with the decoder token.
        roi_skip_dropout (`float`, defaults to 0.3): Dropout of the decoder token in that case.
        presence_threshold (`float`, defaults to 0.5): A region is present if its score is above it.
        layer_norm_eps (`float`, defaults to 1e-5): Epsilon of all layer norms.
    """

    model_type = "chex_detector"
    base_config_key = "detector_config"

    num_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    num_regions: int = 3
    region_token_std: float | int | None = None
    hidden_act: str = "gelu"
    dropout: float | int = 0.3
    attention_dropout: float | int = 0.1
    drop_path: float | int = 0.2
    layer_scale_init: float | int = 0.1
    roi_beta: float | int = 2.0
    roi_skip_probability: float | int = 0.25
    roi_skip_dropout: float | int = 0.3
    presence_threshold: float | int = 0.5
    layer_norm_eps: float = 1e-5

    def validate_architecture(self):
        """Checks of the values, run by `@strict`."""
        check_block(self, "roi_skip_probability", "roi_skip_dropout", "presence_threshold")
        if self.num_regions < 1:
            raise ValueError(f"`num_regions` must be at least 1, got {self.num_regions}.")
        if not self.roi_beta > 0:
            raise ValueError(f"`roi_beta` must be positive, got {self.roi_beta}.")


@strict
class ChexPostDecoderConfig(PreTrainedConfig):
    r"""
    Post decoder (ChEX, ECCV 2024), which refines region features once the detector is trained.

    Args:
        num_layers (`int`, defaults to 3): Decoder blocks, of the same kind as the detector's.
        num_attention_heads, intermediate_size, hidden_act, dropout, attention_dropout, drop_path, layer_scale_init,
            layer_norm_eps: As in [`ChexDetectorConfig`].
        region_drop (`float`, defaults to 0.1): Probability of hiding a region token as key while training
            (0.3 in stage 2, 0.1 in stage 3).
    """

    model_type = "chex_post_decoder"
    base_config_key = "post_decoder_config"

    num_layers: int = 3
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    hidden_act: str = "gelu"
    dropout: float | int = 0.3
    attention_dropout: float | int = 0.1
    drop_path: float | int = 0.2
    layer_scale_init: float | int = 0.1
    region_drop: float | int = 0.1
    layer_norm_eps: float = 1e-5

    def validate_architecture(self):
        """Checks of the values, run by `@strict`."""
        check_block(self, "region_drop")


@strict
class ChexGeneratorConfig(GPT2Config):
    r"""
    Sentence generator: GPT-2 conditioned on a region feature through a key/value prefix (P-tuning v2).

    Every [`GPT2Config`] field is available; the defaults are GPT-2 medium's.

    Args:
        feature_size (`int`, defaults to 512): Width of the conditioning feature, `ChexConfig.projection_dim`.
        prefix_length (`int`, defaults to 5): Prefix positions in every layer for each conditioning feature.
        prefix_hidden_size (`int`, defaults to 2048): Hidden width of the prefix network.
        prefix_act (`str`, defaults to `"gelu"`): Its activation.
        prefix_dropout (`float`, defaults to 0.3): Dropout after both of its layers.
        position_offset (`int`, defaults to 0): Position of the first token; the prefix has no positions.
        max_generation_length (`int`, defaults to 128): Default `max_length` of `generate`, start token included,
            prefix excluded.
    """

    model_type = "chex_sentence_generator"
    base_config_key = "generator_config"

    n_embd: int = 1024
    n_layer: int = 24
    n_head: int = 16
    feature_size: int = 512
    prefix_length: int = 5
    prefix_hidden_size: int = 2048
    prefix_act: str = "gelu"
    prefix_dropout: float | int = 0.3
    position_offset: int = 0
    max_generation_length: int = 128

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.pad_token_id is None:  # GPT-2 has one special token for start, end and padding
            self.pad_token_id = self.eos_token_id

    def validate_architecture(self):
        """Checks of the values, run by `@strict`."""
        super().validate_architecture()
        for name in ("n_layer", "n_head", "feature_size", "prefix_length", "prefix_hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        check_rates(self, "prefix_dropout")


@strict
class ChexConfig(PreTrainedConfig):
    r"""
    Configuration of [`ChexModel`]. The defaults are the published model (about 1.05 billion parameters).

    The parts of the later training stages are switched by their configuration: `post_decoder_config=None` and
    `generator_config=None` is a stage-1 model, `generator_config=None` a stage-2 model.

    Args:
        vision_config (`dict` or `CLIPVisionConfig`): Image encoder; default ViT-B/32 at 224 pixels.
        text_config (`dict` or `CLIPTextConfig`): Prompt encoder.
        detector_config (`dict` or `ChexDetectorConfig`): Prompt detector.
        post_decoder_config (`dict` or `ChexPostDecoderConfig`, or `None`): Post decoder, `None` if there is none.
        generator_config (`dict` or `GPT2Config`, or `None`): Sentence generator, `None` if there is none. A plain
            `GPT2Config` is completed with the default prefix network.
        projection_dim (`int`, defaults to 512): Width D of the joint space of images, prompts and regions.
        attention_mode (`str`, defaults to `"grouped"`): `"grouped"`: the tokens of a query see only each other, so a
            prediction does not depend on the other queries. `"legacy"`: what the official code computes, including
            its inverted mask; set by the converter.

    Example:

    ```python
    >>> from modeling_chex import ChexConfig, ChexModel

    >>> configuration = ChexConfig(post_decoder_config=None, generator_config=None)
    >>> model = ChexModel(configuration)  # a stage-1 model with random weights
    ```"""

    model_type = "chex"
    sub_configs_defaults = {
        "vision_config": CLIPVisionConfig,
        "text_config": CLIPTextConfig,
        "detector_config": ChexDetectorConfig,
        "post_decoder_config": SubConfigSpec(config_class=ChexPostDecoderConfig, optional=True),
        "generator_config": SubConfigSpec(config_class=ChexGeneratorConfig, optional=True),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    detector_config: dict | PreTrainedConfig | None = None
    # An empty dict means "with default values": `None` has to mean "without this part".
    post_decoder_config: dict | PreTrainedConfig | None = field(default_factory=dict)
    generator_config: dict | PreTrainedConfig | None = field(default_factory=dict)
    projection_dim: int = 512
    attention_mode: str = "grouped"
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        generator = self.generator_config
        if isinstance(generator, GPT2Config) and not isinstance(generator, ChexGeneratorConfig):
            generator = {key: value for key, value in generator.to_dict().items() if key != "model_type"}
        if isinstance(generator, dict):
            self.generator_config = {"feature_size": self.projection_dim} | generator
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As of the base class; a part that `config_dict` lacks can be added by keyword (to start the next stage)."""
        for name in ("post_decoder_config", "generator_config"):
            if name in kwargs and config_dict.get(name) is None:
                config_dict = config_dict | {name: kwargs.pop(name)}
        if not cls.__module__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME):
            # As for the auto classes, the pipeline of the installed package goes before the copy in the folder.
            config_dict = {key: value for key, value in config_dict.items() if key != "custom_pipelines"}
        return super().from_dict(config_dict, **kwargs)

    def validate_architecture(self):
        """Checks across the parts, run by `@strict`."""
        if self.attention_mode not in ("grouped", "legacy"):
            raise ValueError(f"`attention_mode` must be 'grouped' or 'legacy', got {self.attention_mode!r}.")
        for name in ("detector_config", "post_decoder_config"):
            heads = getattr(getattr(self, name), "num_attention_heads", 1)
            if self.projection_dim % heads != 0:
                raise ValueError(
                    f"`projection_dim` ({self.projection_dim}) must be a multiple of the {heads} attention heads of "
                    f"`{name}`."
                )
        feature_size = getattr(self.generator_config, "feature_size", self.projection_dim)
        if feature_size != self.projection_dim:
            raise ValueError(
                f"`generator_config.feature_size` ({feature_size}) must be `projection_dim` ({self.projection_dim})."
            )

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        """The generator is the decoder of text, if there is one; the prompt encoder is what encodes it."""
        if decoder and not encoder and self.generator_config is not None:
            return self.generator_config
        return self.text_config


__all__ = ["ChexConfig", "ChexDetectorConfig", "ChexGeneratorConfig", "ChexPostDecoderConfig"]
