"""An autoencoder of train/vae.py with one mean and one deviation for all channels of its latents, instead of their own:

    python benchmarks/one_scale.py runs/channels-16 runs/one-scale-16

What is normalised in a checkpoint is not so in its training state; pictures and reconstructions stay the same. It is
one of the latents that leads.py compares.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import tyro

from pipelines.files import newest, save_network
from train.build import open_autoencoder, own_size
from train.data import to_unit
from train.evaluate import draw_rows, drawn_afresh
from train.pictograms import chosen
from vae.autoencoder import Autoencoder

DRAWINGS = 64


@torch.no_grad()
def main(run: tyro.conf.Positional[Path], out: tyro.conf.Positional[Path]) -> None:
    vae = open_autoencoder(str(run))
    assert isinstance(vae, Autoencoder)
    state = torch.load(newest(run) / "training" / "state.pt", weights_only=True, map_location="cpu")
    vae.load_state_dict(dict(zip(dict(vae.named_parameters()), state["ema"], strict=True)))
    drawn = drawn_afresh(draw_rows("train", DRAWINGS, chosen(), 5, None), own_size(vae), None)
    latents = vae.encode(to_unit(torch.from_numpy(np.stack([np.array(one) for one in drawn])))).mean
    every = latents.shape[1]
    deviations = (latents.std((0, 2, 3)) / latents.std()).tolist()
    print(f"deviations by channel, of 1 in all: {min(deviations):.2f} to {max(deviations):.2f}")
    vae.fold_latent_statistics(latents.mean().expand(every), latents.std().expand(every))
    save_network(vae, out)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
