"""Runs a training in processes of its own and kills them at random moments until it is through: `run_killed`.

A program, so that it can fork: its children need not import anything again, and die as a machine does that loses power.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run_killed(
    settings: dict[str, Any], *, processes: int = 1, kills: int = 0, signals: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Trains by `train.ldm.main(Config(**settings))` until a run ends by itself.

    kills: how often SIGKILL comes, each at a moment between the start and the end of a run. signals: one a run instead,
    which the last of its processes gets in its midst. Returns {"codes": [[exit codes of the processes of a run], …],
    "seconds": […], "printed": what they all printed}.
    """
    job = json.dumps({"settings": settings, "processes": processes, "kills": kills, "signals": signals}, default=str)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__)), job]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout[-3000:] + done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def _train(settings: dict[str, Any]) -> None:
    import torch

    import train.ldm
    from ldm.unet import UNetConfig
    from train.settings import Config

    torch.set_num_threads(1)
    torch.set_num_threads = lambda threads: None
    if settings.pop("sharded", False):
        _shard()
    if stage := settings.pop("zero", 0):
        _share_out(stage)
    told, at = settings.pop("tell", None), settings.pop("at", 0)
    rate = train.ldm.learning_rate

    def telling(update: int, **kwargs: Any) -> float:
        if told and update == at and os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1):
            os.kill(os.getpid(), getattr(signal, told))
        return rate(update, **kwargs)

    train.ldm.learning_rate = telling
    unet = UNetConfig(**{key: tuple(v) if isinstance(v, list) else v for key, v in settings["unet"].items()})
    paths = {key: Path(settings[key]) for key in ("output", "cache")}
    prompts = {"prompts": tuple(settings["prompts"])}
    train.ldm.main(Config(**(settings | paths | prompts | {"unet": unet})))


def _shard() -> None:
    """PyTorch's own FSDP in `Accelerator.prepare`, which has none for processors, as it is prepared on GPUs."""
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    import train.launch

    def prepare(accelerator: Accelerator, learner: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple:
        mesh = init_device_mesh("cpu", (accelerator.num_processes,))
        for block in learner.modules():
            if type(block).__name__ in accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap:
                fully_shard(block, mesh=mesh)
        fully_shard(learner.denoiser.network, mesh=mesh)
        fully_shard(learner, mesh=mesh)
        (group,) = optimizer.param_groups  # as accelerate does, the optimizer gets the shards in their places
        group["params"] = [weight for weight in learner.parameters() if weight.requires_grad]
        return learner, accelerator.prepare_optimizer(optimizer)

    Accelerator.prepare = prepare
    train.launch.sharding = lambda accelerator: "FSDP"
    AcceleratorState.fsdp_plugin = SimpleNamespace(transformer_cls_names_to_wrap=["ResnetBlock", "TransformerBlock"])


def _share_out(stage: int) -> None:
    """DeepSpeed on processors: Accelerate, which has it for GPUs alone, is told that it was started for it."""
    import torch
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    os.environ["DS_ACCELERATOR"] = "cpu"
    begin = Accelerator.__init__

    def init(accelerator: Accelerator, **kwargs: Any) -> None:
        begin(accelerator, **kwargs)
        plugin = DeepSpeedPlugin(zero_stage=stage)
        plugin.set_mixed_precision("no")
        AcceleratorState._shared_state["deepspeed_plugins"] = plugin
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.DEEPSPEED
        plugin.select(_from_accelerator_state=True)
        accelerator.deepspeed_engine_wrapped = None

    Accelerator.__init__ = init
    Accelerator.device = torch.device("cpu")  # "cpu:0" would be another device, to which weights are copied


def _start(settings: dict[str, Any], processes: int, log: Path) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(processes):
        if child := os.fork():
            children.append(child)
            continue
        code = 1
        try:
            written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(written, 1)
            os.dup2(written, 2)
            if processes > 1:
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_MIXED_PRECISION": "no"}
                os.environ.update({name: str(value) for name, value in (ranks | where).items()})
            _train(settings)
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return children


def _wait(children: list[int]) -> list[int]:
    """The exit codes; once one has failed the others, which would wait for it, are killed as a launcher kills them."""
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        for child in children:
            if child not in codes and (ended := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(ended[1])
                if codes[child] < 0 or codes[child] == 1:
                    for other in set(children) - codes.keys():
                        os.kill(other, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[child] for child in children]


def main(job: dict[str, Any]) -> dict[str, Any]:
    import train.ldm  # noqa: F401  the children have it then

    settings, processes = job["settings"], job["processes"]
    log = Path(settings["output"]).with_suffix(".log")
    codes, seconds = [], []
    length = job["settings"].pop("seconds", 5.0)  # of a whole run
    plan = [("SIGKILL", random.uniform(0, length)) for _ in range(job["kills"])] + [(s, None) for s in job["signals"]]
    for name, moment in [*plan, (None, None)]:
        began = time.perf_counter()
        tell = {"tell": name, "at": 2 + 3 * len(codes)} if name in job["signals"] else {}
        children = _start(settings | tell, processes, log)
        if name:
            while moment is not None and time.perf_counter() - began < moment:
                time.sleep(0.001)
            for child in children if name == "SIGKILL" else []:
                os.kill(child, signal.SIGKILL)
        codes.append(_wait(children))
        seconds.append(time.perf_counter() - began)
    if any(codes[-1]):
        print(log.read_text()[-3000:])
        raise SystemExit(1)
    return {"codes": codes, "seconds": seconds, "printed": log.read_text()}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
