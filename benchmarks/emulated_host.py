"""What a training step costs Python: launches, waits, copies and CPU time, on an emulated GPU whose kernels do nothing.

    python3 -m benchmarks.emulated_host --gpu NAME --out FILE     the settings of ROWS for that GPU, beside predictions
    python3 -m benchmarks.emulated_host --gpu NAME --recount FILE     the same, but times stay: the machine is not idle
    python3 -m benchmarks.emulated_host --gpu NAME --count FILE   launches of a block, for fluxq/model/launches.json
    python3 -m benchmarks.emulated_host --page FILE               the page beside FILE
    python3 -m benchmarks.emulated_host --check NAME              one row, which must count what the table says

`make emulated-host` runs all of them. Rows are added to FILE, in place of earlier ones. The CPU time of a step is that
of Python, PyTorch and what stands in for the driver; a real driver takes a little more.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks.measure import about, commit
from benchmarks.placed import ENDLESS, RANK, T5_LENGTH
from fluxq.bench.random_model import planned_flux, random_flux
from fluxq.bench.timed_step import SameBatch, Setting, costs_of, random_batch, trainer
from fluxq.config import TrainingConfig
from fluxq.formats.atomic import atomic_path
from fluxq.kernels.chunks import chunk_of
from fluxq.kernels.replay import POLICIES
from fluxq.model import FluxConfig
from fluxq.model.blocks import Scale
from fluxq.offload.gpus import GPUS
from fluxq.offload.launches import SEQUENCE, burst_of
from fluxq.offload.planner import plan
from fluxq.offload.plans import Pins, Plan
from fluxq.training.objective import Objective


class Row(NamedTuple):
    """gpu: whose capability decides how weights are cut; swap: blocks whose units are streamed."""

    gpu: str
    resolution: int
    format: str
    compute: str
    policy: str
    swap: int
    offload: bool = False

    @property
    def name(self) -> str:
        words = [self.gpu, f"{self.resolution} px", f"{self.format} {self.compute}", self.policy, f"swap {self.swap}"]
        return ", ".join(words + ["host"] * self.offload)


ROWS = (
    Row("rtx4090", 512, "nf4", "bf16", "keep_all", 0),
    Row("rtx4090", 512, "nf4", "int8_dx", "keep_all", 0),
    Row("rtx4090", 512, "nf4", "bf16", "recompute", 0),
    Row("rtx4090", 512, "int8", "int8_dx", "keep_all", 0),
    Row("rtx4090", 1024, "nf4", "bf16", "keep_all8", 18),
    Row("rtx4090", 1024, "int8", "int8", "keep_qkv", 38),
    Row("rtx3060", 512, "nf4", "bf16", "keep_all", 0),
    Row("rtx3060", 512, "nf4", "bf16", "recompute", 38, True),
    Row("rtx3060", 768, "nf4", "int8_dx", "keep_attention", 38),
    Row("rtx3060", 1024, "int8", "bf16", "keep_attention", 38, True),
)
FORMATS, COMPUTES, FORWARD = ("nf4", "int8", "bf16"), ("bf16", "int8", "int8_dx"), "forward"
WARM_UP, COUNTED, TIMED = 3, 4, 16
ADDS = 20_000
TABLE = Path(__file__).parent / "results" / "emulated_host.json"
COUNTS = ("launches", "synchronizations", "waits_for_copies", "pageable_copies", "copies")
"""What of a row does not depend on the machine."""


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--gpu", choices=GPUS, help="the one that is emulated")
    for name in ("out", "recount", "count", "page"):
        made.add_argument(f"--{name}", type=Path, metavar="FILE")
    made.add_argument("--check", choices=[row.name for row in ROWS], metavar="NAME", help="on the row's GPU")
    made.add_argument("--list", action="store_true", help="only print the names of the rows")
    arguments = made.parse_args()
    if arguments.list:
        print(*(row.name for row in ROWS), sep="\n")
    if arguments.check and (wrong := differences(next(row for row in ROWS if row.name == arguments.check))):
        raise SystemExit("\n".join(wrong))
    if arguments.count:
        add_rows(arguments.count, count_launches(arguments.gpu), ("chunk", "format", "compute"))
    for row in ROWS if arguments.out else ():
        if row.gpu == arguments.gpu:
            add_rows(arguments.out, [measure(row)], Row._fields)
    for row in ROWS if arguments.recount else ():
        if row.gpu == arguments.gpu:
            add_rows(arguments.recount, [recounted(row, arguments.recount)], Row._fields)
    if arguments.page:
        rows = json.loads(arguments.page.read_text(encoding="utf-8"))
        arguments.page.with_suffix(".md").write_text(page(rows), encoding="utf-8")


def count_launches(gpu: str) -> Iterator[dict[str, Any]]:
    """For each way of holding and multiplying weights: the launches of a double and of a single block by policy, and
    those of a step outside the blocks, from the differences between models of few blocks.
    """
    for format, compute in product(FORMATS, COMPUTES):
        few, double, single = (launches(format, compute, depths) for depths in ((1, 1), (2, 1), (1, 2)))
        doubles, singles = ({policy: more[policy] - few[policy] for policy in few} for more in (double, single))
        outside = few["keep_all"] - doubles["keep_all"] - singles["keep_all"]
        row = {"chunk": chunk_of(GPUS[gpu].capability), "format": format, "compute": compute, "outside": outside}
        yield row | {"double": doubles, "single": singles}


def launches(format: str, compute: str, depths: tuple[int, int]) -> dict[str, int]:
    """Policy -> launches of a training step of FLUX.1 with so many blocks; and those of a forward pass alone."""
    config = replace(FluxConfig.dev(), depth=depths[0], depth_single_blocks=depths[1])
    flux = random_flux(config, format, torch.device("cuda"), RANK)
    flux.set_compute(compute)
    setting = Setting(format, compute, None, 512, 1, RANK, T5_LENGTH)
    batches, training = SameBatch(random_batch(config, setting), setting.resolution), TrainingConfig()
    counted = {FORWARD: counted_launches(torch.no_grad()(Objective(flux, batches, training).loss))}
    for policy in POLICIES:
        flux.set_policy(policy)
        counted[policy] = counted_launches(trainer(flux, setting))
    return counted


def counted_launches(step: Callable[[int], Any]) -> int:
    import emulated  # there is one on the emulated GPU only

    for index in range(WARM_UP):
        step(index)
    emulated.reset()
    step(WARM_UP)
    return emulated.report()["launches"]


def differences(row: Row) -> list[str]:
    """What a step of the row counts otherwise than the table says."""
    known, (_, step) = known_row(row, TABLE), prepared(row)
    found = counts(step)
    errors = [f"{row.name}: {error}" for error in found["errors"]]
    before, now = (
        {name: sum(r[name].values()) if name == "copies" else r[name] for name in COUNTS} for r in (known, found)
    )
    return errors + [f"{row.name}: {now[n]} {n}, {before[n]} in the table" for n in COUNTS if now[n] != before[n]]


def known_row(row: Row, table: Path) -> dict[str, Any]:
    rows = json.loads(table.read_text(encoding="utf-8"))
    return next(known for known in rows if all(known[name] == value for name, value in row._asdict().items()))


def recounted(row: Row, table: Path) -> dict[str, Any]:
    """What the table has for `row`, with what a step counts now."""
    made, step = prepared(row)
    found = counts(step) | {"predicted_launches": made.launches, "counted": commit()}
    return known_row(row, table) | found


def measure(row: Row) -> dict[str, Any]:
    """What a step of `row` launches, waits for and copies, and its CPU time, beside what is predicted."""
    made, step = prepared(row)
    found, burst = counts(step), burst_of("cuda")
    times, sequences, adds = [], [], []  # in turns: whatever else runs on this machine slows them down alike
    for index in range(WARM_UP + COUNTED, WARM_UP + COUNTED + TIMED):
        times.append(cpu_ms(partial(step, index)))
        sequences.append(burst())
        adds.append(seconds_of_add())
    return (
        row._asdict()
        | {name: found[name] for name in COUNTS}
        | {
            "cpu_ms": {"best": round(min(times), 1), "median": round(median(times), 1)},
            "add_us": round(1e6 * median(adds), 3),
            "sequence_us": round(1e6 * median(sequences), 1),
            "predicted_launches": made.launches,
            "errors": found["errors"],
            "about": about(torch.device("cuda")),
        }
    )


def prepared(row: Row) -> tuple[Plan, Callable[[int], float]]:
    """The plan of `row`, and its step."""
    Scale.is_invertible = property(lambda self: True)  # type: ignore[assignment, method-assign] - zeros, where no kernel runs
    device, gpu, config = torch.device("cuda"), GPUS[row.gpu], FluxConfig.dev()
    setting = Setting(row.format, row.compute, row.policy, row.resolution, 1, RANK, T5_LENGTH)
    pins = Pins(blocks_to_swap=row.swap, policy=row.policy, offload=row.offload)
    made = plan([costs_of(setting, config, gpu)], gpu, ENDLESS, pins=pins)
    gc.collect()  # the row before
    torch.cuda.empty_cache()
    return made, trainer(planned_flux(config, made, RANK, device), setting)


def counts(step: Callable[[int], float]) -> dict[str, Any]:
    """COUNTS of a step, the mean of some; and errors of all of them."""
    import emulated

    for index in range(WARM_UP):
        step(index)
    emulated.reset()
    for index in range(WARM_UP, COUNTED + WARM_UP):
        step(index)
    report = emulated.report()
    calls, per_step = report["calls"], lambda number: round(number / COUNTED, 2)
    return {
        "launches": per_step(report["launches"]),
        "synchronizations": per_step(sum(n for name, n in calls.items() if "synchronizations" in name)),
        "waits_for_copies": per_step(calls.get("host waits for a copy", 0)),
        "pageable_copies": per_step(sum(n for name, n in calls.items() if name.startswith("pageable"))),
        "copies": {name: per_step(n) for name, n in report["copies"].items()},
        "errors": report["errors"],
    }


def cpu_ms(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return 1e3 * (time.process_time() - start)


def seconds_of_add() -> float:
    """Of torch.add of two numbers on the CPU: what a call costs on this machine."""
    x, start = torch.ones(1), time.process_time()
    for _ in range(ADDS):
        torch.add(x, x)
    return (time.process_time() - start) / ADDS


def add_rows(path: Path, rows: Iterable[dict[str, Any]], key: Sequence[str]) -> None:
    """Add each of `rows` to the JSON list in `path`, in place of one that agrees in `key`; one row a line."""
    for row in rows:
        there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        there = [r for r in there if any(r[name] != row[name] for name in key)] + [row]
        with atomic_path(path) as temporary:
            temporary.write_text("[\n" + ",\n".join(map(json.dumps, there)) + "\n]\n", encoding="utf-8")
        print({name: value for name, value in row.items() if name != "about"}, flush=True)


HEADER = """# Launches and host time of training steps

FLUX.1 dev, one image per step, {text} T5 tokens, LoRA of rank {rank} on attention and MLP, adamw8bit; {versions}.
**No GPU was used**: kernels are launched on an emulated one, where they take no time (tests/emulated_gpu/README.md). So
the CPU time of a step is what Python and PyTorch need to launch it, and a GPU that needs less waits for them.
`make emulated-host` writes this page.

Per step, the mean of {counted}: kernels launched, beside what the planner counts (fluxq/model/launches.json, and the
copies); synchronizations of the device, a stream or an event; copies in both directions, and those from or to
pageable memory. Of these, one synchronization is the end of the measured step, and the other, with the one pageable
copy, is the read of the loss and the gradient's norm; nothing waits on the way to the GPU. CPU ms: process time, best
and median of {timed} steps, warm. Then, of the median: in thousands of torch.add on two numbers, which took {add} us
on this machine, and predicted from the sequence of fluxq/offload/launches.py, which took {sequence} us; both were
timed in turns with the steps. The largest error of that prediction is {error:.0%}. A sequence takes as long as
{fitted:.1f} launches of a step, the median of these rows; the planner has {SEQUENCE}.

swap: blocks whose units are streamed; host: block inputs are kept in RAM.

"""
COLUMNS = ("GPU", "px", "weights", "policy", "swap", "host", "launches", "planned", "sync", "copies", "pageable")
TIMES = ("CPU ms", "adds", "predicted", "")


def page(rows: Sequence[dict[str, Any]]) -> str:
    rows = sorted(rows, key=lambda row: ROWS.index(Row(*(row[name] for name in Row._fields))))
    lines, about = [], rows[0]["about"]
    versions = f"torch {about['torch']}, Triton {about['packages']['triton']}, Python {about['python']}"
    timed = {row["about"]["commit"][:10] for row in rows}
    counted = {row.get("counted", row["about"]["commit"])[:10] for row in rows}
    for row in rows:
        copied, ms = row["copies"]["GPU to host"] + row["copies"]["host to GPU"], row["cpu_ms"]
        cells = [row["gpu"], row["resolution"], f"{row['format']} {row['compute']}", row["policy"], row["swap"]]
        cells += ["yes" if row["offload"] else "", f"{row['launches']:.0f}", row["predicted_launches"]]
        cells += [f"{row['synchronizations']:.0f}", f"{copied:.0f}", f"{row['pageable_copies']:.0f}"]
        cells += [f"{ms['best']:.0f}, {ms['median']:.0f}", f"{ms['median'] / row['add_us']:.0f}"]
        cells += [f"{predicted_ms(row):.0f}", f"{predicted_ms(row) / ms['median'] - 1:+.0%}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    heads = (*COLUMNS, *TIMES)
    text = HEADER.format(
        text=T5_LENGTH,
        rank=RANK,
        versions=f"{versions}; counted at commit {', '.join(sorted(counted))} and timed at {', '.join(sorted(timed))}",
        counted=COUNTED,
        timed=TIMED,
        add=between(row["add_us"] for row in rows),
        sequence=between(row["sequence_us"] for row in rows),
        error=max(abs(predicted_ms(row) / row["cpu_ms"]["median"] - 1) for row in rows),
        fitted=median(predicted_ms(row) / row["cpu_ms"]["median"] * SEQUENCE for row in rows),
        SEQUENCE=SEQUENCE,
    )
    return text + "\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *lines, ""])


def predicted_ms(row: dict[str, Any]) -> float:
    """The CPU time that the planner would predict on that machine, at that moment."""
    return 1e-3 * row["sequence_us"] / SEQUENCE * row["predicted_launches"]


def between(numbers: Iterable[float]) -> str:
    ordered = sorted(numbers)
    return f"{ordered[0]:.4g} to {ordered[-1]:.4g}"


if __name__ == "__main__":
    main()
