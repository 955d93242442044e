"""Where optimizers come from: their libraries, arguments that differ from the library's, default learning rates.

Any other class of an optimizer can be named by its path. Nothing is imported before it is used.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fluxq.config import OPTIMIZERS
from fluxq.console import quiet_imports
from fluxq.errors import WrongRequest, first_line
from fluxq.model.costs import OPTIMIZER_COSTS, OTHER_OPTIMIZER, OptimizerCost

MIN_8_BITS = 4096
"""Numbers in a tensor from which bitsandbytes keeps its state in 8 bits; that of smaller ones stays in fp32."""

REQUIRED = ("torch", "bitsandbytes", "torchao", "transformers")
"""Packages that fluxq itself needs."""

AS_ADAMW = "as for adamw, since its updates are as large"


@dataclass(frozen=True)
class Library:
    """An optimizer of a library.

    path: package.module.Class. rate: the default learning rate, for the `reason`; None: the library's own. arguments:
    for the class. is_elementwise: it updates every number by itself, or by sums over all of them, so that one tensor
    can stand for many, of up to `cost.most` numbers.
    """

    path: str
    rate: float | None = None
    reason: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    is_elementwise: bool = False
    cost: OptimizerCost = OTHER_OPTIMIZER

    @property
    def package(self) -> str:
        return self.path.partition(".")[0]

    @property
    def has_blocks(self) -> bool:
        """Whether its state is in bitsandbytes' blocks of 8-bit numbers, over one tensor for many."""
        return self.package == "bitsandbytes" and self.is_elementwise

    def averages(self, kind: Any = None) -> bool:
        """Whether it averages weights in place of a schedule: then it has one mode to train and one to evaluate.

        kind: the class or an optimizer of it, if it is loaded.
        """
        return self.package not in REQUIRED and callable(getattr(kind or self.load(), "eval", None))

    def load(self) -> type[torch.optim.Optimizer]:
        """The class. Raises WrongRequest, with what to install, if it cannot be imported."""
        module, _, name = self.path.rpartition(".")
        try:
            if self.package == "bitsandbytes":
                import_bitsandbytes()
            with quiet_imports():
                found = getattr(importlib.import_module(module), name, None)
        except ImportError as error:
            known = self.package == "pytorch_optimizer"
            way = "pip install 'fluxq[optimizers]'" if known else f"pip install the package that has {self.package}"
            raise WrongRequest(f"{self.path} cannot be imported ({first_line(error)}); {way}") from error
        if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
            raise WrongRequest(f"{self.path} is not a class of optimizers; name one as package.module.Class")
        return found

    def default_rate(self) -> tuple[float, str]:
        """The default learning rate and the reason. Raises WrongRequest if there is none."""
        if self.rate is not None:
            return self.rate, self.reason
        own = inspect.signature(self.load()).parameters.get("lr")
        if own is None or isinstance(own.default, bool) or not isinstance(own.default, int | float):
            raise WrongRequest(f"{self.path} has no default learning rate; give one with --lr")
        return float(own.default), f"the default of {self.path}"

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Raise WrongRequest if the class cannot be imported or does not take `arguments`."""
        if not arguments and self.package in REQUIRED and self.path in {known.path for known in LIBRARIES.values()}:
            return  # importing some takes seconds
        if own := {"lr": "--lr", "weight_decay": "training.weight_decay"}.keys() & arguments.keys():
            raise WrongRequest(f"--optimizer-args: {', '.join(sorted(own))} is a setting of its own")
        self.make([nn.Parameter(torch.zeros(2, 2))], 1e-4, 0.0, arguments)

    def make(
        self, tensors: Sequence[nn.Parameter], rate: float, decay: float, arguments: Mapping[str, Any]
    ) -> torch.optim.Optimizer:
        """An optimizer of `tensors`. Raises WrongRequest if it does not take the `arguments`."""
        kind = uncompiled(self.load())
        accepted = inspect.signature(kind).parameters
        options = {"weight_decay": decay} if self.takes_decay() else {}
        if "foreach" in accepted:
            options["foreach"] = False  # which needs temporary memory for one tensor, not for all
        try:
            made = kind(tensors, lr=rate, **(options | dict(self.arguments) | dict(arguments)))  # type: ignore[call-arg]
        except (TypeError, ValueError, AssertionError) as error:
            raise WrongRequest(f"{self.path} does not take its arguments: {first_line(error)}") from error
        if ignored := [name for name in arguments if name not in accepted and name not in made.defaults]:
            known = ", ".join(name for name, p in accepted.items() if p.kind != p.VAR_KEYWORD and name != "params")
            raise WrongRequest(f"{self.path} ignores {', '.join(ignored)}; it takes {known}")
        return made

    def takes_decay(self) -> bool:
        """Whether the class has a weight decay."""
        return self in LIBRARIES.values() or "weight_decay" in inspect.signature(self.load()).parameters


_ALPHA = "the usual one if alpha equals rank"
_THIRD = "a third of AdamW's, since Lion moves every weight by all of it"
_OWN = "Prodigy finds its own, and multiplies it by this"
_LARGER = "twice AdamW's; its authors' README: 1 to 10 times that of a schedule"
_FIXED, _SCALED = {"scale_parameter": False, "relative_step": False}, {"adjust_lr_fn": "match_rms_adamw"}
_KNOWN = {
    "adamw": Library("torch.optim.AdamW", 1e-4, _ALPHA, {"foreach": None}, True),
    "adamw8bit": Library("bitsandbytes.optim.AdamW8bit", 1e-4, _ALPHA, {}, True),
    "lion8bit": Library("bitsandbytes.optim.Lion8bit", 3e-5, _THIRD, {}, True),
    "adamw4bit": Library("torchao.optim.AdamW4bit", 1e-4, AS_ADAMW, {}, True),
    "adamwfp8": Library("torchao.optim.AdamWFp8", 1e-4, AS_ADAMW, {}, True),
    "adafactor": Library("transformers.optimization.Adafactor", 1e-4, AS_ADAMW, _FIXED),
    "muon": Library("torch.optim.Muon", 1e-4, AS_ADAMW, _SCALED),
    "prodigy": Library("pytorch_optimizer.Prodigy", 1.0, _OWN, {}, True),
    "came": Library("pytorch_optimizer.CAME", 1e-4, AS_ADAMW),
    "schedulefree_adamw": Library("pytorch_optimizer.ScheduleFreeAdamW", 2e-4, _LARGER, {}, True),
}
LIBRARIES = {name: replace(library, cost=OPTIMIZER_COSTS[name]) for name, library in _KNOWN.items()}
assert tuple(LIBRARIES) == OPTIMIZERS and LIBRARIES.keys() == OPTIMIZER_COSTS.keys()


def library_of(name: str) -> Library:
    """The library of optimizer `name`, one of OPTIMIZERS or package.module.Class."""
    return LIBRARIES.get(name) or Library(name)


def parse_arguments(arguments: Iterable[str]) -> dict[str, Any]:
    """NAME=VALUE, each value a number, a tuple, True and so on in Python, or else text."""
    parsed = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals or not name.strip().isidentifier():
            raise WrongRequest(f"--optimizer-args takes NAME=VALUE, not {argument!r}")
        try:
            parsed[name.strip()] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            parsed[name.strip()] = text.strip()
    return parsed


def allocate_state(library: Library, inner: Any, tensors: Sequence[nn.Parameter]) -> None:
    """Allocate the state of `tensors` as the first step would, as far as the library lets us."""
    group = inner.param_groups[0]
    moments = ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group.get("amsgrad") else []))
    if library.package == "pytorch_optimizer" and hasattr(inner, "init_group"):
        for p in tensors:
            p.grad = torch.zeros_like(p)
        with torch.no_grad():  # or copies of weights would have a history
            inner.init_group(group)
        for p in tensors:
            p.grad = None
    for p in tensors:
        if library.package == "bitsandbytes":
            inner.init_state(group, p, 0, 0)
        elif library.package == "torchao":
            state = {name: inner._new_buffer(p, name == "exp_avg") for name in moments}
            inner.state[p] |= {"step": torch.tensor(0.0), **state}
        elif library.path == "torch.optim.AdamW":
            state = {name: torch.zeros_like(p, requires_grad=False) for name in moments}
            step = torch.zeros((), device=p.device if group["fused"] else "cpu")
            inner.state[p] |= {"step": step, **state}
        elif library.path == "torch.optim.Muon":
            inner.state[p]["momentum_buffer"] = torch.zeros_like(p, requires_grad=False)


class Uncompiled(torch.optim.Optimizer):
    """torch's methods without what hides them from torch's compiler, whose import takes 2.5 s and 140 MiB."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


def uncompiled(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """`kind` with Uncompiled's methods where it has torch's; the `step` of torch's own optimizers imports it too."""
    own = {"step": torch.no_grad()(inspect.unwrap(kind.step))} if kind.__module__.startswith("torch.optim.") else {}
    bases: tuple[type, ...] = (kind,) if issubclass(Uncompiled, kind) else (kind, Uncompiled)
    return types.new_class(kind.__name__, bases, {}, lambda body: body.update(__doc__=kind.__doc__, **own))


def import_bitsandbytes() -> ModuleType:
    """bitsandbytes, without torch's compiler, which takes three seconds to load.

    bitsandbytes compiles Python versions of its kernels while it is imported. They are for devices that it has no
    kernels for, and fluxq runs on none of those: while it is imported, functions stay as they are. So do its kernels,
    each of which would be hidden from the compiler, and import it for that.
    """
    compile, register = torch.compile, torch.library.register_kernel
    torch.compile = lambda function=None, **_: (lambda f: f) if function is None else function
    torch.library.register_kernel = torch.library.impl
    try:
        with quiet_imports():
            return importlib.import_module("bitsandbytes")
    finally:
        torch.compile, torch.library.register_kernel = compile, register
