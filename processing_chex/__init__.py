"""Images, prompts and boxes to tensors, and back."""

from .errors import ChexInputError
from .image_loading import load_image
from .image_processing_chex import ChexImageProcessor
from .processing_chex import ChexProcessor


__all__ = ["ChexImageProcessor", "ChexInputError", "ChexProcessor", "load_image"]
