"""The optimizer of all weights that train, and one optimizer step."""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from fluxq.errors import WrongRequest, is_out_of_memory
from fluxq.model.linear import Linear

from .average import Average
from .flat import Flat
from .libraries import LIBRARIES, MIN_8_BITS, Library, allocate_state, library_of
from .max_norm import MaxNorm

BETWEEN = -1
"""Instead of a number of steps: in the middle of an update, or left there by one that failed."""

OF_THIS_DEVICE = ("params", "fused", "foreach", "capturable", "differentiable")
"""Options of a group that a saved state does not change."""

OF_GROUP = "group_"
"""In front of the names of tensors that a library keeps in its group: the state of the first parameter has them."""


def build_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    learning_rate: float,
    weight_decay: float,
    arguments: Mapping[str, Any] | None = None,
) -> FlatOptimizer:
    """The optimizer `name`, one of OPTIMIZERS or package.module.Class, with further `arguments` for it.

    parameters: a list, or torch's groups ("params" and "lr"), which have their own learning rates. The state is
    allocated here and its kernels are loaded, because a first step that runs out of memory for them would be left half
    done; the state of classes that are not in OPTIMIZERS is allocated by the first step. Raises WrongRequest if the
    optimizer cannot be imported or does not take the arguments.
    """
    optimizer = FlatOptimizer(name, parameters, learning_rate, weight_decay, arguments)
    for flat in optimizer.flats:
        if flat.values.is_cuda:
            small = nn.Parameter(torch.zeros_like(flat.parameters[0]))
            FlatOptimizer(name, [small], learning_rate, weight_decay, arguments).step()
            # CUDA loads a kernel at its first launch
    return optimizer


class FlatOptimizer(torch.optim.Optimizer):
    """The optimizer of parameters that become slices of flat tensors (flat.py), so one norm serves all of them, and one
    update if the library's optimizer is element-wise.

    To the outside it is an optimizer like any other: `param_groups` and `state` are those of the parameters, the state
    in slices too. A parameter that has no gradient is updated as if it were zero.

    done: the number of steps of the run that parameters and state have had, or BETWEEN. changing: the lock held while
    either changes or is saved. max_norm and average: what follows each update, if anything does. notes: for the log, of
    the update before the last step: "scaled", the number of layers whose norm was limited.
    """

    max_norm: MaxNorm | None = None
    average: Average | None = None
    notes: dict[str, int]

    def __init__(
        self,
        name: str,
        parameters: Iterable[Any],
        learning_rate: float,
        weight_decay: float,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(parameters, {"lr": learning_rate, "weight_decay": weight_decay})
        self.done, self.changing, self.notes, library = 0, threading.RLock(), {}, library_of(name)
        self.flats = [
            _FlatUpdate(library, part, group, arguments or {})
            for group in self.param_groups
            for part in _parts(library, group["params"])
        ]
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
            flat.update_states(self.state)

    def follow(self, layers: Iterable[Linear], max_norm: float, ema: float) -> None:
        """From now on limit the norms of `layers` to `max_norm` after each update, and average with decay `ema`; 0:
        do not.
        """
        self.max_norm = MaxNorm(layers, max_norm) if max_norm else None
        self.average = Average(self.flats, ema) if ema else None

    def finish(self) -> None:
        """What follows an update: limit the norms, then average."""
        if self.max_norm is not None:
            self.max_norm()
        if self.average is not None:
            self.average.update()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the parameters are their average, if there is one, and nothing changes or saves them."""
        with self.changing, nullcontext() if self.average is None else self.average.shown():
            yield

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad()
        for flat in self.flats:
            flat.values.grad = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state, also one that was saved with an optimizer state per tensor.

        Raises ValueError and similar errors if it does not have the form of this one's.
        """
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key not in OF_THIS_DEVICE})
        states = dict(zip(parameters_of(self), range(len(parameters_of(self))), strict=True))
        for flat in self.flats:
            flat.load([dict(state_dict["state"].get(states[p], {})) for p in flat.parameters])
            self.state.update(zip(flat.parameters, flat.states(), strict=True))


class _FlatUpdate(Flat):
    """Some parameters of a group, and the library's optimizer of their flat tensor, or of its slices."""

    def __init__(
        self,
        library: Library,
        parameters: Sequence[nn.Parameter],
        group: dict[str, Any],
        arguments: Mapping[str, Any],
    ) -> None:
        super().__init__(parameters)
        self.group, self.updates, self.library = group, 0, library
        self.updated = [self.values] if library.is_elementwise else self.parameters
        if library is LIBRARIES["adamw"]:
            arguments = {"fused": self.values.is_cuda, **arguments}
        if library.package == "bitsandbytes" and library.is_elementwise and not _has_8_bits(parameters[0]):
            arguments = {"min_8bit_size": self.values.numel() + 1, **arguments}
        self.inner: Any = library.make(self.updated, group["lr"], group["weight_decay"], arguments)
        allocate_state(library, self.inner, self.updated)
        own = self.inner.param_groups[0]
        group.update({key: value for key, value in own.items() if key not in group and not isinstance(value, Tensor)})

    def states(self) -> list[dict[str, Any]]:
        """The state of each parameter, of plain tensors, in slices of the flat tensor's."""
        if self.library.is_elementwise:
            columns = {key: self._sliced(key, value) for key, value in _plain(self.inner.state[self.values]).items()}
            states = [{key: column[i] for key, column in columns.items()} for i in range(len(self.parameters))]
        else:
            states = [dict(self.inner.state[p]) for p in self.parameters]
        return [{**states[0], **self._of_group()}, *states[1:]]

    def update_states(self, state: dict[Any, dict[str, Any]]) -> None:
        """Put into the states of the parameters what a step makes anew; slices are updated in place."""
        if self.updates == 1 or not self.library.is_elementwise:
            state.update(zip(self.parameters, self.states(), strict=True))
        if self.updates == 1:
            for key, value in (*state[self.parameters[0]].items(), *self.group.items()):
                _require_savable(self.library, key, value)
        state[self.parameters[0]].update(self._of_group())
        if self.library.is_elementwise and "step" in self.inner.state[self.values]:
            for p in self.parameters:
                state[p]["step"] = self.inner.state[self.values]["step"]

    def _of_group(self) -> dict[str, Tensor]:
        own = self.inner.param_groups[0].items()
        return {OF_GROUP + key: value for key, value in own if isinstance(value, Tensor) and key != "lr"}

    def _sliced(self, key: str, value: Any) -> list[Any]:
        if not isinstance(value, Tensor) or not value.ndim or key.startswith("qmap") or key.endswith("_qmap"):
            return [value] * len(self.parameters)
        return self.parts(value) if value.numel() == self.values.numel() else self.blocks(value)

    def load(self, saved: Sequence[dict[str, Any]]) -> None:
        """Take over the saved states of the parameters. Raises ValueError and similar errors for other forms."""
        for key in [key for key in saved[0] if key.startswith(OF_GROUP)]:
            self.inner.param_groups[0][key.removeprefix(OF_GROUP)] = saved[0].pop(key).to(self.values.device)
        if not self.library.is_elementwise:
            for p, state in zip(self.parameters, saved, strict=True):
                self.inner.state[p] = {key: self._placed(key, value) for key, value in state.items()}
            return
        flat = self.inner.state[self.values]
        for p, state, own in zip(self.parameters, saved, self.states(), strict=True):
            for nested in [key for key, value in state.items() if isinstance(value, dict)]:
                state |= state.pop(nested)  # bitsandbytes nests its tensors
            for key, value in own.items():
                if key.startswith(OF_GROUP):
                    continue
                if not isinstance(value, Tensor):
                    flat[key] = state[key]
                elif state[key].shape != value.shape:
                    raise ValueError(f"{key} of a parameter of shape {tuple(p.shape)} is {tuple(state[key].shape)}")
                else:
                    value.copy_(state[key])

    def _placed(self, key: str, value: Any) -> Any:
        """`value` of a saved state where the library has it: torch's count of steps may stay on the CPU."""
        on_cpu = key == "step" and not any(self.inner.param_groups[0].get(name) for name in ("fused", "capturable"))
        return value.to(self.values.device) if isinstance(value, Tensor) and not on_cpu else value

    def step(self) -> None:
        """Update the flat tensor, with the options that the group has now."""
        own = self.inner.param_groups[0]
        options = {key: self.group[key] for key in own if key in self.group and key not in OF_THIS_DEVICE}
        if isinstance(own["lr"], Tensor):
            own["lr"].fill_(options.pop("lr"))
        own.update(options)
        self.updates += 1
        if not self.library.is_elementwise:
            for p, gradient in zip(self.parameters, self.parts(cast(Tensor, self.values.grad)), strict=True):
                p.grad = gradient
        if self.library.package == "bitsandbytes" and self.library.is_elementwise:
            self.inner.update_step(own, self.values, 0, 0)  # `step` would wait for the GPU after every tensor
        else:
            with torch.compiler.set_stance("force_eager") if self.library.package == "torchao" else nullcontext():
                self.inner.step()
        for p in () if self.library.is_elementwise else self.parameters:
            p.grad = None
        self.group.update({key: own[key] for key in own if key != "params" and not isinstance(own[key], Tensor)})


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """`state` with the parts of quantized tensors of torchao in place of these, as bytes and scales."""
    plain: dict[str, Any] = {}
    for key, value in state.items():
        parts = {name: getattr(value, name) for name in getattr(value, "tensor_attrs", ())}
        if not parts:
            plain[key] = value
        for name, part in parts.items():
            plain[f"{key}_{name}"] = part.view(torch.uint8) if part.dtype == torch.float8_e4m3fn else part
    return plain


def _require_savable(library: Library, key: str, value: Any) -> None:
    """Raise WrongRequest if the state has what a saved state cannot hold."""
    values = value if isinstance(value, list | tuple) else [value]
    is_plain = all(v is None or isinstance(v, int | float | str) for v in values) or type(value) is Tensor
    if not (is_plain or key == "params"):
        raise WrongRequest(
            f"the state of {library.path} cannot be saved, as its {key} is a {type(value).__name__}; choose another "
            "optimizer"
        )


def _parts(library: Library, parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """`parameters` by the flat tensors that hold them: those whose states have as many bits, up to `most` numbers."""
    eight = [_has_8_bits(p) or library.package != "bitsandbytes" or not library.is_elementwise for p in parameters]
    parts: list[list[nn.Parameter]] = []
    for bits in (True, False):
        numbers = math.inf
        for p in (p for p, has in zip(parameters, eight, strict=True) if has == bits):
            numbers += p.numel()
            if numbers > library.most or math.isinf(numbers):
                parts.append([])
                numbers = p.numel()
            parts[-1].append(p)
    return parts


def _has_8_bits(p: nn.Parameter) -> bool:
    """Whether bitsandbytes stores the state of `p` in 8 bits: that of small tensors stays in fp32."""
    return p.numel() >= MIN_8_BITS


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
    scaled = optimizer.max_norm.scaled if optimizer.max_norm else None
    read = torch.stack([*losses, optimizer.clip(clip), *([] if scaled is None else [scaled.to(losses[0])])])
    objective.prepare(after)
    *values, norm = (
        read.tolist()
    )  # the only time that the CPU waits; before the update, since nothing may fail after it
    if scaled is not None:
        values, norm, optimizer.notes["scaled"] = values[:-1], values[-1], int(norm)
    with optimizer.changing:
        if math.isfinite(norm):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            update(optimizer)
        optimizer.done = step + 1
    optimizer.zero_grad()
    return sum(map(operator.mul, values, shares)) / sum(shares), norm


def update(optimizer: FlatOptimizer) -> None:
    """optimizer.step(), with the temporary memory that it needs tested first, so that running out changes nothing.

    Raises WrongRequest if memory runs out in the middle all the same: then only some weights are updated, and the run
    cannot continue from them.
    """
    needed = [flat.library.temporary * flat.values.numel() for flat in optimizer.flats]
    needed += [] if optimizer.max_norm is None else [optimizer.max_norm.temporary]
    if optimizer.flats and max(needed):
        torch.empty(max(needed), dtype=torch.uint8, device=optimizer.flats[0].values.device)
    before, done = _update_count(optimizer), optimizer.done
    optimizer.done = BETWEEN
    try:
        optimizer.step()
        optimizer.finish()
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


def lora_groups(model: nn.Module, learning_rate: float, plus_ratio: float) -> list[dict[str, Any]]:
    """The LoRA of `model` as groups. plus_ratio: by how much the learning rate of each `up` is higher (LoRA+, Hayou et
    al. 2024); then they are a group of their own, behind that of each `down`.
    """
    named = dict(model.named_parameters())
    if plus_ratio == 1:
        return [{"params": [*named.values()], "lr": learning_rate}]
    downs, ups = ([p for name, p in named.items() if name.endswith(end)] for end in ("lora_down", "lora_up"))
    return [
        {"params": downs, "lr": learning_rate},
        {"params": ups, "lr": plus_ratio * learning_rate, "plus_ratio": plus_ratio},
    ]


def restart_rates(optimizer: FlatOptimizer, *learning_rates: float | None) -> None:
    """Give the groups of each model its learning rate, where a loaded state has put earlier ones."""
    rates, rate = iter(learning_rates), None
    for group in optimizer.param_groups:
        if "plus_ratio" not in group:
            rate = next(rates, None)
        if rate is not None:
            group["initial_lr"] = rate * group.get("plus_ratio", 1)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]
