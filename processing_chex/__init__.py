"""Images, prompts and boxes to tensors, and back."""

from transformers import AutoImageProcessor, AutoProcessor

from .errors import ChexInputError
from .image_loading import load_image
from .image_processing_chex import ChexImageProcessor
from .processing_chex import ChexProcessor


# A saved processor names its classes, and the auto classes look for these names. The key, usually the class of the
# configuration, plays no role then: the model type does as well, and this package need not import the models.
AutoProcessor.register("chex", ChexProcessor, exist_ok=True)
AutoImageProcessor.register(
    "chex", image_processor_classes=dict.fromkeys(("torchvision", "pil"), ChexImageProcessor), exist_ok=True
)

__all__ = ["ChexImageProcessor", "ChexInputError", "ChexProcessor", "load_image"]
