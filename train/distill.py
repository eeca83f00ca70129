"""Distils a model into one of 1 to 4 steps without guidance:  accelerate launch train/distill.py --model runs/mine

It is shown what the teacher was trained on (give the --template anew, if it had one), or --data.

The student begins as its teacher, --model, and learns to arrive in one step where the guided teacher arrives in
--substeps of them (`ldm.consistency`). Of the ways to do this it is the one with a single network to train and no
adversary, and it is sampled by DDIM's own steps: whatever opens a Stable Diffusion folder paints with it, at
guidance 1. Distribution matching (DMD, arXiv:2311.18828) can be sharper in one step, for two more networks and a
balance to keep.

The loop is that of train/ldm.py, with its data, checkpoints and flags; only the loss is another.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if not __package__:  # as a script, this folder is first on the path, where ldm.py would hide the package ldm
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

import train.ldm
from ldm.consistency import ConsistencyLoss, Segments, subdivided
from ldm.denoiser import Context
from ldm.guidance import classifier_free
from ldm.loss import Plain
from ldm.samplers import SAMPLERS
from ldm.schedule import VariancePreserving, step_grid
from pipelines.files import read_json
from pipelines.find import find_model
from pipelines.folder import Model, load_model
from train import settings
from train.config import parse
from train.launch import errors_said
from train.objective import Objective
from train.presets import check_model_settings

STATES = "encoder_hidden_states"
SAMPLER = "ddim"  # over trailing steps, the first of which begins at the last row of the table


OTHERS = (  # settings of another loss
    "noise",
    "noise_mean",
    "noise_std",
    "weight",
    "huber",
    "perturbation",
    "min_snr_gamma",
    "min_snr_floor",
)


@dataclass(frozen=True)
class Config(settings.Config):
    """Settings of one distillation; those of new models and words are of no use here. With --lora-rank the student is a
    small file beside its teacher."""

    substeps: int = 16  # of the teacher, in each step of the student
    teacher_guidance: float | None = None  # at which the student learns; None: what --model takes when nothing is said

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise ValueError("--model is missing: the folder, run or hub id of the model to distil")
        if not self.steps:
            raise ValueError("--steps is missing: those that the student shall need, 4 for instance")
        if self.substeps < 1:
            raise ValueError(f"--substeps is {self.substeps}: expected at least 1")
        if self.token or self.inpainting or self.prior or self.train != ("unet",):
            raise ValueError("a student learns by its U-Net alone: leave out --token, --inpainting, --prior, --train")
        if self.sampler != SAMPLER or self.guidance_scale != 1:
            raise ValueError(f"a student is for --sampler {SAMPLER} --guidance-scale 1: leave both out")


PRESETS = {
    "student": Config(
        model="bundled",
        data="",  # what the teacher was trained on
        output=Path("runs/student"),
        steps=4,
        sampler=SAMPLER,
        guidance_scale=1.0,
        caption_dropout=0.0,
        updates=2000,
        batch_size=32,
        learning_rate=5e-4,
        ema_decay=0.99,
    ),
}


def distilling(config: Config) -> Callable[[Model, settings.Config, Any], Objective]:
    """The objective of `train.ldm.main`: arriving where the teacher does, in so many steps."""

    def objective(student: Model, _: settings.Config, contexts: Callable[[list[str]], Context]) -> Objective:
        if student.learned_variance:
            raise ValueError(f"--model {config.model} has a learned variance, which a student has no use for")
        teacher = load_model(config.model)
        denoiser, defaults = teacher.denoiser, teacher.defaults
        told = teacher.is_told
        del teacher  # its autoencoder and text encoder are the student's, too
        device = next(student.unet.parameters()).device
        denoiser.network.to(device).to(memory_format=layout_of(student.unet))
        denoiser.requires_grad_(False).eval()
        if config.compile:
            denoiser.network = torch.compile(denoiser.network)  # type: ignore[assignment]
        student.scheduler = {**student.scheduler, "timestep_spacing": "trailing"}
        steps, schedule = config.steps or 1, student.schedule
        if isinstance(schedule, VariancePreserving):
            student.scheduler |= {"_class_name": "DDIMScheduler", "set_alpha_to_one": True}  # as other tools read it
        if schedule.entries:  # every `substeps`-th row of the finer grid is one of the sampler's
            levels = step_grid(schedule, steps * config.substeps, "trailing")
        else:
            grid = SAMPLERS[SAMPLER].grid_for(schedule, spacing="trailing")
            levels = subdivided(step_grid(schedule, steps, grid), config.substeps, schedule.sigma_min)
        segments = Segments(levels.float().to(device), config.substeps)
        scale = defaults.guidance_scale if config.teacher_guidance is None else config.teacher_guidance
        scale = max(1.0, scale) if told else 1.0

        def guided(x: Tensor, sigma: Tensor, context: Context) -> Tensor:
            null = context if scale == 1 else unconditional(contexts, context, len(x))
            return classifier_free(denoiser, context, null, scale, interval=defaults.guidance_interval)(x, sigma)

        return Objective(segments.sigma, ConsistencyLoss(guided, segments), Plain(student.denoiser))

    return objective


def layout_of(network: nn.Module) -> torch.memory_format:
    """Of a network's convolutions in memory."""
    last = any(w.ndim == 4 and not w.is_contiguous() for w in network.parameters())
    return torch.channels_last if last else torch.contiguous_format


def unconditional(contexts: Callable[[list[str]], Context], context: Context, count: int) -> Context:
    """The null beside a context, as long as that, and told of the sizes and of what else is no text as that is."""
    null = dict(contexts([""] * count))
    if (states := null.get(STATES)) is not None:  # a stream's captions, which nobody foresaw, may need more windows
        null[STATES] = states[:, torch.arange(context[STATES].shape[1], device=states.device) % states.shape[1]]
    for name, value in context.items():
        if isinstance(value, dict):
            null[name] = {**value, **{k: v for k, v in null.get(name, {}).items() if k != "time_ids"}}
        elif name not in null:
            null[name] = value
    return null


def main(config: Config) -> Path:
    """Raises ValueError for settings that a student has no use for, and without --data where the teacher does not say
    what it was trained on."""
    # Not in __post_init__: the training records its own noise in a config that it makes of this one.
    if changed := [name for name in OTHERS if getattr(config, name) != getattr(settings.Config, name)]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
        raise ValueError(f"a student has a loss and noise levels of its own: leave out {flags}")
    if not config.data:
        notes = find_model(config.model) / "atelier.json"
        seen = read_json(notes) if notes.is_file() else {}
        if not seen.get("data"):
            raise ValueError(f"--model {config.model} does not say what it was trained on: give --data")
        config = replace(config, data=seen["data"], views=max(config.views, seen.get("views", 1)))
    return train.ldm.main(config, distilling(config))


if __name__ == "__main__":
    with errors_said(train.ldm.SAVINGS):
        given = parse(Config, PRESETS, default="student")
        check_model_settings(given, sys.argv)
        main(given)
