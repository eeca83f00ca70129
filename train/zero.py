"""DeepSpeed's ZeRO 1 and 2 (arXiv:1910.02054): every process holds the weights, and its share of the optimizer's state
and, in stage 2, of the gradients.

`settle` puts what the loop has to say into DeepSpeed's own config; `prepare` is `Accelerator.prepare`, after which
`accelerator.backward` also takes the step; `Zero` is its optimizer, whose state reads as that of an optimizer that is
not shared out: a checkpoint goes on with or without DeepSpeed, on any number of processes.
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

KEYS = ("exp_avg", "exp_avg_sq")  # the moments of AdamW


def settle(accelerator: Accelerator) -> None:
    """Weights stay float32, which averages and small learning rates need: DeepSpeed's bf16 becomes its autocast.

    Raises ValueError for what is not supported: stage 3, offloading, fp16.
    """
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    zero = config.get("zero_optimization", {})
    if zero.get("stage") not in (1, 2):
        raise ValueError(
            f"DeepSpeed's ZeRO stage {zero.get('stage')} is not supported: take stage 1 or 2, as "
            "train/configs/deepspeed.yaml does, or FSDP, which shares out the weights too (train/configs/fsdp.yaml)"
        )
    if any(zero.get(part, {}).get("device", "none") != "none" for part in ("offload_optimizer", "offload_param")):
        raise ValueError("DeepSpeed's offloading is not supported: set offload_optimizer_device and _param_ to none")
    precision = accelerator.mixed_precision
    if precision == "fp16":
        raise ValueError("--mixed-precision fp16 is not supported with DeepSpeed: take bf16")
    if precision == "bf16":
        config["bf16"]["enabled"] = False
        # An empty list: no gradients travel in bfloat16.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}


def precision(accelerator: Accelerator) -> str:
    """Of the autocast of DeepSpeed's config: "bf16" or "no"."""
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    return "bf16" if config.get("torch_autocast", {}).get("enabled") else "no"


def prepare(
    accelerator: Accelerator, learner: nn.Module, optimizer: torch.optim.Optimizer, *, batch_size: int, clip: float
) -> tuple[nn.Module, "Zero"]:
    """(the module to train by, its optimizer) in place of `Accelerator.prepare`.

    batch_size: of a process and a step. clip: largest norm of the gradient.
    """
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = batch_size
    config["gradient_accumulation_steps"] = accelerator.gradient_accumulation_steps
    config["gradient_clipping"] = clip
    config["zero_allow_untested_optimizer"] = True
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    learner, prepared = accelerator.prepare(learner, optimizer)
    return learner, Zero(prepared.optimizer, weights)


class Zero:
    """An AdamW whose state DeepSpeed has shared out; `accelerator.backward` takes its steps."""

    def __init__(self, shared: Any, weights: list[nn.Parameter]):
        """shared: DeepSpeed's optimizer. weights: all that learn, in the order of the optimizer they were given to."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        self.shared, self.weights = shared, weights
        own = shared.optimizer.state
        for number, flat in enumerate(shared.single_partition_of_fp32_groups):  # else there is no state before a step
            moments = {key: torch.zeros_like(flat, requires_grad=False) for key in KEYS}
            own[flat] = {"step": torch.zeros((), dtype=torch.float32, device=flat.device), **moments}
            lazy_init_hp_params_optimizer_state(shared.bit16_groups[number], flat, own)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.shared.param_groups

    def step(self) -> None: ...

    def zero_grad(self) -> None: ...

    def state_dict(self, *, keep: bool = True) -> dict[str, Any]:
        """As `torch.optim.AdamW` has it, with whole tensors in the computer's memory; every process has to make this
        call, also those that keep nothing of them."""
        from deepspeed.utils import safe_get_full_optimizer_state

        (group,) = self.param_groups
        step = next(iter(self.shared.optimizer.state.values()))["step"]
        state: dict[int, dict[str, Tensor]] = {}
        for number, weight in enumerate(self.weights if float(step) else []):
            moments = {}
            for key in KEYS:  # one by one: whole, all of them are what a GPU has no room for
                moment = safe_get_full_optimizer_state(weight, key)
                moments[key] = moment.cpu() if keep else moment.new_empty(0)
            state[number] = {"step": step.clone(), **moments}
        options = {key: value for key, value in group.items() if key != "params"}
        return {"state": state, "param_groups": [{**options, "params": list(range(len(self.weights)))}]}

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Takes such a state up, and the weights as they are now."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self.shared.refresh_fp32_params()
        (group,), (kept,) = self.param_groups, saved["param_groups"]
        group |= {key: value for key, value in kept.items() if key != "params"}
        states = saved["state"]
        for number, weight in enumerate(self.weights):
            for key in KEYS:
                value = states[number][key].to(weight.device) if states else torch.zeros_like(weight)
                safe_set_full_optimizer_state(weight, value, key)
        step = float(states[0]["step"]) if states else 0.0
        for state in self.shared.optimizer.state.values():
            state["step"].fill_(step)
