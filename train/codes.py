"""The second stage of a diffusion autoencoder: a diffusion over its semantic codes, for pictures of nothing given.

All codes lie in memory and the network is an MLP, so this takes minutes beside the hours of the first stage: it is run
whole, on one process, and starts anew where it was interrupted.
"""

import copy

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.loss import EDMWeight, LogNormal, denoising_loss
from pipelines.codes import CodeDiffusion, CodesConfig
from train.data import generator, sent
from train.state import EMA, learning_rate

NOISE = LogNormal(mean=-0.4, std=1.4)  # of the levels: codes have unit variance, and their details matter less
PEAK = 1e-3  # rate of AdamW
BATCH = 256  # codes


def train_codes(semantic: Tensor, *, width: int, depth: int, updates: int, seed: int) -> CodeDiffusion:
    """A diffusion of codes like these; a pure function of its arguments on one machine.

    semantic: [N, D]. width, depth: of the MLP.
    """
    torch.manual_seed(seed)
    codes = CodeDiffusion(CodesConfig(semantic.shape[1], width, depth)).to(semantic.device)
    codes.mean.copy_(semantic.mean(0))
    codes.std.copy_(semantic.std(0).clamp(min=1e-6))
    z = codes.normalised(semantic)
    denoiser, weight, ema = codes.denoiser, EDMWeight(), EMA(codes, 0.999)
    optimizer = torch.optim.AdamW(codes.parameters(), PEAK, betas=(0.9, 0.99), weight_decay=0.0)
    warmup = min(100, updates // 2)
    bar = tqdm(range(updates), desc="diffusion of codes", unit="update")
    for update in bar:
        draw = generator(seed, -1, update)
        x0 = z[sent(torch.randint(len(z), (BATCH,), generator=draw), z.device)]
        sigma = NOISE.sigma((torch.arange(BATCH) + torch.rand(BATCH, generator=draw)) / BATCH).to(z)
        noise = torch.randn(x0.shape, generator=draw).to(z)
        loss = denoising_loss(denoiser, x0, None, sigma, noise, weight).mean()
        optimizer.param_groups[0]["lr"] = learning_rate(update, peak=PEAK, warmup=warmup, updates=updates)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.step(update)
        if update % 100 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}")
    with ema.applied():
        return copy.deepcopy(codes).eval().requires_grad_(False)
