"""Optimizers, and one optimizer step."""

from __future__ import annotations

import importlib
import math
import operator
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fluxq.console import quiet_imports
from fluxq.errors import WrongRequest, is_out_of_memory

from .flat import Flat

OPTIMIZERS = ("adamw", "adamw8bit")
MIN_8_BITS = 4096  # numbers in a tensor; see _has_8_bits
BETWEEN = -1
"""Instead of a number of steps: in the middle of an update, or left there by one that failed."""


def build_optimizer(
    name: str, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], learning_rate: float, weight_decay: float
) -> FlatOptimizer:
    """The optimizer `name`: adamw (state in fp32, 8 bytes per weight) or adamw8bit (bitsandbytes; 2 bytes per weight).

    parameters: a list, or torch's groups ("params" and "lr"), which have their own learning rates. The state is
    allocated here and its kernels are loaded, because a first step that runs out of memory for them would be left half
    done.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"the optimizer must be one of {', '.join(OPTIMIZERS)}, not {name!r}")
    optimizer = FlatOptimizer(name, parameters, learning_rate, weight_decay)
    for flat in optimizer.flats:
        if flat.values.is_cuda:
            small = nn.Parameter(torch.zeros_like(flat.values[: flat.parameters[0].numel()]))
            FlatOptimizer(name, [small], learning_rate, weight_decay).step()  # CUDA loads a kernel at its first launch
    return optimizer


class FlatOptimizer(torch.optim.Optimizer):
    """AdamW of parameters that become slices of flat tensors (flat.py), so one norm and one update serve all of them.

    To the outside it is an optimizer like any other: `param_groups` and `state` are those of the parameters, the state
    in slices too. A parameter that has no gradient is updated as if it were zero.

    done: the number of steps of the run that parameters and state have had, or BETWEEN. changing: the lock held while
    either changes or is saved.
    """

    def __init__(self, name: str, parameters: Iterable[Any], learning_rate: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": learning_rate, "weight_decay": weight_decay})
        self.done, self.changing = 0, threading.RLock()
        self.flats = [_FlatUpdate(name, part, group) for group in self.param_groups for part in _parts(name, group)]
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]  # which schedules multiply
        for flat in self.flats:
            self.state.update(zip(flat.parameters, flat.states(), strict=True))

    @contextmanager
    def rounding(self) -> Iterator[None]:
        """Inside, nobody writes the parameters, so all of them are rounded once, when a layer first asks for it."""
        with ExitStack() as stack:
            for flat in self.flats:
                stack.enter_context(flat.unchanged())
            yield

    def gather(self) -> None:
        """Move the gradients of the parameters into those of the flat tensors, which `step` uses."""
        for flat in self.flats:
            flat.gather()

    def clip(self, norm: float) -> Tensor:
        """The norm of all gathered gradients, which are scaled down to at most `norm` (0: no limit)."""
        return torch.nn.utils.clip_grad_norm_([flat.values for flat in self.flats], norm or torch.inf)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters by the gradients that were gathered, or else by their own."""
        if any(flat.values.grad is None for flat in self.flats):
            self.gather()
        for flat in self.flats:
            flat.step()
            flat.values.grad = None
            for p in flat.parameters:
                self.state[p]["step"] = flat.state["step"]

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad()
        for flat in self.flats:
            flat.values.grad = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state, also one that was saved with an optimizer state per tensor.

        Raises ValueError and similar errors if it does not have the form of this one's.
        """
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        for index, p in enumerate(parameters_of(self)):
            saved = dict(state_dict["state"][index])
            for nested in [key for key, value in saved.items() if isinstance(value, dict)]:
                saved |= saved.pop(nested)  # bitsandbytes nests its tensors
            for key, own in self.state[p].items():
                if isinstance(own, Tensor):
                    if saved[key].shape != own.shape:
                        raise ValueError(f"{key} of parameter {index} is {tuple(saved[key].shape)}")
                    own.copy_(saved[key])
                else:
                    self.state[p][key] = saved[key]
        for flat in self.flats:
            flat.state["step"] = self.state[flat.parameters[0]]["step"]


class _FlatUpdate(Flat):
    """Some parameters of a group, and the library's optimizer of their flat tensor."""

    def __init__(self, name: str, parameters: Sequence[nn.Parameter], group: dict[str, Any]) -> None:
        super().__init__(parameters)
        self.group, self.updates, common = group, 0, dict(lr=group["lr"], weight_decay=group["weight_decay"])
        if name == "adamw":
            self.inner: Any = torch.optim.AdamW([self.values], **common, fused=self.values.is_cuda)
            self.state = self.inner.state[self.values]
            moments = (torch.zeros_like(self.values, requires_grad=False) for _ in range(2))
            step = torch.zeros((), device=self.values.device if self.values.is_cuda else "cpu")
            self.state |= dict(zip(("step", "exp_avg", "exp_avg_sq"), (step, *moments), strict=True))
        else:
            adamw = (
                import_bitsandbytes().optim.AdamW8bit
                if _has_8_bits(parameters[0])
                else import_bitsandbytes().optim.AdamW
            )
            self.inner = adamw([self.values], **common)
            self.inner.init_state(self.inner.param_groups[0], self.values, 0, 0)
            self.state = self.inner.state[self.values]
        own = self.inner.param_groups[0]
        group.update({key: value for key, value in own.items() if key not in group})

    def states(self) -> list[dict[str, Any]]:
        """The state of each parameter, in slices of the flat tensor's."""
        columns = {key: self._sliced(key, value) for key, value in self.state.items()}
        return [{key: column[i] for key, column in columns.items()} for i in range(len(self.parameters))]

    def _sliced(self, key: str, value: Any) -> list[Any]:
        if key in ("step", "qmap1", "qmap2"):
            return [value] * len(self.parameters)
        return self.blocks(value) if key.startswith("absmax") else self.parts(value)

    def step(self) -> None:
        """Update the flat tensor, with the options that the group has now."""
        own = self.inner.param_groups[0]
        own.update({key: self.group[key] for key in ("lr", "weight_decay", "betas", "eps")})
        self.updates += 1
        if isinstance(self.inner, torch.optim.AdamW):
            self.inner.step()
        else:
            self.inner.update_step(own, self.values, 0, 0)  # `step` would wait for the GPU after every tensor


def _parts(name: str, group: dict[str, Any]) -> list[list[nn.Parameter]]:
    """The parameters of `group` that one flat tensor can hold: those whose state has as many bits."""
    parameters = group["params"]
    if name == "adamw":
        return [parameters] if parameters else []
    parts = ([p for p in parameters if _has_8_bits(p) == bits] for bits in (True, False))
    return [part for part in parts if part]


def _has_8_bits(p: nn.Parameter) -> bool:
    """Whether bitsandbytes stores the state of `p` in 8 bits: that of small tensors stays in fp32."""
    return p.numel() >= MIN_8_BITS


def import_bitsandbytes() -> ModuleType:
    """bitsandbytes, without torch's compiler, which takes three seconds to load.

    bitsandbytes compiles Python versions of its kernels while it is imported. They are for devices that it has no
    kernels for, and fluxq runs on none of those: while it is imported, functions stay as they are.
    """
    compile = torch.compile
    torch.compile = lambda function=None, **_: (lambda f: f) if function is None else function
    try:
        with quiet_imports():
            return importlib.import_module("bitsandbytes")
    finally:
        torch.compile = compile


class Minimized(Protocol):
    """What is minimized: the loss of each micro-step by its number, and what can be done for it ahead."""

    def loss(self, index: int) -> Tensor: ...
    def share(self, index: int) -> float: ...
    def prepare(self, index: int) -> None: ...


def optimizer_step(
    optimizer: FlatOptimizer,
    objective: Minimized,
    step: int,
    accumulate: int,
    factor: float,
    clip: float,
) -> tuple[float, float]:
    """Optimizer step `step` (0-based): its mean loss, and the norm of its gradient before clipping to `clip`.

    The index of a micro-step counts over the whole run, `accumulate` per step; its loss counts by its share, so every
    image weighs as much as any other. factor: multiplies every learning rate. clip 0: no limit. If anything fails
    before the update, weights and state are unchanged; a gradient that is not finite changes nothing either.
    """
    losses, shares, after = [], [], (step + 1) * accumulate
    optimizer.zero_grad()  # an attempt that ran out of memory may have left some
    with optimizer.rounding():
        for index in range(step * accumulate, after):
            loss = objective.loss(index)
            shares.append(objective.share(index))
            (loss / (accumulate / shares[-1])).backward()
            losses.append(loss.detach())
    optimizer.gather()
    read = torch.stack([*losses, optimizer.clip(clip)])
    objective.prepare(after)
    *values, norm = (
        read.tolist()
    )  # the only time that the CPU waits; before the update, since nothing may fail after it
    with optimizer.changing:
        if math.isfinite(norm):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            update(optimizer)
        optimizer.done = step + 1
    optimizer.zero_grad()
    return sum(map(operator.mul, values, shares)) / sum(shares), norm


def update(optimizer: FlatOptimizer) -> None:
    """optimizer.step(), with the temporary memory that AdamW needs tested first, so that running out changes nothing.

    adamw8bit needs no temporary memory. Raises WrongRequest if memory runs out in the middle all the same: then only
    some weights are updated, and the run cannot continue from them.
    """
    for flat in optimizer.flats:
        if isinstance(flat.inner, torch.optim.AdamW):
            torch.empty_like(flat.values)  # as large as the roots of exp_avg_sq
    before, done = _update_count(optimizer), optimizer.done
    optimizer.done = BETWEEN
    try:
        optimizer.step()
    except RuntimeError as error:
        if _update_count(optimizer) == before:
            optimizer.done = done
            raise
        if not is_out_of_memory(error):
            raise
        raise WrongRequest(
            "memory ran out while weights were being updated; the last save is intact; close other programs and "
            "continue with --resume"
        ) from error


def _update_count(optimizer: FlatOptimizer) -> float:
    """The number of updates of flat tensors, including unfinished ones."""
    return sum(flat.updates for flat in optimizer.flats)


def restart_rates(optimizer: FlatOptimizer, *learning_rates: float | None) -> None:
    """Give the groups these learning rates, where a loaded state has put earlier ones."""
    for group, learning_rate in zip(optimizer.param_groups, learning_rates, strict=False):
        group["initial_lr"] = learning_rate


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]
