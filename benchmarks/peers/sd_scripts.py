"""kohya-ss/sd-scripts' own FLUX LoRA training as a program that takes turns: its `train()`, from setup to loop.

    python -m benchmarks.peers.sd_scripts CHECKOUT --size 512        started by benchmarks/peers/emulated_step.py

Only what it would read from disk is replaced: the model is empty, in fp8, and the dataset is one image whose latents and
text are cached. LoRA of the same rank on the same layers as fluxq's (sd-scripts would have it on modulation too), every
block checkpointed, no previews and no saving.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import version
from benchmarks.peers.emulated_counters import GPUCounters
from benchmarks.peers.turns import Turn

RANK, T5_LENGTH = 16, 512
OPTIONS = (
    "--mixed_precision=bf16 --fp8_base --gradient_checkpointing --sdpa --lowram --cache_latents "
    "--cache_text_encoder_outputs --network_train_unet_only --network_module=networks.lora_flux "
    f"--network_dim={RANK} --network_alpha={RANK} --network_args img_mod_dim=0 txt_mod_dim=0 single_mod_dim=0 "
    "--optimizer_type=AdamW8bit --learning_rate=1e-4 --max_train_steps=1000000 --max_data_loader_n_workers=0 "
    "--timestep_sampling=shift --discrete_flow_shift=3.1582 --model_prediction_type=raw --guidance_scale=1.0 "
    "--loss_type=l2 --dataset_class=replaced --resolution={size}"
)
PACKAGES = ("accelerate", "bitsandbytes", "diffusers", "transformers")


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("checkout", type=Path)
    made.add_argument("--size", type=int, default=512, help="pixels of a side")
    arguments = made.parse_args()
    turn = Turn()
    sys.path.insert(0, str(arguments.checkout))
    with tempfile.TemporaryDirectory() as out:
        trainer, options = prepared(arguments.size, turn, facts_of(arguments.checkout))
        options.output_dir = out
        trainer.train(options)


def facts_of(checkout: Path) -> dict[str, Any]:
    """The commit of the checkout, and the versions of what it runs with."""
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"commit": done.stdout.strip() or "unknown", "packages": {name: version(name) for name in PACKAGES}}


def prepared(size: int, turn: Turn, facts: dict[str, Any]) -> tuple[Any, argparse.Namespace]:
    """sd-scripts' trainer, which waits for its turn before each step, and its options."""
    import flux_train_network  # type: ignore[import-not-found] - in the checkout, like `library`
    from library import flux_models, train_util  # type: ignore[import-not-found]

    class OneImage(train_util.MinimalDataset):
        def __init__(self) -> None:
            super().__init__((size, size), 1.0)
            self.num_train_images = len(self)
            self.enable_bucket = self.bucket_no_upscale = False
            self.min_bucket_reso = self.max_bucket_reso = size
            self.example = example(size)

        def __len__(self) -> int:
            return 1_000_000

        def __getitem__(self, index: int) -> dict[str, Any]:
            return dict(self.example)

        def is_latent_cacheable(self) -> bool:
            return True

        def new_cache_latents(self, *arguments: Any) -> None: ...

    class Trainer(flux_train_network.FluxNetworkTrainer):
        def get_tokenize_strategy(self, args: Any) -> Any: ...

        def get_tokenizers(self, strategy: Any) -> list[Any]:
            return [None, None]

        def load_target_model(self, args: Any, weight_dtype: torch.dtype, accelerator: Any) -> tuple[Any, ...]:
            with torch.device("meta"):
                flux = flux_models.Flux(flux_models.configs["dev"].params).to(torch.float8_e4m3fn)
            return "flux", [Nothing(), Nothing()], Nothing(), flux.to_empty(device="cpu")

        def cache_text_encoder_outputs_if_needed(self, *arguments: Any) -> None: ...

        def sample_images(self, *arguments: Any) -> None: ...

        def on_step_start(self, args: Any, accelerator: Any, network: nn.Module, *rest: Any, **named: Any) -> None:
            parameters = list(network.parameters())
            count = {"layers": len(parameters) // 2, "trained": sum(p.numel() for p in parameters)}
            turn.begin(GPUCounters(), **facts, **count)

    train_util.load_arbitrary_dataset = lambda args: OneImage()
    options = flux_train_network.setup_parser().parse_args(OPTIONS.format(size=size).split())
    return Trainer(), options


class Nothing(nn.Module):
    """Stands for a text encoder or autoencoder, which training does not use."""

    device, dtype = torch.device("cpu"), torch.bfloat16


def example(size: int) -> dict[str, Any]:
    """A batch of one image as sd-scripts' dataset gives it: latents, CLIP-L's vector, T5's embeddings, ids and mask."""
    side = size // 8
    return {
        "latents": torch.randn(1, 16, side, side),
        "text_encoder_outputs_list": [
            torch.randn(1, 768),
            torch.randn(1, T5_LENGTH, 4096),
            torch.zeros(1, T5_LENGTH, 3),
            torch.ones(1, T5_LENGTH),
        ],
        "loss_weights": torch.ones(1),
        "captions": [""],
        "input_ids_list": None,
    }


if __name__ == "__main__":
    main()
