"""Which tensors of a block are alive at once, worked out without running it.

The story of a block is told as it happens (fluxq/model/blocks.py): each op makes its outputs, each tensor goes when its
last reader has run. A name in `Live` is a tensor with its bytes; the most bytes that were there at once is the peak.
tests/model/test_costs.py holds this against counted bytes of the real code.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from fluxq.kernels.cutting import FEW_ROWS, padding, parts
from fluxq.kernels.replay import POLICIES


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

    @property
    def padding(self) -> int:
        """Columns that are left free behind each row of its input."""
        return padding(self.rank) if self.rank and self.produced and self.compute == "bf16" else 0

    @property
    def x(self) -> int:
        """Bytes of its input."""
        return self.rows * (self.k + self.padding) * 2

    @property
    def as_rows(self) -> int:
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
    def forward_temporary(self) -> int:
        """Bytes that are there only while it multiplies: LoRA in 16 bits, and in 8 bits the weight and an input that
        did not come so.
        """
        lora = 2 * self.rank * (self.n + self.k)
        if not self.eight_bits:
            return lora + self.n * self.padding * 2
        return lora + (0 if self.stored == 1 else self.weights + 4 * self.n) + (0 if self.produced else self.as_rows)

    @property
    def backward_temporary(self) -> int:
        lora = 2 * self.rank * (self.n + self.k) + self.rows * self.rank * 2
        if self.eight_bits_back:
            return lora + self.weights + self.rows * (self.n + 4)
        return lora + self.n * self.padding * 2


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


def scratch(products: Collection[Product], chunk: int) -> int:
    """Bytes of the scratch that decoded weights lie in, about `chunk` numbers at a time (rows, or columns in the
    backward pass) and the LoRA's beside them: it stays. If no padding holds the bias, a weight is decoded whole.
    """
    sizes = [0]
    for p in products:
        if p.stored == 2 or p.eight_bits_back:
            continue
        if not p.eight_bits:
            sizes.append((_part(p.n, p.k, chunk) if p.padding else p.n) * (p.k + p.padding) * 2)
        sizes.append(p.n * (_part(p.k, p.n, chunk) + p.padding) * 2)
    return max(sizes)


def _part(length: int, width: int, chunk: int) -> int:
    """The longest part of a side."""
    return max(part.stop - part.start for part in parts(length, width, chunk))


def forward_peak(shape: Shape, policy: str) -> int:
    """The most bytes of the block while it runs forward, its inputs, outputs and what it keeps among them."""
    live = Live(inputs=shape.u)
    _run(live, shape, policy, replay=False)
    return live.peak


def backward_peak(shape: Shape, policy: str) -> int:
    """The most bytes while it is replayed and its gradients are worked out: its inputs, what it kept, the gradients
    that come in and all that it makes.
    """
    live = Live(inputs=shape.u, d_out=shape.u, **shape.kept(policy))
    _run(live, shape, policy, replay=True)
    (_single_backward if shape.single else _double_backward)(live, shape)
    return live.peak


def _run(live: Live, shape: Shape, policy: str, replay: bool) -> None:
    """The block's forward pass, or in the backward pass its replay: then whatever a gradient reads stays."""
    keeps, unread = set(POLICIES[policy]), shape.unread(policy) if replay else set()
    had = keeps if replay else set()  # what the replay need not make

    def product(p: Product, output: str) -> None:
        if p.rank and replay:
            live.make(**{f"s_{output}": p.s})
        if p.feeds not in unread:
            live.make(p.forward_temporary, **{output: p.y})

    def gelu(stream: str, rows: int, p: Product) -> None:
        if policy == "keep_all8" and replay:
            live.make(**{f"hidden_{stream}": rows * shape.hidden * 2})
            live.drop(f"hidden8_{stream}")
        elif policy == "keep_all8":
            live.make(**{f"hidden8_{stream}": rows * (shape.hidden + 4)})
        live.make(**{f"act_{stream}": p.x, f"act8_{stream}": p.as_rows})

    def saved(p: Product) -> bool:
        return replay and p.rank > 0

    # queries, keys and values, and attention
    for stream, (_, products) in shape.streams.items():
        p = products["qkv"]
        live.make(**{f"mod_{stream}": p.x, f"mod8_{stream}": p.as_rows})
        product(p, f"qkv_{stream}")
        if shape.single:  # the same layer, and its input has a name until the end
            product(products["hidden"], f"hidden_{stream}")
        else:
            live.drop(f"mod8_{stream}", "" if saved(p) else f"mod_{stream}")
    if "qkv" not in had:
        live.make(**dict.fromkeys("qkv", shape.u), rstd=2 * shape.rows * shape.heads * 4)
    if "attention" not in had:
        live.make(attended=shape.u, lse=shape.rows * shape.heads * 4)
    if not replay and "qkv" not in keeps:
        live.drop(*"qkv", "rstd")

    # the MLP, and what is added to the streams
    for stream, (rows, products) in shape.streams.items():
        p, end = products["hidden"], products["end"]
        if not shape.single:
            product(products["proj"], f"proj_{stream}")
            if "residual" not in had:
                live.make(**{f"x1_{stream}": rows * shape.width * 2})
            live.make(**{f"mod2_{stream}": p.x, f"mod28_{stream}": p.as_rows})
            live.drop("" if replay and shape.gates else f"proj_{stream}")
            product(p, f"hidden_{stream}")
        gelu(stream, rows, end)
        product(end, f"end_{stream}")
        if not shape.single:
            live.drop(f"act8_{stream}", "" if saved(end) else f"act_{stream}")
        if "end" not in unread:
            live.make(**{f"out_{stream}": rows * shape.width * 2})
        live.drop("" if replay and shape.gates else f"end_{stream}")
        if shape.single:
            live.drop(f"mod8_{stream}", "" if saved(p) else f"mod_{stream}")
            live.drop(f"act8_{stream}", "" if saved(end) else f"act_{stream}")
            continue
        live.drop(f"mod28_{stream}", "" if saved(p) else f"mod2_{stream}")
        if not replay:
            live.drop("" if policy == "keep_all" else f"hidden_{stream}", "" if "residual" in keeps else f"x1_{stream}")
    live.drop(*(f"qkv_{stream}" for stream in shape.streams))


def _single_backward(live: Live, shape: Shape) -> None:
    ((stream, (_, products)),) = shape.streams.items()
    live.make(dy=shape.u)
    _product_backward(live, products["end"], f"end_{stream}", "dy", "d_act", f"act_{stream}")
    live.make(d_hidden=products["hidden"].y)
    live.drop(f"hidden_{stream}")
    _attention_backward(live, shape, "d_act")
    _product_backward(live, products["hidden"], f"hidden_{stream}", "d_hidden", "d_mod1")
    _product_backward(live, products["qkv"], f"qkv_{stream}", f"d_qkv_{stream}", "d_mod2")
    live.make(d_mod=products["qkv"].x)  # the sum of the two
    live.drop("d_mod1", "d_mod2", f"mod_{stream}")
    live.make(d_x=shape.u)
    live.drop("d_mod")
    live.make(d_inputs=shape.u)


def _double_backward(live: Live, shape: Shape) -> None:
    for stream, (rows, products) in reversed([*shape.streams.items()]):
        u = rows * shape.width * 2
        live.make(dy=u)
        _product_backward(live, products["end"], f"end_{stream}", "dy", "d_act", f"act_{stream}")
        live.make(d_hidden=products["hidden"].y)
        live.drop("d_act", f"hidden_{stream}")
        _product_backward(live, products["hidden"], f"hidden_{stream}", "d_hidden", "d_mod2", f"mod2_{stream}")
        live.make(**{f"d_residual_{stream}": u}, d_proj=u)
        live.drop("d_mod2", f"x1_{stream}")
        _product_backward(live, products["proj"], f"proj_{stream}", "d_proj", f"d_attended_{stream}")
    live.make(d_attended=shape.u)
    live.drop(*(f"d_attended_{stream}" for stream in shape.streams))
    _attention_backward(live, shape, "d_attended")
    for stream, (rows, products) in reversed([*shape.streams.items()]):
        u = rows * shape.width * 2
        _product_backward(live, products["qkv"], f"qkv_{stream}", f"d_qkv_{stream}", "d_mod", f"mod_{stream}")
        live.make(d_x=u)
        live.drop("d_mod")
        live.make(**{f"d_inputs_{stream}": u})
        live.drop("d_x", f"d_residual_{stream}")


def _product_backward(live: Live, p: Product, output: str, dy: str, dx: str, x: str = "") -> None:
    """dy and the saved input x to dx and the gradients of LoRA. What is kept of `output` for the gates goes too."""
    live.make(p.backward_temporary, **{dx: p.x})
    live.make(**{f"grad_{output}": p.gradients})
    live.drop(dy, x, f"s_{output}", output if p.feeds in ("end", "residual") else "")


def _attention_backward(live: Live, shape: Shape, d_attended: str) -> None:
    """CUDA's kernel copies a gradient that does not lie in one piece, and sums that of the queries in fp32: 3 U."""
    live.make(3 * shape.u, dq=shape.u, dk=shape.u, dv=shape.u)
    live.drop(d_attended, "attended", "lse", "v")
    live.make(**{f"d_qkv_{stream}": rows * shape.width * 6 for stream, (rows, _) in shape.streams.items()})
    live.drop("dq", "dk", "dv", "q", "k", "rstd")
