"""The costs of a FLUX.1 training step: the table that the planner reads (fluxq/offload/costs.py).

Bytes of weights are exact: those of the quantized file and the arena. FLOPs are those of matrix products, two per
weight and row. Bytes moved are those of memory-bound fused kernels, each input and output counted once, and of decoding
weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from fluxq.kernels.chunks import FEW_ROWS, parts
from fluxq.kernels.replay import POLICIES
from fluxq.offload.costs import BlockCost, Costs, Fragmentation, Matmul, PolicyCost, Work
from fluxq.offload.gpus import GIB

from .config import FluxConfig
from .flux import Flux
from .launches import launches, outside
from .layout import layout
from .lora import TARGETS, Adapted
from .start import planned_rank
from .text import CLIP_LENGTH
from .units import REST, unit_of
from .working_set import Product, Shape, backward_peak, forward_peak, scratch

BYTES_PER_WEIGHT = {"nf4": 0.5625, "fp8": 1.0, "int8": 1.0, "bf16": 2.0}
"""By format, NF4's scales included."""

RELATIVE_ERROR = {"bf16": 0.002, "int8": 0.009, "fp8": 0.026, "nf4": 0.092}
"""Of normally distributed weights in each format, and of products in each type."""


class OptimizerCost(NamedTuple):
    """What an optimizer takes. state: bytes per weight, fp32 scales included. factored: how many of a matrix's moments
    it keeps as one number for each row and column. temporary: bytes per weight of an update, of up to `most` at a time.
    """

    state: float
    factored: int = 0
    temporary: int = 0
    most: float = math.inf


TORCHAO = {"temporary": 64, "most": 1 << 22}
OPTIMIZER_COSTS = {
    "adamw": OptimizerCost(8.0, temporary=4),
    "adamw8bit": OptimizerCost(2 + 8 / 256),
    "lion8bit": OptimizerCost(1 + 4 / 256),
    "adamw4bit": OptimizerCost(1 + 8 / 128, **TORCHAO),
    "adamwfp8": OptimizerCost(2 + 8 / 256, **TORCHAO),
    "adafactor": OptimizerCost(0.0, factored=1),
    "muon": OptimizerCost(4.0),
    "prodigy": OptimizerCost(16.0, temporary=8),
    "came": OptimizerCost(4.0, factored=2),
    "schedulefree_adamw": OptimizerCost(8.0, temporary=8),
}
"""Ignores that bitsandbytes keeps tensors below 4,096 in fp32."""

OTHER_OPTIMIZER = OptimizerCost(16.0, temporary=8)
"""Any other is taken to be as prodigy, the largest."""

AUTOENCODER = 4 * 83_819_683
"""Bytes of the autoencoder's weights, in fp32."""

TILES = ((None, 6.0), (32, 2.2))
"""Rows at a time (None: all), and the peak of decoding in maps of `ch` (128) channels (tests/model/test_bands.py)."""

EXPANDABLE = (0.2, 0.1, 0.05)
FIXED = {"bf16": (0.65, 0.0, 0.045), "8 bits": (0.7, 0.35, 0.035), "decoded to 8 bits": (0.1, 1.2, 0.08)}
MEASURED_ROWS = 4608
"""What the allocator reserves beyond what is alive, with segments that can grow and with others, by the type of the
products: GiB always, GiB at MEASURED_ROWS rows and in proportion below, and a fraction of what a step allocates. Fitted
to benchmarks/results/emulated.md, where each row is within 5 %."""

MLP = {"mlp.0": ("hidden", "hidden"), "mlp.2": ("end", "end")}
ATTENTION = {"attn.qkv": ("qkv", "qkv"), "attn.proj": ("proj", "residual")}


def flux_costs(
    config: FluxConfig,
    format: str,
    compute: str = "bf16",
    rank: int = 16,
    targets: str | Sequence[str] = "attention+mlp",
    batch: int = 1,
    img_tokens: int = 4096,
    txt_tokens: int = 512,
    optimizer: str = "adamw8bit",
    accumulates: bool = False,
    clip: Mapping[str, tuple[int, ...]] | None = None,
    *,
    chunk: int,
    library: int = 0,
    expandable: bool = True,
    drops: bool = False,
    adapted: Adapted | None = None,
    start: str = "plain",
    averaged: bool = False,
) -> Costs:
    """The table for steps of `batch` images of `img_tokens` tokens, with captions of `txt_tokens` tokens.

    clip: name -> shape of every tensor of CLIP-L, if it trains (fluxq/model/clip.py).
    chunk: how many numbers of a weight this GPU's kernels decode at a time: `chunk_of` its capability; 0 for all.
    library: bytes of cuBLAS's workspaces on this GPU.
    expandable: the allocator's segments can grow (fluxq/allocator.py).
    drops: the LoRA has dropout. adapted: its layers and ranks, in place of rank and targets. averaged: its average is
    kept too. start: of INITS in start.py.
    """
    shapes = tensors(config)
    layers = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if len(shape) == 2}
    lora = dict.fromkeys(chosen(tuple(layers), targets), rank)
    if adapted is not None:
        lora = {path: size.rank for path, size in adapted.layers(layers).items()}
    lora = {path: planned_rank(start, rank) for path, rank in lora.items()}
    encoder = _encoder(clip or {}, rank, batch)
    gates = encoder.trained > 0 or any(
        unit_of(path).endswith(".mod") or path.startswith(("time", "vector", "guidance")) for path in lora
    )
    sizes = {unit: length for unit, (_, length) in layout(shapes, format).items()}

    trained = encoder.trained > 0 or any("_in." in f".{p}." or p.endswith("_in") for p in lora)
    blocks, products = [], []
    for name in _blocks(config):
        own = {p: r for p, r in lora.items() if p.startswith(f"{name}.")}
        shape = _shape(config, name, layers, own, compute, batch, img_tokens, txt_tokens, format, gates, drops)
        first, trained = not trained, trained or bool(own)
        units = tuple(u for u in sizes if u.startswith(f"{name}.") or u == name)
        units = units if gates else tuple(u for u in units if not u.endswith(".mod"))
        gradients = sum(4 * r * sum(layers[p]) for p, r in own.items())
        launched = launches(shape.single, format, compute, chunk)
        blocks.append(_block(name, units, shape, trained, first, gradients, chunk, launched))
        products += shape.products
    streams = format != "bf16"  # bf16 models are loaded whole, modulation included
    modulation = {} if gates else {u: size for u, size in sizes.items() if u.endswith(".mod")}
    window = max(1, FEW_ROWS // batch)
    weights = {p: r * sum(layers[p]) for p, r in lora.items()}
    matrices = [(r * side, r) for p, r in lora.items() for side in layers[p]] + [(n, rank) for n in encoder.matrices]
    total, outer = sum(n for n, _ in matrices), {p for p in lora if unit_of(p) == REST}
    rows, angles = batch * (img_tokens + txt_tokens), (img_tokens + txt_tokens) * config.head_dim * 4
    return Costs(
        format=format,
        compute=compute,
        error=math.hypot(RELATIVE_ERROR[format], RELATIVE_ERROR[compute.removesuffix("_dx")]),
        units={u: size for u, size in sizes.items() if u != REST and u not in modulation},
        blocks=tuple(blocks),
        ahead=modulation if streams else {},
        ahead_step=batch * 2 * sum(s[0] for p, s in layers.items() if unit_of(p).endswith(".mod")),
        ahead_peak=window * batch * 2 * 2 * 12 * config.hidden_size,  # a block's rows, and the halves before joining
        window=window if streams and modulation else 0,
        streams=streams,
        stays=sizes[REST] + encoder.frozen + (0 if streams else sum(modulation.values())),
        lora=(6 + 4 * averaged + 2 * (start == "loftq")) * total,
        gradients=4 * (sum(weights[p] for p in outer) + encoder.trained),
        optimizer=sum(optimizer_bytes(optimizer, weights, r) for weights, r in matrices),
        optimizer_peak=_optimizer_peak(optimizer, total),
        scratch=scratch(products, chunk) + angles + encoder.activations,
        library=library,
        outside=_outside(config, layers, batch, img_tokens, txt_tokens, total, rows) + encoder.work,
        accumulates=accumulates,
        fragmentation=_fragmentation(format, compute, rows, expandable),
        launches=outside(format, compute, chunk),
        tiles=tuple((band, AUTOENCODER + int(maps * img_tokens * 256 * 128 * 4)) for band, maps in TILES),
        about=dict(rank=rank, batch=batch, img_tokens=img_tokens, txt_tokens=txt_tokens, optimizer=optimizer),
    )


def optimizer_bytes(optimizer: str, weights: int, rank: int) -> int:
    """Bytes of state for a matrix of LoRA of `rank` that has so many `weights`."""
    cost = OPTIMIZER_COSTS.get(optimizer, OTHER_OPTIMIZER)
    return int(weights * cost.state + 4 * cost.factored * (rank + weights // rank))


def _optimizer_peak(optimizer: str, weights: int) -> int:
    """Temporary bytes of a step: first all gradients are copied into one tensor, then the update needs its own."""
    cost = OPTIMIZER_COSTS.get(optimizer, OTHER_OPTIMIZER)
    return max(4 * weights, cost.temporary * int(min(weights, cost.most)))


def _fragmentation(format: str, compute: str, rows: int, expandable: bool) -> Fragmentation:
    kind = "bf16" if compute == "bf16" else "8 bits" if compute.startswith(format) else "decoded to 8 bits"
    always, in_all_rows, fraction = EXPANDABLE if expandable else FIXED[kind]
    return Fragmentation(int((always + in_all_rows * min(1.0, rows / MEASURED_ROWS)) * GIB), fraction)


class _Encoder(NamedTuple):
    """CLIP-L's share of a step.

    frozen: bytes of its weights, in bf16. matrices: LoRA weights of each that trains. activations: bytes kept for its
    backward pass while the transformer runs. work: of both passes.
    """

    frozen: int
    matrices: list[int]
    activations: int
    work: Work

    @property
    def trained(self) -> int:
        return sum(self.matrices)


def _encoder(clip: Mapping[str, tuple[int, ...]], rank: int, batch: int) -> _Encoder:
    layers = [s for name, s in clip.items() if len(s) == 2 and name.startswith("encoder.")]
    mlps = [s for name, s in clip.items() if name.endswith("fc1.weight")]
    tokens, weights = batch * CLIP_LENGTH, sum(n * k for n, k in layers)
    return _Encoder(
        frozen=2 * sum(map(math.prod, clip.values())),
        matrices=[rank * side for shape in layers for side in shape],
        # per block: x twice, normed twice, q, k, v, attention output; hidden, its sigmoid, their product
        activations=2 * tokens * sum(8 * width + 3 * hidden for hidden, width in mlps),
        work=Work(bf16=4.0 * tokens * weights, moved=2.0 * 2 * weights),
    )


@lru_cache(maxsize=4)
def tensors(config: FluxConfig) -> Mapping[str, tuple[int, ...]]:
    """Name and shape of every frozen tensor."""
    with torch.device("meta"):
        return {name: tuple(b.shape) for name, b in Flux(config).named_buffers()}


def chosen(paths: Sequence[str], targets: str | Sequence[str]) -> list[str]:
    """The `paths` that get LoRA (fluxq/model/lora.py)."""
    expressions = [TARGETS.get(t, t) for t in ([targets] if isinstance(targets, str) else targets)]
    return [path for path in paths if any(re.fullmatch(e, path) for e in expressions)]


def _blocks(config: FluxConfig) -> Iterator[str]:
    yield from (f"double_blocks.{i}" for i in range(config.depth))
    yield from (f"single_blocks.{i}" for i in range(config.depth_single_blocks))


def _shape(
    config: FluxConfig,
    name: str,
    layers: Mapping[str, tuple[int, ...]],
    lora: Mapping[str, int],
    compute: str,
    batch: int,
    img_tokens: int,
    txt_tokens: int,
    format: str,
    gates: bool,
    drops: bool,
) -> Shape:
    def product(path: str, rows: int, feeds: str, n: int | None = None, produced: bool = True) -> Product:
        whole, k = layers[f"{name}.{path}"]
        rank, stored = lora.get(f"{name}.{path}", 0), BYTES_PER_WEIGHT[format]
        return Product(rows, n or whole, k, rank, compute, feeds, stored, produced, drops)

    single = name.startswith("single")
    if single:
        rows = batch * (img_tokens + txt_tokens)
        products = {
            "qkv": product("linear1", rows, "qkv", 3 * config.hidden_size),
            "hidden": product("linear1", rows, "hidden", config.mlp_hidden),
            "end": product("linear2", rows, "end"),
        }
        streams = {"": (rows, products)}
    else:
        streams = {}
        for stream, tokens in (("img", img_tokens), ("txt", txt_tokens)):
            streams[stream] = (
                batch * tokens,
                {
                    short: product(f"{stream}_{path}", batch * tokens, feeds, produced=short != "proj")
                    for path, (short, feeds) in (ATTENTION | MLP).items()
                },
            )
    return Shape(streams, config.hidden_size, config.mlp_hidden, config.num_heads, single, batch, gates)


def _block(
    name: str,
    units: tuple[str, ...],
    shape: Shape,
    trained: bool,
    first: bool,
    gradients: int,
    chunk: int,
    launched: Mapping[str, int],
) -> BlockCost:
    """first: nothing before the block trains, so its inputs need no gradient. chunk: see flux_costs; launched: kernels
    by policy.
    """
    input_products = {"qkv", "hidden"} if shape.single else {"qkv"}
    backward, forward = Work(), Work(attention=_attention(shape), moved=_moved_forward(shape))
    for _, products in shape.streams.values():
        for short, p in products.items():
            forward += _product(p, chunk)
            backward += _product_backward(p, not (first and short in input_products), chunk)
    backward += Work(attention_backward=2.5 * _attention(shape), moved=_moved_backward(shape))
    policies, waiting = {}, shape.u if shape.single else 0  # forward holds the last double block's outputs to the end
    for policy in POLICIES if trained else ():
        kept = shape.u + sum(shape.kept(policy).values())
        peaks = forward_peak(shape, policy) + waiting, backward_peak(shape, policy)
        replay, exact = _replay(shape, policy, chunk), policy != "keep_all8"
        policies[policy] = PolicyCost(kept, replay, *peaks, exact, launched[policy])
    return BlockCost(
        name,
        units,
        forward,
        forward_peak(shape, "recompute") + waiting,
        shape.u,
        gradients,
        backward if trained else Work(),
        policies,
        launched["forward"],
    )


def _attention(shape: Shape) -> float:
    """FLOPs of attention: two products of each token with every token of its image."""
    return 4.0 * shape.rows * (shape.rows / shape.batch) * shape.width


def _product(p: Product, chunk: int) -> Work:
    small = 2.0 * p.rows * p.rank * (p.n + p.k)
    cut = chunk if p.padding and p.stored < 2 else 0  # as `scratch` has it
    moved = _decoding(p, p.eight_bits)
    if p.rank and not p.eight_bits:
        moved += 2 * p.rows * p.k  # x down^T reads the input
    return _tiled(p.eight_bits or "bf16", p.rows, p.n, p.k, cut) + Work(bf16=small, moved=moved)


def _tiled(kind: str, rows: int, n: int, k: int, chunk: int = 0) -> Work:
    """The work of products of (rows, k) by (k, n), the weight cut along n into parts of about `chunk` numbers."""
    lengths = [min(part.stop, n) - part.start for part in parts(n, k, chunk)]
    products = tuple(Matmul(kind, rows, length, 2.0 * rows * length * k) for length in lengths)
    return Work(**{kind: 2.0 * rows * n * k}, products=products)


def _product_backward(p: Product, input_gradient: bool, chunk: int) -> Work:
    """The gradients of LoRA and, if `input_gradient`, of the input."""
    work, moved = Work(), 0.0
    if input_gradient:
        cut = 0 if p.eight_bits_backward or p.stored == 2 else chunk
        work = _tiled(p.eight_bits_backward or "bf16", p.rows, p.k, p.n, cut)
        moved = _decoding(p, p.eight_bits_backward, True)
    if p.eight_bits_backward:
        moved += p.rows * p.n * 3  # dy is read and written in 8 bits
    small = 0.0
    if p.rank:
        small = 2.0 * p.rows * p.rank * (2 * (p.n + p.k) if input_gradient else 2 * p.n + p.k)
        moved += 2 * p.rows * (p.n + p.k)  # for the gradients of up and down
        moved += 4 * p.rows * p.k if input_gradient and not p.eight_bits_backward else 0  # ds down is added to dx
    return work + Work(bf16=small, moved=moved)


def _replay(shape: Shape, policy: str, chunk: int) -> Work:
    """The work of recomputing what `policy` did not keep: products whose output is read, attention, elementwise ops."""
    work, unread, keeps = Work(), shape.unread(policy), POLICIES[policy]
    for _, products in shape.streams.values():
        for p in products.values():
            if p.feeds not in unread:
                work += _product(p, chunk)
            elif p.rank and not p.keeps_s:  # LoRA's gradient reads x down^T
                work += Work(bf16=2.0 * p.rows * p.rank * p.k, moved=2 * p.rows * p.k)
    moved = 2 + (10 if shape.single else 8) + 2  # modulate, GELU, and the last sum, which nobody reads
    moved += 0 if "qkv" in keeps else 6
    moved += 0 if shape.single else 2 if "residual" in keeps else 4
    moved += 6 if policy == "keep_all8" else 0
    attention = 0.0 if "attention" in keeps else _attention(shape)
    return work + Work(attention=attention, moved=moved * shape.u + _eight_bit_moved(shape, policy))


def _moved_forward(shape: Shape) -> float:
    """Bytes that the ops between matrix products read and write, counted in U (one activation)."""
    modulate, norm_rope, gelu, gated_add = 2, 6, 10 if shape.single else 8, 3
    gated_add_modulate = 0 if shape.single else 4
    return (modulate + norm_rope + gelu + gated_add + gated_add_modulate) * shape.u + _eight_bit_moved(shape)


def _moved_backward(shape: Shape) -> float:
    modulate, norm_rope, gelu, gated_add = 4, 8, 12, 2
    sums = 2 if shape.single else 0  # linear1's second part is added to the first one's gradient of the input
    gated_add_modulate = 0 if shape.single else 5
    return (modulate + norm_rope + gelu + gated_add + gated_add_modulate + sums) * shape.u


def _eight_bit_moved(shape: Shape, skipped_by: str = "") -> float:
    """Bytes of writing inputs in 8 bits too. skipped_by: the policy, in a replay, which skips layers."""
    return sum(
        p.rows * p.k
        for stream, (_, products) in shape.streams.items()
        for name, p in products.items()
        if p.eight_bits and not shape.shares_input(name)
        if not (skipped_by and shape.skips(stream, name, skipped_by))
    )


def _decoding(p: Product, eight_bits: str, transposed: bool = False) -> float:
    """Bytes read and written to decode the weight into the type of the product."""
    if not eight_bits:
        return 0.0 if p.stored == 2 else p.weights * (p.stored + 2)
    return 0.0 if p.stored == 1 and not transposed else p.weights * (p.stored + 1)


def _outside(
    config: FluxConfig,
    layers: Mapping[str, tuple[int, ...]],
    batch: int,
    img_tokens: int,
    txt_tokens: int,
    trained: int,
    rows: int,
) -> Work:
    """Work outside the blocks: embedders, last layer and its gradient, optimizer (weights, gradients, state)."""
    n_img, k_img = layers["img_in"]
    n_txt, k_txt = layers["txt_in"]
    n_out, k_out = layers["final_layer.linear"]
    flops = 2.0 * batch * (img_tokens * (n_img * k_img + 2 * n_out * k_out) + txt_tokens * n_txt * k_txt)
    return Work(bf16=flops, moved=20 * trained + 12 * rows * config.hidden_size * 2)
