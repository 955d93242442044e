"""kohya-ss/sd-scripts' FLUX LoRA training, stopped before each step: its own `train()`, from setup to loop.

What it would read from files is replaced: the model is empty, in fp8, and the dataset is one image with cached latents
and text. LoRA is on the layers that fluxq trains (sd-scripts has it on modulation too, unless told otherwise), every
block is checkpointed, nothing is swapped, sampled or saved. The checkout's Python needs what its requirements.txt
lists.
"""

from __future__ import annotations

import argparse
import importlib
import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fluxq.bench.timed_step import Setting

OPTIONS = """
    --mixed_precision bf16 --fp8_base --gradient_checkpointing --sdpa --network_train_unet_only
    --cache_latents --cache_text_encoder_outputs --max_data_loader_n_workers 0
    --network_module networks.lora_flux --network_dim {rank} --network_alpha {rank}
    --network_args img_mod_dim=0 txt_mod_dim=0 single_mod_dim=0
    --optimizer_type AdamW8bit --learning_rate 1e-4 --max_train_steps 1000000
    --timestep_sampling shift --discrete_flow_shift 3.1582 --model_prediction_type raw --guidance_scale 1.0
    --resolution {resolution} --dataset_class replaced
"""


def trainer(checkout: Path, setting: Setting) -> tuple[Callable[[int], None], list[nn.Parameter]]:
    """A function that has sd-scripts make one training step, and what it trains."""
    sys.path.insert(0, str(checkout))
    script: Any = importlib.import_module("flux_train_network")
    library: Any = importlib.import_module("library.train_util")
    options = script.setup_parser().parse_args(OPTIONS.format(**vars(setting)).split())
    library.load_arbitrary_dataset = lambda args: dataset(library.MinimalDataset, setting)
    steps = Steps()
    training = replaced(script.FluxNetworkTrainer, steps.reached)()
    network = steps.start(lambda: training.train(options))
    return steps.step, list(network.parameters())


class Steps:
    """Training in a thread of its own, which stands still from the start of a step until `step` is called."""

    def __init__(self) -> None:
        self._reached: queue.Queue[Any] = queue.Queue()
        self._go: queue.Queue[None] = queue.Queue()

    def start(self, train: Callable[[], None]) -> Any:
        """Begin training and return what it hands over at its first step."""

        def run() -> None:
            try:
                train()
                self._reached.put(RuntimeError("training has ended"))
            except BaseException as error:  # raised where the step was asked for
                self._reached.put(error)

        threading.Thread(target=run, daemon=True).start()
        return self._next()

    def reached(self, handed_over: Any) -> None:
        """Called by training at the start of each step: waits for `step`."""
        self._reached.put(handed_over)
        self._go.get()

    def step(self, index: int) -> None:
        """From the start of one step to that of the next."""
        self._go.put(None)
        self._next()

    def _next(self) -> Any:
        if isinstance(found := self._reached.get(), BaseException):
            raise found
        return found


def replaced(base: Any, reached: Callable[[Any], None]) -> Any:
    """sd-scripts' trainer `base` without its files; it calls `reached` with the LoRA before each step."""

    class Trainer(base):
        def get_tokenize_strategy(self, args: argparse.Namespace) -> None: ...

        def get_tokenizers(self, tokenize_strategy: None) -> list[None]:
            return [None, None]

        def load_target_model(self, args: argparse.Namespace, weight_dtype: torch.dtype, accelerator: Any) -> Any:
            models: Any = importlib.import_module("library.flux_models")
            with torch.device("meta"):
                flux = models.Flux(models.configs["dev"].params).to(torch.float8_e4m3fn)
            return "flux1", [NotUsed(), NotUsed()], NotUsed(), flux.to_empty(device="cpu")

        def cache_text_encoder_outputs_if_needed(self, *arguments: Any) -> None: ...

        def sample_images(self, *arguments: Any) -> None: ...

        def on_step_start(self, args: argparse.Namespace, accelerator: Any, network: Any, *rest: Any, **more: Any):
            reached(accelerator.unwrap_model(network))

    return Trainer


class NotUsed(nn.Module):
    """Stands for the text encoders and the autoencoder."""

    device, dtype = torch.device("cpu"), torch.bfloat16


def dataset(base: Any, setting: Setting) -> Any:
    """The dataset of one image, of sd-scripts' class `base`."""

    class OneImage(base):
        def __init__(self) -> None:
            super().__init__((setting.resolution, setting.resolution), 1.0)
            self.content = batch(setting)
            self.num_train_images = len(self)

        def __len__(self) -> int:
            return 1_000_000

        def __getitem__(self, index: int) -> dict[str, Any]:
            return dict(self.content)

        def is_latent_cacheable(self) -> bool:
            return True

        def is_text_encoder_output_cacheable(self, *arguments: Any) -> bool:
            return True

        def new_cache_latents(self, *arguments: Any) -> None: ...

    return OneImage()


def batch(setting: Setting) -> dict[str, Any]:
    """Random latents and text as sd-scripts' loader gives them, in fp32: CLIP-L's vector, T5's embeddings, their
    position ids and mask.
    """
    side, length = setting.resolution // 8, setting.t5_length
    text = torch.randn(1, 768), torch.randn(1, length, 4096), torch.zeros(1, length, 3), torch.ones(1, length)
    return {
        "latents": torch.randn(1, 16, side, side),
        "text_encoder_outputs_list": list(text),
        "loss_weights": torch.ones(1),
        "input_ids_list": None,
        "captions": [""],
    }
