"""What a user calls."""

from pipelines.text_to_image import TextToImagePipeline

__all__ = ["TextToImagePipeline"]
