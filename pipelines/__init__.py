"""What a user calls."""

from pipelines.diffusion_autoencoder import DiffusionAutoencoderPipeline
from pipelines.text_to_image import TextToImagePipeline

__all__ = ["DiffusionAutoencoderPipeline", "TextToImagePipeline"]
