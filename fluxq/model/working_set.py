"""Predicts a block's peak memory by replaying its allocations, without running it.

The functions follow the code of a block (fluxq/model/blocks.py) op by op: each op allocates its outputs, each tensor is
freed after its last reader. `Live` counts the bytes of the tensors alive and remembers the peak.
tests/model/test_byte_ring.py compares the result with the bytes that the real code allocates.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from fluxq.kernels.chunks import FEW_ROWS, padding, parts
from fluxq.kernels.replay import POLICIES, SMALL_RANK


class Live:
    """The tensors alive, by name, with their bytes; and the peak."""

    def __init__(self, **sizes: int) -> None:
        self.sizes, self.now, self.peak = dict[str, int](), 0, 0
        self.allocate(**sizes)

    def allocate(self, temporary: int = 0, **sizes: int) -> None:
        """Add tensors that one op makes; while it runs, it needs `temporary` more bytes."""
        assert not sizes.keys() & self.sizes.keys(), sizes.keys() & self.sizes.keys()
        self.sizes |= sizes
        self.now += sum(sizes.values())
        self.peak = max(self.peak, self.now + temporary)

    def free(self, *names: str) -> None:
        """Remove the tensors with these names, if they exist."""
        for name in names:
            self.now -= self.sizes.pop(name, 0)


@dataclass(frozen=True)
class Product:
    """One use of a linear layer, or of the part of it that is computed separately: (rows, k) by (n, k).

    rank: of its LoRA, 0 for none. compute: the requested one. feeds: as in fluxq/kernels/replay.py. stored: bytes per
    weight in its format; 2 needs no decoding. produced: the op before it writes its input in the form the layer wants.
    drops: its LoRA has dropout, which copies its input, and in the backward pass its input's gradient.
    """

    rows: int
    n: int
    k: int
    rank: int
    compute: str
    feeds: str
    stored: float
    produced: bool = True
    drops: bool = False

    @property
    def eight_bits(self) -> str:
        """The 8-bit type of the forward product, "int8" or "fp8"; "" if it is bf16."""
        return "" if self.compute == "bf16" or self.rows <= FEW_ROWS else self.compute.removesuffix("_dx")

    @property
    def eight_bits_backward(self) -> str:
        """The 8-bit type of the input's gradient, or ""."""
        return self.eight_bits if self.compute.endswith("_dx") else ""

    @property
    def weights(self) -> int:
        return self.n * self.k

    @property
    def padding(self) -> int:
        """Padding columns after each row of the input."""
        return padding(self.rank) if self.rank and self.produced and self.compute == "bf16" else 0

    @property
    def input_bytes(self) -> int:
        """Bytes of the input in 16 bits, padding included."""
        return self.rows * (self.k + self.padding) * 2

    @property
    def input8_bytes(self) -> int:
        """Bytes of the input in 8 bits, with its scales and x down^T."""
        return self.rows * (self.k + 4 + 2 * self.rank) if self.eight_bits else 0

    @property
    def output_bytes(self) -> int:
        return self.rows * self.n * 2

    @property
    def x_down_bytes(self) -> int:
        """Bytes of x down^T, kept for LoRA's gradient."""
        return self.rows * self.rank * 2

    @property
    def row_scale_bytes(self) -> int:
        """Bytes of the scales of the decoded weight's rows, kept for the input's gradient."""
        return 4 * self.n if self.eight_bits_backward and self.stored != 1 else 0

    @property
    def keeps_s(self) -> bool:
        """Whether x down^T is kept from the forward pass where the replay skips the product."""
        return 0 < self.rank <= SMALL_RANK

    @property
    def gradient_bytes(self) -> int:
        """Bytes of LoRA's gradients, fp32."""
        return 4 * self.rank * (self.n + self.k)

    @property
    def forward_temporary(self) -> int:
        """Bytes only needed while it multiplies; in 8 bits the weight, and the input if made here."""
        copy = self.input_bytes if self.rank and self.drops else 0
        if not self.eight_bits:
            return copy + self.n * self.padding * 2
        weight = 0 if self.stored == 1 else self.weights + 4 * self.n
        return copy + weight + (0 if self.produced else self.input8_bytes)

    @property
    def backward_temporary(self) -> int:
        """The same for its gradients."""
        ds = self.rows * self.rank * 2 + (self.input_bytes if self.rank and self.drops else 0)
        if self.eight_bits_backward:
            return ds + self.weights + self.rows * (self.n + 4)
        return ds + self.n * (self.rank + self.padding) * 2


@dataclass(frozen=True)
class Shape:
    """One use of a block. streams: name -> (rows, products by name). width: of a stream; hidden: of the MLP.

    gates: modulation trains too, so the backward pass reads what the gates multiply.
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
        """U: bytes of one activation (rows, width), text and image together."""
        return self.rows * self.width * 2

    @property
    def products(self) -> list[Product]:
        return [p for _, products in self.streams.values() for p in products.values()]

    def unread(self, policy: str) -> set[str]:
        """The values of `feeds` whose products the replay skips: nobody reads their outputs."""
        keeps = set(POLICIES[policy])
        return keeps - {"residual"} if self.gates else keeps | {"end"}

    def kept(self, policy: str) -> dict[str, int]:
        """Tensor -> bytes that `policy` keeps, in addition to the inputs."""
        keeps, sizes = set(POLICIES[policy]), dict[str, int]()
        if "qkv" in keeps:
            sizes |= dict.fromkeys("qkv", self.u) | {"rstd": 2 * self.rows * self.heads * 4}
        if "attention" in keeps:
            sizes |= {"attended": self.u, "lse": self.rows * self.heads * 4}
        for stream, (rows, _) in self.streams.items():
            if "residual" in keeps and not self.single:
                sizes[f"x1_{stream}"] = rows * self.width * 2
            if policy == "keep_all8":
                sizes[f"hidden8_{stream}"] = rows * (self.hidden + 4)
            elif "hidden" in keeps:
                sizes[f"hidden_{stream}"] = rows * self.hidden * 2
        scales = sum(p.row_scale_bytes for p in self.products if p.feeds in self.unread(policy))
        return sizes | self.kept_s(policy) | {"row_scales": scales}

    def kept_s(self, policy: str) -> dict[str, int]:
        """Tensor -> bytes of every x down^T that `policy` keeps."""
        return {
            f"s_{name}_{stream}": p.x_down_bytes
            for stream, (_, products) in self.streams.items()
            for name, p in products.items()
            if p.keeps_s and not self.shares_input(name) and self.skips(stream, name, policy)
        }

    def shares_input(self, name: str) -> bool:
        """Whether that product is the second part of a layer: a single block's first one makes qkv and hidden."""
        return self.single and name == "hidden"

    def skips(self, stream: str, name: str, policy: str) -> bool:
        """Whether the replay skips the layer of that product."""
        products, unread = self.streams[stream][1], self.unread(policy)
        names = ("qkv", "hidden") if self.single and name in ("qkv", "hidden") else (name,)
        return all(products[each].feeds in unread for each in names)


def scratch(products: Collection[Product], chunk: int) -> int:
    """Bytes of the permanent scratch buffer for decoded weights, with the LoRA next to them.

    It holds about `chunk` numbers of a weight: rows, or columns in the backward pass. If a layer's input has no padding
    column for the bias, it holds the whole weight.
    """
    sizes = [0]
    for p in products:
        if p.stored == 2 or p.eight_bits_backward:
            continue
        if not p.eight_bits:
            sizes.append((_part(p.n, p.k, chunk) if p.padding else p.n) * (p.k + p.padding) * 2)
        sizes.append(p.n * (_part(p.k, p.n, chunk) + p.padding) * 2)
    return max(sizes)


def _part(length: int, width: int, chunk: int) -> int:
    """The longest part that a side is cut into."""
    return max(part.stop - part.start for part in parts(length, width, chunk))


def forward_peak(shape: Shape, policy: str) -> int:
    """Peak bytes of the block's forward pass, including its inputs, its outputs and what it keeps."""
    live = Live(inputs=shape.u)
    _forward(live, shape, policy, replay=False)
    return live.peak


def backward_peak(shape: Shape, policy: str) -> int:
    """Peak bytes of replay and backward pass, including inputs, what was kept, incoming gradients and all it makes."""
    live = Live(inputs=shape.u, d_out=shape.u, **shape.kept(policy))
    _forward(live, shape, policy, replay=True)
    (_single_backward if shape.single else _double_backward)(live, shape)
    return live.peak


def _forward(live: Live, shape: Shape, policy: str, replay: bool) -> None:
    """The block's forward pass, or its replay in the backward pass, which keeps whatever a gradient reads."""
    keeps, unread = set(POLICIES[policy]), shape.unread(policy) if replay else set()
    available = keeps if replay else set()  # the replay does not make these again

    kept_s = shape.kept_s(policy)

    def product(stream: str, name: str) -> None:
        p, output = shape.streams[stream][1][name], f"{name}_{stream}"
        made = replay != (f"s_{output}" in kept_s)  # in the replay, or in the forward pass and kept
        if p.rank and made and not shape.shares_input(name):
            live.allocate(**{f"s_{output}": p.x_down_bytes})
        if p.feeds not in unread:
            live.allocate(p.forward_temporary, **{output: p.output_bytes})
        if p.feeds in shape.unread(policy) and not replay:
            live.allocate(**{f"row_scales_{output}": p.row_scale_bytes})

    def rows8(stream: str, name: str) -> int:
        """Bytes of a layer's input in 8 bits, which a replay that skips the layer does not make."""
        skipped = replay and shape.skips(stream, name, policy)
        return 0 if skipped else shape.streams[stream][1][name].input8_bytes

    def gelu(stream: str, rows: int, p: Product) -> None:
        if policy == "keep_all8" and replay:
            live.allocate(**{f"hidden_{stream}": rows * shape.hidden * 2})
            live.free(f"hidden8_{stream}")
        elif policy == "keep_all8":
            live.allocate(**{f"hidden8_{stream}": rows * (shape.hidden + 4)})
        live.allocate(**{f"act_{stream}": p.input_bytes, f"act8_{stream}": rows8(stream, "end")})

    def saved(p: Product) -> bool:
        return replay and p.rank > 0

    # q, k, v and attention
    for stream, (_, products) in shape.streams.items():
        p = products["qkv"]
        live.allocate(**{f"mod_{stream}": p.input_bytes, f"mod8_{stream}": rows8(stream, "qkv")})
        product(stream, "qkv")
        if shape.single:  # the same layer; its input is alive until the end of the block
            product(stream, "hidden")
        else:
            live.free(f"mod8_{stream}", "" if saved(p) else f"mod_{stream}")
    if "qkv" not in available:
        live.allocate(**dict.fromkeys("qkv", shape.u), rstd=2 * shape.rows * shape.heads * 4)
    if "attention" not in available:
        live.allocate(attended=shape.u, lse=shape.rows * shape.heads * 4)
    if not replay and "qkv" not in keeps:
        live.free(*"qkv", "rstd")

    # the residual sums and the MLP
    for stream, (rows, products) in shape.streams.items():
        p, end = products["hidden"], products["end"]
        if not shape.single:
            product(stream, "proj")
            if "residual" not in available:
                live.allocate(**{f"x1_{stream}": rows * shape.width * 2})
            live.allocate(**{f"mod2_{stream}": p.input_bytes, f"mod28_{stream}": rows8(stream, "hidden")})
            live.free("" if replay and shape.gates else f"proj_{stream}")
            product(stream, "hidden")
        gelu(stream, rows, end)
        product(stream, "end")
        if not shape.single:
            live.free(f"act8_{stream}", "" if saved(end) else f"act_{stream}")
        if "end" not in unread:
            live.allocate(**{f"out_{stream}": rows * shape.width * 2})
        live.free("" if replay and shape.gates else f"end_{stream}")
        if shape.single:
            live.free(f"mod8_{stream}", "" if saved(p) else f"mod_{stream}")
            live.free(f"act8_{stream}", "" if saved(end) else f"act_{stream}")
            continue
        live.free(f"mod28_{stream}", "" if saved(p) else f"mod2_{stream}")
        if not replay:
            live.free("" if policy == "keep_all" else f"hidden_{stream}", "" if "residual" in keeps else f"x1_{stream}")
    live.free(*(f"qkv_{stream}" for stream in shape.streams))


def _single_backward(live: Live, shape: Shape) -> None:
    ((stream, (_, products)),) = shape.streams.items()
    live.allocate(dy=shape.u)
    _product_backward(live, products["end"], f"end_{stream}", "dy", "d_act", f"act_{stream}")
    live.allocate(d_hidden=products["hidden"].output_bytes)
    live.free(f"hidden_{stream}")
    _attention_backward(live, shape, "d_act")
    parts = products["qkv"], products["hidden"]
    live.allocate(max(p.backward_temporary for p in parts), d_mod=parts[0].input_bytes)
    live.allocate(grads=4 * parts[0].rank * (parts[0].n + parts[1].n + parts[0].k))
    live.free("d_hidden", f"d_qkv_{stream}", f"mod_{stream}", f"s_qkv_{stream}")
    live.allocate(d_inputs=shape.u)


def _double_backward(live: Live, shape: Shape) -> None:
    for stream, (rows, products) in reversed([*shape.streams.items()]):
        u = rows * shape.width * 2
        live.allocate(dy=u)
        _product_backward(live, products["end"], f"end_{stream}", "dy", "d_act", f"act_{stream}")
        live.allocate(d_hidden=products["hidden"].output_bytes)
        live.free("d_act", f"hidden_{stream}")
        _product_backward(live, products["hidden"], f"hidden_{stream}", "d_hidden", "d_mod2", f"mod2_{stream}")
        live.allocate(**{f"d_residual_{stream}": u}, d_proj=u)
        live.free("d_mod2", f"x1_{stream}")
        _product_backward(live, products["proj"], f"proj_{stream}", "d_proj", f"d_attended_{stream}")
    live.allocate(d_attended=shape.u)
    live.free(*(f"d_attended_{stream}" for stream in shape.streams))
    _attention_backward(live, shape, "d_attended")
    for stream, (rows, products) in reversed([*shape.streams.items()]):
        u = rows * shape.width * 2
        _product_backward(live, products["qkv"], f"qkv_{stream}", f"d_qkv_{stream}", "d_mod", f"mod_{stream}")
        live.allocate(**{f"d_inputs_{stream}": u})
        live.free("d_mod", f"d_residual_{stream}")


def _product_backward(live: Live, p: Product, output: str, dy: str, dx: str, x: str = "") -> None:
    """dy and the saved input x -> dx and LoRA's gradients. Frees both, and the `output` kept for a gate's gradient."""
    live.allocate(p.backward_temporary, **{dx: p.input_bytes})
    live.allocate(**{f"grad_{output}": p.gradient_bytes})
    live.free(dy, x, f"s_{output}", output if p.feeds in ("end", "residual") else "")


def _attention_backward(live: Live, shape: Shape, d_attended: str) -> None:
    """3 U temporary: CUDA's kernel copies a gradient that is not contiguous, and sums that of q in fp32."""
    live.allocate(3 * shape.u, dq=shape.u, dk=shape.u, dv=shape.u)
    live.free(d_attended, "attended", "lse", "v")
    live.allocate(**{f"d_qkv_{stream}": rows * shape.width * 6 for stream, (rows, _) in shape.streams.items()})
    live.free("dq", "dk", "dv", "q", "k", "rstd")
