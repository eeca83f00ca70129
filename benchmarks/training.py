"""Training speed beside the procedure of diffusers' text-to-image example, in one run:  python benchmarks/training.py

The same folder of a model (a small standard one, a U-Net of 11.5 M parameters on 16×16×4 latents, a CLIP text encoder
of 4 layers, KL-f8 of 3.4 M), the same pictures, batch, precision, optimizer (AdamW), gradient clipping and
EMA, and as many threads. The other side is what that example does, with diffusers' and transformers' own modules: each
step decodes the pictures, encodes them and their captions, draws noise for DDPMScheduler and takes the square error.
Ours is `train/ldm.py` itself: from its cache of latents and contexts, in one process and in one of a thread for each
core; and from a stream, of which no latents are kept.

On a CPU `accelerate launch` gives the example one thread (it sets OMP_NUM_THREADS=1): it is measured with one as well.
Each side is a process of its own, and they take turns. Rates are medians of the later half of the updates.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from train.machine import described

ROOT = Path(__file__).resolve().parents[1]

OURS = """
import json, os, statistics, sys, time
from pathlib import Path
import torch
import train.ldm
from train.batch import draw_batch
from train.meter import memory
from train.settings import Config
job = json.loads(sys.argv[1])
times, caching, cost = [], [], []
def timed(*args, **kwargs):  # one call an update
    times.append(time.perf_counter())
    return draw_batch(*args, **kwargs)
train.ldm.draw_batch = timed
measured = train.ldm.Meter.measure
def measure(meter, *args):
    measured(meter, *args)
    cost.append((meter.flops, meter.peak))
train.ldm.Meter.measure = measure
began = time.perf_counter()
open_feed = train.ldm.open_feed
def opened(*args, **kwargs):
    start = time.perf_counter()
    feed = open_feed(*args, **kwargs)
    caching.append(time.perf_counter() - start)
    return feed
train.ldm.open_feed = opened
train.ldm.main(Config(
    model=job["model"], data=job["data"], streaming=job["stream"], output=Path(job["output"]), cache=Path(job["cache"]),
    updates=job["updates"], batch_size=job["batch"], optimizer="adamw", learning_rate=1e-5, schedule="constant",
    noise="uniform", caption_dropout=0.0, mixed_precision=job["precision"], compile=job["compile"], warmup=1,
    checkpoint_every=10**6, steps=1, prompts=("a fox",), workers=0, size=128))
later = times[len(times) // 2 :]
processes = int(os.environ.get("WORLD_SIZE", 1))
rates = [job["batch"] * processes / (b - a) for a, b in zip(later, later[1:])]
((flops, rate),) = cost
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if os.environ.get("RANK", "0") == "0":
    share = statistics.median(rates) * flops / rate / processes
    print(json.dumps({"rate": statistics.median(rates), "memory": memory(device), "caching": caching[0],
                      "share_of_peak": share, "matrix_rate": rate}))
"""

THEIRS = """
import json, os, statistics, sys, time
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import load_dataset
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torchvision import transforms
from transformers import CLIPTextModel, CLIPTokenizer
job = json.loads(sys.argv[1])
torch.set_num_threads(job["threads"])
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as ours, on a GPU
accelerator = Accelerator(mixed_precision=job["precision"])
dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(job["precision"], torch.float32)
folder = job["model"]
scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").requires_grad_(False)
encoder.to(accelerator.device, dtype)
vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").requires_grad_(False).to(accelerator.device, dtype)
unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").train()
ema = EMAModel(unet.parameters(), decay=0.995)
ema.to(accelerator.device)
optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5)
rows = load_dataset("imagefolder", data_dir=job["pictures"], split="train")
shown = transforms.Compose([transforms.Resize(128), transforms.CenterCrop(128), transforms.ToTensor(),
                            transforms.Normalize([0.5], [0.5])])
def prepare(batch):
    ids = tokenizer(batch["text"], max_length=77, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return {"pixels": [shown(image.convert("RGB")) for image in batch["image"]], "ids": list(ids)}
rows = rows.with_transform(prepare)
loader = torch.utils.data.DataLoader(rows, shuffle=True, batch_size=job["batch"], drop_last=True)
rates = get_scheduler("constant", optimizer)
unet, optimizer, loader, rates = accelerator.prepare(unet, optimizer, loader, rates)
if job["compile"]:
    unet = torch.compile(unet)
times = []
while len(times) <= job["updates"]:
    for batch in loader:
        times.append(time.perf_counter())
        if len(times) > job["updates"]:
            break
        latents = vae.encode(batch["pixels"].to(dtype)).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        steps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
        noisy = scheduler.add_noise(latents, noise, steps)
        states = encoder(batch["ids"], return_dict=False)[0]
        loss = F.mse_loss(unet(noisy, steps, states, return_dict=False)[0].float(), noise.float())
        accelerator.gather(loss.repeat(job["batch"])).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        loss.item()
later = times[len(times) // 2 :]
rates = [job["batch"] / (b - a) for a, b in zip(later, later[1:])]
import resource
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
if torch.cuda.is_available():
    memory = torch.cuda.max_memory_allocated() / 1e9
print(json.dumps({"rate": statistics.median(rates), "memory": memory}))
"""


@dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    batch: int = 16
    updates: int = 24  # of each side in each round
    rounds: int = 3
    threads: int = os.cpu_count() or 1
    precision: str = "no"  # or bf16, fp16
    compile: bool = False  # both sides
    out: Path | None = None  # JSON with the figures


def run(script: str, job: dict, threads: int, processes: int = 1) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    file = Path(job["output"] + ".py")
    file.write_text(script)
    command = [sys.executable, str(file), json.dumps(job)]
    if processes > 1:
        environment["ACCELERATE_USE_CPU"] = "true"
        launch = ["launch", "--multi_gpu", "--num_processes", str(processes), "--main_process_port", "29517"]
        command = [str(Path(sys.executable).with_name("accelerate")), *launch, *command[1:]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def pictures(folder: Path, count: int = 256) -> None:
    """Captioned PNG pictures of 128×128, and the same in a parquet file, for the stream."""
    import datasets

    from train.sources import open_source

    source = open_source("shapes", 128)
    (folder / "pictures").mkdir(parents=True)
    rows = []
    for i in range(count):
        image, captions, _ = source[i]
        image.save(folder / "pictures" / f"{i:04d}.png")
        rows.append({"file_name": f"{i:04d}.png", "text": captions[0]})
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    files = [str(folder / "pictures" / row["file_name"]) for row in rows]
    table = datasets.Dataset.from_dict({"image": files, "text": [row["text"] for row in rows]})
    table.cast_column("image", datasets.Image()).to_parquet(folder / "pictures.parquet")


def main(config: Config) -> None:
    import torch

    from benchmarks.pipeline import random_peer

    found: dict[str, list[dict]] = {"diffusers' example": [], "ours, cached": [], "ours, streamed": []}
    launched = "the example, 1 thread"  # which is what `accelerate launch` gives a process on CPUs
    if not torch.cuda.is_available():
        found[launched] = []
    several = f"ours, cached, {config.threads} processes"
    if config.threads > 1 and config.batch % config.threads == 0 and not torch.cuda.is_available():
        found[several] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = random_peer(folder / "model")
        pictures(folder)
        job = {"model": str(model), "pictures": str(folder / "pictures"), "cache": str(folder / "cache")}
        job |= {key: getattr(config, key) for key in ("batch", "updates", "precision", "threads", "compile")}
        for turn in range(config.rounds):
            for side, results in found.items():
                own = {"output": str(folder / f"{side} {turn}"), "stream": side.endswith("streamed")}
                own["data"] = str(folder / ("pictures.parquet" if own["stream"] else "pictures"))
                script = OURS if side.startswith("ours") else THEIRS
                if side == launched:
                    results.append(run(script, job | own | {"threads": 1}, 1))
                elif side == several:
                    own["batch"] = config.batch // config.threads
                    results.append(run(script, job | own, 1, config.threads))
                else:
                    results.append(run(script, job | own, config.threads))
                print(f"round {turn}, {side}: {results[-1]['rate']:.1f} pictures/s", file=sys.stderr)
    middle = {side: statistics.median(result["rate"] for result in results) for side, results in found.items()}
    theirs = middle["diffusers' example"]
    print(f"{described()}, {config.threads} threads, batch {config.batch}")
    for side, results in found.items():
        memory = max(result["memory"] for result in results)
        line = f"{side:28} {middle[side]:7.1f} pictures/s  {middle[side] / theirs:5.2f} times  {memory:.2f} GB at most"
        if side.startswith("ours"):
            line += f", {statistics.median(r['share_of_peak'] for r in results):.0%} of the matrix-product rate"
        print(line)
    cached = found["ours, cached"]
    print(
        f"the cache of 256 pictures took {cached[0]['caching']:.1f} s, {cached[-1]['caching']:.1f} s once it was there"
    )
    print(f"matrix-product rate {statistics.median(r['matrix_rate'] for r in cached) / 1e9:.0f} GFLOP/s")
    if config.out:
        config.out.write_text(
            json.dumps({"machine": described(), "settings": vars(config) | {"out": None}, "found": found}, indent=2)
            + "\n"
        )


if __name__ == "__main__":
    main(tyro.cli(Config))
