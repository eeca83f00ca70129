"""Guiding a pipeline by a classifier of noisy pictures, as `train/classifier.py` trains it: classes by their names."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from conditioning.labels import Labels
from ldm.classifier import NoisyClassifier
from ldm.denoiser import Denoise
from ldm.guidance import classifier_guided
from pipelines.files import newest, open_network


def load_classifier(where: str | Path) -> NoisyClassifier:
    """A classifier's folder, in float32 and frozen; a training run's folder stands for its newest checkpoint.

    Raises ValueError when there is none, or a broken one.
    """
    folder = newest(Path(where).expanduser())
    with torch.inference_mode(False):  # weights made in inference mode could not be differentiated through
        return open_network(NoisyClassifier, folder)


def guided_to(
    denoise: Denoise,
    classifier: NoisyClassifier | str | Path,
    names: Sequence[str],
    scale: float,
    latents: Tensor,
) -> Denoise:
    """The denoiser bent towards a class for each picture.

    latents: as they will be denoised, whose kind has to be what the classifier was trained on.
    Raises ValueError for a name that is no class, or a classifier that is missing, broken or of something else.
    """
    classifier = classifier if isinstance(classifier, NoisyClassifier) else load_classifier(classifier)
    channels = latents.shape[1]
    if classifier.config.in_channels != channels:
        raise ValueError(
            f"this classifier is for latents of {classifier.config.in_channels} channels, the model's have {channels}: "
            "train one on the model's own autoencoder (train/classifier.py --vae)"
        )
    if "" in names:
        raise ValueError(
            f"a classifier needs the name of a class in each prompt: {', '.join(classifier.config.labels)}"
        )
    with torch.inference_mode(False):
        classifier.to(latents.device)
    labels = Labels(classifier.config.labels)(names)["class_labels"].to(latents.device)
    return classifier_guided(denoise, partial(classifier.log_prob, labels=labels), scale)
