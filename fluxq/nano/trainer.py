"""The training loop of all pretraining stages: a time budget, two optimizers, a weight average, checkpoints."""

import copy
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .muon import Muon


class Trainer:
    """Trains `model` for `minutes`: Muon for hidden matrices, AdamW for the rest, an average of the weights.

    `run` leaves the average in `model`. With `bf16`, a bf16 copy computes while the optimizers keep fp32 weights. It
    saves a checkpoint every two minutes; the same command resumes from it.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        work: Path,
        minutes: float,
        muon_lr: float,
        adam_lr: float,
        average: float,
        bf16: bool = False,
    ):
        self.name, self.model, self.path, self.seconds = name, model, work / f"{name}.checkpoint.pt", 60 * minutes
        self.average = average
        named = [(key, value) for key, value in model.named_parameters() if value.requires_grad]
        hidden = [value for key, value in named if is_hidden_matrix(key, value)]
        rest = [value for key, value in named if not is_hidden_matrix(key, value)]
        self.optimizers = [
            (Muon(hidden, muon_lr, weight_decay=0.05), muon_lr),
            (torch.optim.AdamW(rest, adam_lr, betas=(0.9, 0.99), weight_decay=0.0), adam_lr),
        ]
        self.worker = copy.deepcopy(model).bfloat16() if bf16 else model
        self.mean = {key: value.clone() for key, value in model.state_dict().items()}
        self.step, self.elapsed = 0, 0.0
        if self.path.exists():
            self._load(torch.load(self.path, weights_only=True))

    def run(
        self,
        loss_of: Callable[[nn.Module, float], Tensor],
        decay_from: float,
        validate: Callable[[nn.Module], str] = lambda model: "",
    ) -> None:
        """Train until the time is up, and print progress.

        loss_of(model, fraction of the time used); the learning rate falls linearly from the fraction `decay_from` on;
        validate(averaged model) -> a note to print.
        """
        started, saved, printed, losses = time.monotonic() - self.elapsed, self.elapsed, self.elapsed, []
        masters: list[Tensor] = [value for value in self.model.parameters() if value.requires_grad]
        workers: list[Tensor] = [value for value in self.worker.parameters() if value.requires_grad]
        while self.elapsed < self.seconds:
            fraction = self.elapsed / self.seconds
            rate = min(1, (self.step + 1) / 100) * min(1, (1.02 - fraction) / (1 - decay_from))
            loss = loss_of(self.worker, fraction)
            loss.backward()
            if self.worker is not self.model:
                for master, worker in zip(masters, workers, strict=True):
                    master.grad = None if worker.grad is None else worker.grad.float()
                    worker.grad = None
            torch.nn.utils.clip_grad_norm_(masters, 1.0)
            for optimizer, lr in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr * rate
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                if self.worker is not self.model:
                    torch._foreach_copy_(workers, masters)
                keep = min(self.average, self.step / (self.step + 10))
                current = self.model.state_dict()
                torch._foreach_lerp_(list(self.mean.values()), [current[key] for key in self.mean], 1 - keep)
            losses.append(loss.item())
            self.step, self.elapsed = self.step + 1, time.monotonic() - started
            if self.elapsed - printed > 20:
                note = ""
                if self.elapsed - saved > 120:
                    note, saved = f" | {validate(self._averaged())}", self.elapsed
                    self._save()
                mean_loss = sum(losses) / len(losses)
                print(f"{self.name} {self.step:6d} | loss {mean_loss:.4f} | {self.elapsed:5.0f} s{note}", flush=True)
                printed, losses = self.elapsed, []
        self.model.load_state_dict(self.mean)
        self._save()
        note = validate(self._averaged())
        print(f"{self.name} done after {self.step} steps, {self.elapsed:.0f} s {note}", flush=True)

    def _averaged(self) -> nn.Module:
        model = copy.deepcopy(self.worker)
        model.load_state_dict(self.mean)
        return model.eval()

    def _save(self) -> None:
        optimizers = [optimizer.state_dict() for optimizer, _ in self.optimizers]
        state = {"model": self.model.state_dict(), "mean": self.mean, "optimizers": optimizers}
        save(self.path, state | {"step": self.step, "elapsed": self.elapsed, "random": torch.get_rng_state()})

    def _load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.worker.load_state_dict(state["model"])
        self.mean, self.step, self.elapsed = state["mean"], state["step"], state["elapsed"]
        for (optimizer, _), saved in zip(self.optimizers, state.get("optimizers") or state["optimisers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["random"])


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon trains it: matrices and kernels inside the networks, but not at their ends or in modulation."""
    ends = ("_in.", "final_layer", "_mod.", "modulation", "embed", "shared", "relative", "conv_out", "r.conv_in")
    return parameter.ndim >= 2 and not any(part in name for part in ends)


def save(path: Path, state: object) -> None:
    """torch.save that never leaves half a file."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)
