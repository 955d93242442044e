"""Which tensors of a block are alive at once, worked out without running it.

The story of a block is told as it happens (fluxq/model/blocks.py): each op makes its outputs, each tensor goes when its
last reader has run. A name in `Live` is a tensor with its bytes; the most bytes that were there at once is the peak.
tests/model/test_costs.py holds this against counted bytes of the real code.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from fluxq.kernels.lora_linear import FEW_ROWS
from fluxq.kernels.replay import POLICIES

CHUNK = 1 << 24
"""Weights that the reference backend decodes or rounds at a time on a card."""


class Live:
    """Tensors that are there, and the most bytes that ever were."""

    def __init__(self, **sizes: int) -> None:
        self.sizes, self.now, self.peak = dict[str, int](), 0, 0
        self.make(**sizes)

    def make(self, temporary: int = 0, **sizes: int) -> None:
        """These come to be, by an op that has `temporary` bytes more while it runs."""
        assert not sizes.keys() & self.sizes.keys(), sizes.keys() & self.sizes.keys()
        self.sizes |= sizes
        self.now += sum(sizes.values())
        self.peak = max(self.peak, self.now + temporary)

    def drop(self, *names: str) -> None:
        """These go, if they are there."""
        for name in names:
            self.now -= self.sizes.pop(name, 0)


@dataclass(frozen=True)
class Product:
    """A linear layer, or those rows of it that are computed apart, in use: (rows, k) by (n, k).

    rank: of its LoRA, 0 without; compute: as it is asked for; feeds: as in fluxq/kernels/replay.py; stored: bytes of a
    weight in its format, 2 for one that needs no decoding; produced: its input comes of an op that makes it in the form
    the layer wants.
    """

    rows: int
    n: int
    k: int
    rank: int
    compute: str
    feeds: str
    stored: float
    produced: bool = True

    @property
    def eight_bits(self) -> str:
        """The type of its forward product where that is not bf16: "int8", "fp8", or ""."""
        return "" if self.compute == "bf16" or self.rows <= FEW_ROWS else self.compute.removesuffix("_dx")

    @property
    def eight_bits_back(self) -> str:
        return self.eight_bits if self.compute.endswith("_dx") else ""

    @property
    def weights(self) -> int:
        return self.n * self.k

    def room(self, lanes: int) -> int:
        """Columns that are left free behind each row of its input."""
        return -(-self.rank // lanes) * lanes if lanes and self.produced and self.compute == "bf16" else 0

    def x(self, lanes: int) -> int:
        """Bytes of its input."""
        return self.rows * (self.k + self.room(lanes)) * 2

    @property
    def eight_bit_rows(self) -> int:
        """Bytes of its input in 8 bits, with what comes beside."""
        return self.rows * (self.k + 4 + 4 * self.rank) if self.eight_bits else 0

    @property
    def y(self) -> int:
        return self.rows * self.n * 2

    @property
    def s(self) -> int:
        """Bytes of x down^T as it is kept for the gradient."""
        return self.rows * self.rank * (4 if self.eight_bits and self.produced else 2)

    @property
    def gradients(self) -> int:
        return 4 * self.rank * (self.n + self.k)

    @property
    def lora_16bit(self) -> int:
        """Bytes of its LoRA weights in the dtype of the input."""
        return 2 * self.rank * (self.n + self.k)


@dataclass(frozen=True)
class Shape:
    """A block in use. streams: name -> (rows, its products by name); width of a stream, hidden of the MLP; gates: the
    modulation is trained too, and what it multiplies is read again.
    """

    streams: Mapping[str, tuple[int, Mapping[str, Product]]]
    width: int
    hidden: int
    heads: int
    single: bool
    batch: int = 1
    gates: bool = False

    @property
    def rows(self) -> int:
        return sum(rows for rows, _ in self.streams.values())

    @property
    def u(self) -> int:
        """One stream of activations, text and image together, in bytes."""
        return self.rows * self.width * 2

    @property
    def products(self) -> list[Product]:
        return [p for _, products in self.streams.values() for p in products.values()]

    def unread(self, policy: str) -> set[str]:
        """What the outputs that the replay need not compute feed."""
        keeps = set(POLICIES[policy])
        return keeps - {"residual"} if self.gates else keeps | {"end"}

    def kept(self, policy: str) -> dict[str, int]:
        """Tensor -> bytes that `policy` keeps of it beside the inputs."""
        keeps, found = set(POLICIES[policy]), dict[str, int]()
        if "qkv" in keeps:
            found |= dict.fromkeys("qkv", self.u) | {"rstd": 2 * self.rows * self.heads * 4}
        if "attention" in keeps:
            found |= {"attended": self.u, "lse": self.rows * self.heads * 4}
        for stream, (rows, _) in self.streams.items():
            if "residual" in keeps and not self.single:
                found[f"x1_{stream}"] = rows * self.width * 2
            if policy == "keep_all8":
                found[f"hidden8_{stream}"] = rows * (self.hidden + 4)
            elif "hidden" in keeps:
                found[f"hidden_{stream}"] = rows * self.hidden * 2
        return found


class Triton:
    """What the kernels have beside their inputs and outputs. A decoded weight lies in a scratch that stays."""

    lanes = 32

    def scratch(self, products: Collection[Product], chunk: int) -> int:
        """Bytes of the scratch: the largest piece of a weight that is decoded at once, for either direction."""
        sizes = [0]
        for p in products:
            if p.stored == 2 or (p.eight_bits and p.eight_bits_back):
                continue
            if not p.eight_bits:
                sizes.append(min(p.n, chunk) * (p.k + p.room(self.lanes)) * 2)
            sizes.append(p.n * (min(p.k, chunk) + p.room(self.lanes)) * 2)
        return max(sizes)

    def product(self, p: Product) -> int:
        if not p.eight_bits:
            return p.lora_16bit + p.n * p.room(self.lanes) * 2
        decoded = 0 if p.stored == 1 else p.weights + 4 * p.n
        return p.lora_16bit + decoded + (0 if p.produced else p.eight_bit_rows)

    def product_backward(self, p: Product) -> int:
        ds = p.rows * p.rank * 2
        if p.eight_bits_back:
            return p.lora_16bit + p.weights + p.rows * (p.n + 4) + ds
        return p.lora_16bit + ds + p.n * p.room(self.lanes) * 2

    def modulate(self, u: int) -> int:
        return 0

    def modulate_backward(self, u: int) -> int:
        return 0

    def norm_rope(self, u: int) -> int:
        return 0

    def norm_rope_backward(self, u: int) -> int:
        return 0

    def gelu(self, hidden: int, beside: int) -> int:
        return 0

    def to_8_bits(self, hidden: int) -> int:
        return 0

    def attention_backward(self, u: int) -> int:
        """The gradient made contiguous, and that of the queries summed in fp32."""
        return 3 * u


class Reference(Triton):
    """What plain PyTorch has: the same lifetimes, and the values between one operator and the next."""

    lanes = 0

    def scratch(self, products: Collection[Product], chunk: int) -> int:
        return 0


def forward_peak(shape: Shape, policy: str, ops: Triton) -> int:
    """The most bytes of the block while it runs forward, its inputs, outputs and what it keeps among them."""
    live = Live(inputs=shape.u)
    _run(live, shape, policy, ops, replay=False)
    return live.peak


def backward_peak(shape: Shape, policy: str, ops: Triton) -> int:
    """The most bytes while it is replayed and its gradients are worked out: its inputs, what it kept, the gradients
    that come in and all that it makes.
    """
    live = Live(inputs=shape.u, d_out=shape.u, **shape.kept(policy))
    _run(live, shape, policy, ops, replay=True)
    (_single_backward if shape.single else _double_backward)(live, shape, ops)
    return live.peak


def _run(live: Live, shape: Shape, policy: str, ops: Triton, replay: bool) -> None:
    """The block's forward pass, or in the backward pass its replay: then whatever a gradient reads stays."""
    unread = shape.unread(policy) if replay else set()
    keeps = set(POLICIES[policy])
    had = keeps if replay else set()  # values that the replay has

    def product(name: str, p: Product, stream: str) -> None:
        if p.rank and replay:
            live.make(**{f"s_{name}_{stream}": p.s})
        if p.feeds not in unread:
            live.make(ops.product(p), **{f"y_{name}_{stream}": p.y})

    def attend() -> None:
        if "qkv" not in had:
            live.make(ops.norm_rope(shape.u), **dict.fromkeys("qkv", shape.u), rstd=2 * shape.rows * shape.heads * 4)
        if "attention" not in had:
            live.make(attended=shape.u, lse=shape.rows * shape.heads * 4)
        if not replay and "qkv" not in keeps:
            live.drop(*"qkv", "rstd")

    def gelu(stream: str, rows: int, p: Product, beside: int) -> None:
        hidden = rows * shape.hidden * 2
        if policy == "keep_all8" and replay:
            live.make(ops.to_8_bits(hidden), **{f"hidden_{stream}": hidden})
            live.drop(f"hidden8_{stream}")
        elif policy == "keep_all8":
            live.make(ops.to_8_bits(hidden), **{f"hidden8_{stream}": rows * (shape.hidden + 4)})
        live.make(
            ops.gelu(hidden, beside),
            **{f"act_{stream}": p.x(ops.lanes), f"act8_{stream}": p.eight_bit_rows},
        )

    def finish(stream: str, rows: int, p: Product) -> None:
        product("end", p, stream)
        live.drop(f"act8_{stream}", *(() if replay and p.rank else (f"act_{stream}",)))
        live.make(**{f"out_{stream}": rows * shape.width * 2})
        if not shape.gates:
            live.drop(f"y_end_{stream}")

    for stream, (rows, products) in shape.streams.items():
        p = products["qkv"]
        live.make(
            ops.modulate(rows * shape.width * 2),
            **{f"mod_{stream}": p.x(ops.lanes), f"mod8_{stream}": p.eight_bit_rows},
        )
        product("qkv", p, stream)
        if shape.single:
            product("hidden", products["hidden"], stream)
            if "hidden" not in had:
                live.sizes[f"hidden_{stream}"] = live.sizes.pop(f"y_hidden_{stream}")
        else:
            live.drop(f"mod8_{stream}", *(() if replay and p.rank else (f"mod_{stream}",)))
    attend()
    for stream, (rows, products) in shape.streams.items():
        if shape.single:
            gelu(stream, rows, products["end"], shape.u)
            finish(stream, rows, products["end"])
            live.drop(f"mod8_{stream}", *(() if replay and products["qkv"].rank else (f"mod_{stream}",)))
            continue
        product("proj", products["proj"], stream)
        if "residual" not in had:
            live.make(**{f"x1_{stream}": rows * shape.width * 2})
        p = products["hidden"]
        live.make(
            ops.modulate(rows * shape.width * 2),
            **{f"mod2_{stream}": p.x(ops.lanes), f"mod28_{stream}": p.eight_bit_rows},
        )
        if not (replay and shape.gates):
            live.drop(f"y_proj_{stream}")
        product("hidden", p, stream)
        if "hidden" not in had:
            live.sizes[f"hidden_{stream}"] = live.sizes.pop(f"y_hidden_{stream}")
        gelu(stream, rows, products["end"], 0)
        finish(stream, rows, products["end"])
        live.drop(f"mod28_{stream}", *(() if replay and p.rank else (f"mod2_{stream}",)))
        if not replay:
            live.drop(*(() if policy == "keep_all" else (f"hidden_{stream}",)))
            live.drop(*(() if "residual" in keeps else (f"x1_{stream}",)))
    live.drop(*(f"y_qkv_{stream}" for stream in shape.streams))


def _product_backward(live: Live, ops: Triton, p: Product, name: str, stream: str, saved: str, dy: str, dx: str) -> None:
    """dy and the saved input to dx and the gradients of LoRA."""
    live.make(ops.product_backward(p), **{dx: p.x(ops.lanes)})
    live.make(**{f"grad_{name}_{stream}": p.gradients})
    live.drop(dy, saved, f"s_{name}_{stream}")


def _attention_backward(live: Live, shape: Shape, ops: Triton, *grad: str) -> None:
    live.make(ops.attention_backward(shape.u), dq=shape.u, dk=shape.u, dv=shape.u)
    live.drop(*grad, "attended", "lse", "v")
    sizes = {f"d_qkv_{stream}": rows * shape.width * 6 for stream, (rows, _) in shape.streams.items()}
    live.make(ops.norm_rope_backward(shape.u), **sizes)
    live.drop("dq", "dk", "dv", "q", "k", "rstd")


def _single_backward(live: Live, shape: Shape, ops: Triton) -> None:
    ((stream, (_, products)),) = shape.streams.items()
    u = shape.u
    live.make(dy=u)
    _product_backward(live, ops, products["end"], "end", stream, f"act_{stream}", "dy", "d_act")
    live.make(d_hidden=products["hidden"].y)
    live.drop(f"hidden_{stream}", f"y_end_{stream}")
    _attention_backward(live, shape, ops, "d_act")
    _product_backward(live, ops, products["hidden"], "hidden", stream, "", "d_hidden", "d_mod1")
    _product_backward(live, ops, products["qkv"], "qkv", stream, "", f"d_qkv_{stream}", "d_mod2")
    live.make(d_mod=products["qkv"].x(ops.lanes))
    live.drop("d_mod1", "d_mod2", f"mod_{stream}")
    live.make(ops.modulate_backward(u), d_x=u)
    live.drop("d_mod")
    live.make(d_inputs=u)


def _double_backward(live: Live, shape: Shape, ops: Triton) -> None:
    for stream, (rows, products) in reversed(shape.streams.items()):
        u = rows * shape.width * 2
        live.make(dy=u)
        _product_backward(live, ops, products["end"], "end", stream, f"act_{stream}", "dy", "d_act")
        live.make(d_hidden=products["hidden"].y)
        live.drop("d_act", f"hidden_{stream}", f"y_end_{stream}")
        _product_backward(live, ops, products["hidden"], "hidden", stream, f"mod2_{stream}", "d_hidden", "d_mod2")
        live.make(ops.modulate_backward(u), **{f"d_res_{stream}": u}, d_proj=u)
        live.drop("d_mod2", f"x1_{stream}", f"y_proj_{stream}")
        _product_backward(live, ops, products["proj"], "proj", stream, "", "d_proj", f"d_attended_{stream}")
    live.make(d_attended=shape.u)
    live.drop(*(f"d_attended_{stream}" for stream in shape.streams))
    _attention_backward(live, shape, ops, "d_attended")
    for stream, (rows, products) in reversed(shape.streams.items()):
        u = rows * shape.width * 2
        _product_backward(live, ops, products["qkv"], "qkv", stream, f"mod_{stream}", f"d_qkv_{stream}", "d_mod")
        live.make(ops.modulate_backward(u), d_x=u)
        live.drop("d_mod")
        live.make(**{f"d_inputs_{stream}": u})
        live.drop("d_x", f"d_res_{stream}")
