"""LoRA by peft: two more linear layers next to each layer, every step a separate op."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.peers import need
from benchmarks.peers.bnb_nf4 import nf4_linear

ADAPTERS = ("bf16", "fp32 under autocast")
"""The LoRA's dtype. The second is how training scripts usually run it."""


def add(module: nn.Module, rank: int, alpha: float, targets: Sequence[str], adapters: str = "bf16") -> None:
    """Add LoRA to the layers of `module` at these paths."""
    peft = need("peft")
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights=False)
    peft.inject_adapter_in_model(config, module)
    for parameter in trained(module):
        parameter.data = parameter.data.to(torch.bfloat16 if adapters == "bf16" else torch.float32)


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in module.named_parameters() if "lora_" in name]


def fill(layer: nn.Module, down: Tensor, up: Tensor) -> None:
    """Give one of peft's layers this LoRA: down (R, K), up (N, R)."""
    with torch.no_grad():
        layer.get_submodule("lora_A.default").get_parameter("weight").copy_(down)
        layer.get_submodule("lora_B.default").get_parameter("weight").copy_(up)


def nf4_lora_linear(
    weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float, adapters: str
) -> tuple[Callable[[Tensor], Tensor], list[nn.Parameter]]:
    """x -> y through bitsandbytes' NF4 layer with peft's LoRA, and its trained parameters."""
    host = nn.ModuleDict({"layer": nf4_linear(weight, bias)})
    add(host, len(down), scale * len(down), ["layer"], adapters)
    fill(host["layer"], down, up)

    def run(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=adapters != "bf16"):
            return host["layer"](x)

    return run, trained(host)
