"""The emulated GPU refuses, delays and counts as a GPU does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
RUN = Path(__file__).parent / "run.py"
PYTHON = os.environ.get("EMULATED_GPU_PYTHON") or str(ROOT / ".venv-cuda" / "bin" / "python")
INSTALLED = shutil.which(PYTHON) is not None

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INSTALLED, reason="needs a PyTorch built for CUDA; `make emulated` installs it"),
]


@pytest.fixture
def run(tmp_path):
    """run(code, option, ..., ends=0): the last line of what `code` prints on the emulated GPU, as JSON, and its stderr.
    ends: the exit code that is expected.
    """

    def run(code: str, *options: str, ends: int = 0) -> tuple[Any, str]:
        script = tmp_path / "program.py"
        script.write_text(f"import json, torch, emulated\n{code}\n", encoding="utf-8")
        command = [sys.executable, str(RUN), *options, "--", "python", str(script)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTORCH_", "TRITON_INTERPRET"))}
        environment["PYTHONPATH"] = str(ROOT)
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == ends, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    return run


def raised(statement: str, name: str = "error") -> str:
    """Code that runs a statement, and gives what it raised a name: "RuntimeError: ...", or None."""
    return f"""
try:
    {statement}
    {name} = None
except Exception as e:
    {name} = f"{{type(e).__name__}}: {{e}}"
"""


def test_memory_ends_at_the_size_of_the_gpu(run):
    first, second = (f"{x} = torch.empty(1 << 30, dtype=torch.uint8, device='cuda')" for x in "xy")
    code = raised(first, "one") + raised(second, "two")
    code += "print(json.dumps([one, two, torch.cuda.mem_get_info(), emulated.report()['memory']]))"
    (one, two, info, memory), _ = run(code, "--total", "2048")
    assert one is None and two.startswith("OutOfMemoryError")
    assert info == [(2048 - 300 - 1024) << 20, 2048 << 20]
    assert (memory["taken"], memory["peak"], memory["mallocs"]) == (1 << 30, 1 << 30, 1)


SIDE = """
host, gpu = torch.ones(4).pin_memory(), torch.zeros(4, device="cuda")
torch.cuda.synchronize()
side = torch.cuda.Stream()
with torch.cuda.stream(side):
    gpu.copy_(host, non_blocking=True)
"""


@pytest.mark.parametrize(("order", "expected"), [((), 2), (("--early",), 1)])
def test_a_copy_reads_its_source_late_or_early(order, expected, run):
    code = f"{SIDE}host.fill_(2)\ntorch.cuda.synchronize()\nprint(json.dumps(gpu.tolist()))"
    assert run(code, "--compute", *order)[0] == 4 * [expected]


@pytest.mark.parametrize("wait", [True, False])
def test_a_missing_wait_gives_a_wrong_number_and_a_race(wait, run):
    code = f"{SIDE}if {wait}: torch.cuda.current_stream().wait_stream(side)\n"
    code += "total = float(gpu.sum())\nprint(json.dumps([total, emulated.report()['notes'].get('races', {})]))"
    (total, races), stderr = run(code, "--compute", "--races", ends=0 if wait else 3)
    if wait:
        assert total == 4 and not races and "race" not in stderr
    else:
        (race,) = (text for text in races if "aten::sum" in text)
        assert total == 0 and race.startswith("cudaMemcpyAsync on stream") and race.endswith(": written, read")
        assert f"a race: {race}" in stderr


def test_the_sanitizer_of_pytorch_names_a_missing_wait(run, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_SANITIZER", "1")
    code = (
        f"{SIDE}torch.cuda.current_stream().wait_stream(side)\ngpu.sum()\nside.wait_stream(torch.cuda.current_stream())"
    )
    code += "\nwith torch.cuda.stream(side):\n    gpu.copy_(host, non_blocking=True)\n" + raised("gpu.sum()")
    error, stderr = run(code + "print(json.dumps(error))")
    assert error == "CUDASanitizerErrors: detected 1 errors" and "aten::sum" in stderr and "aten::copy_" in stderr


def test_early_hides_a_missing_wait_but_races_do_not(run):
    code = f"{SIDE}total = float(gpu.sum())\nprint(json.dumps(total))"
    total, stderr = run(code, "--compute", "--races", "--early", ends=3)
    assert total == 4 and "a race: cudaMemcpyAsync" in stderr


def test_the_driver_pins_no_more_than_its_limit(run):
    small, large = ("x = torch.empty(4 << 20, dtype=torch.uint8).pin_memory()".replace("4", n) for n in ("4", "16"))
    code = raised(small, "one") + raised(large, "two") + "print(json.dumps([one, two, emulated.report()['errors']]))"
    (one, two, errors), _ = run(code, "--pin-limit", "8")
    assert one is None and "out of memory" in two and errors == {"cudaHostAlloc: 2 the pin limit": 1}


KERNEL = """
import triton, triton.language as tl

@triton.jit
def copy(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at))

x, y = torch.ones(64, device="cuda"), torch.zeros(64, device="cuda")
"""


def test_a_launch_that_no_gpu_can_do_is_refused(run):
    code = KERNEL + raised("copy[(1, 65535)](x, y, 64)", "one") + raised("copy[(1, 65536)](x, y, 64)", "two")
    code += raised("copy[(1,)](x, torch.ones(64), 64)", "three")
    code += "print(json.dumps([one, two, three, emulated.report()]))"
    (one, two, three, report), _ = run(code)
    assert one is None and "invalid argument" in two and "cpu tensor" in three
    assert report["errors"]["cuLaunchKernelEx: 1 triton copy: the grid is too large"] == 1
    assert report["kernels"]["triton copy"] == 1


def test_a_product_too_large_to_compute_raises(run):
    operands = "a, b = torch.ones(2, 1, 16, 16, device='cuda'), torch.ones(32, 32, device='cuda')\n"
    attention = "torch.nn.functional.scaled_dot_product_attention(a, a, a)"
    products = ("a[0, 0] @ a[0, 0]", "b @ b", "torch.addmm(b, b, b)", "torch.bmm(a[0], a[1])", attention)
    code = operands + "".join(raised(product, f"e{i}") for i, product in enumerate(products))
    code += "print(json.dumps([e0, e1, e2, e3, e4]))"
    small, large, added, batched, attended = run(code, "--compute", "--max-product", "5000")[0]
    assert small is None and batched is None
    sentence = (
        "RuntimeError: the emulated GPU does not compute {} of {} multiplications, more than 5000; make it smaller"
    )
    assert large.startswith(sentence.format("aten::mm", 32768)) and added.startswith(
        sentence.format("aten::addmm", 32768)
    )
    assert attended.startswith(sentence.format("attention", 16384))


@pytest.mark.parametrize("options", [(), ("--compute",), ("--compute", "--early")])
def test_counts_of_a_small_program_are_exact(options, run):
    code = """
x = torch.ones(1000, device="cuda")
emulated.reset()
y = x + x
y.mul_(2)
y.cpu()
x.copy_(torch.ones(1000))
torch.cuda.synchronize()
print(json.dumps(emulated.report()))
"""
    report, _ = run(code, *options)
    assert report["launches"] == sum(report["kernels"].values()) == 2
    once = {"host to host": 0, "host to GPU": 1, "GPU to host": 1, "on the GPU": 0}
    assert report["copies"] == once and report["bytes"] == {way: 4000 * n for way, n in once.items()}
    calls = report["calls"]
    assert calls["pageable copies to the GPU"] == calls["pageable copies from the GPU"] == 1
    assert calls["device synchronizations"] == 1 and calls["stream synchronizations"] == 2
    assert not report["errors"]


FAILING = {
    "alloc:1-3": ("torch.empty(1 << 30, device='cuda')", "OutOfMemoryError: CUDA out of memory"),
    "pin:1": ("torch.empty(1 << 20).pin_memory()", "AcceleratorError: CUDA error: out of memory"),
    "module:1": ("copy[(1,)](x, y, 64)", "RuntimeError: Triton Error [CUDA]: out of memory"),
    "handle:1": ("x[None] @ x[:, None]", "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
}


def test_chosen_calls_fail_once_with_the_codes_of_cuda(run):
    code = KERNEL + "torch.cuda.synchronize()\nfound = {}\n"
    for plan, (statement, _) in FAILING.items():
        code += f"emulated.fail({plan!r})\n" + raised(statement, "first") + raised(statement, "second")
        code += f"found[{plan!r}] = [first, second]\n"
    found, _ = run(code + "print(json.dumps(found))")
    for plan, (_, expected) in FAILING.items():
        first, second = found[plan]
        assert first.startswith(expected) and second is None


def test_a_call_is_chosen_on_the_command_line(run):
    code = "x = torch.ones(8, 8, device='cuda')\n" + raised("x @ x", "first") + raised("x @ x", "second")
    for options in ((), ("--compute",)):
        (first, second), _ = run(code + "print(json.dumps([first, second]))", "--fail", "handle:1", *options)
        assert "CUBLAS_STATUS_ALLOC_FAILED" in first and second is None


@pytest.mark.parametrize("options", [(), ("--compute",)])
def test_nothing_succeeds_after_an_illegal_access(options, run):
    code = "x = torch.ones(8, device='cuda')\nemulated.fail('kernel:1')\ny = x + x\n"  # its launch succeeds
    for number, statement in enumerate(("y.tolist()", "x + x", "torch.cuda.synchronize()", "x.cpu()")):
        code += raised(statement, f"error{number}")
    (first, *others), _ = run(code + "print(json.dumps([error0, error1, error2, error3]))", *options)
    assert first.startswith("AcceleratorError: CUDA error: an illegal memory access was encountered")
    assert set(others) == {first}


def test_a_run_ends_with_a_sentence_after_an_illegal_access(run, tmp_path):
    """In step 4, of whose predecessors the second was saved."""
    train = ["train", "images", "--model", "nano", "--trigger", "x", "--steps", "9", "--save-every", "2"]
    code = f"""
import os
from fluxq.cli import main
from fluxq.nano import drawing
from fluxq.training.report import Report
os.chdir({str(tmp_path)!r})
os.mkdir("images")
for number, (image, _) in enumerate(drawing.concept(seed=1, count=2)):
    image.save(f"images/{{number}}.png")
step = Report.step
def fails(self, done, *rest):
    step(self, done, *rest)
    if done == 3:
        emulated.fail("kernel:20")
Report.step = fails
try:
    main({train})
except SystemExit as ended:
    print(json.dumps(ended.code))
"""
    exit_code, stderr = run(code)
    told = (
        "error: the GPU failed after step 3 (CUDA error: an illegal memory access was encountered); everything since "
    )
    told += "is lost: the last save is that of step 2; continue with: fluxq train --resume runs/x; "
    assert exit_code == 1 and told in stderr and "Traceback" not in stderr


def test_the_first_launch_of_an_operator_loads_its_kernel_and_may_fail(run):
    code = "x = torch.ones(8, device='cuda')\nx + x\nemulated.fail('module:1')\nx + x\n"
    code += raised("x * x", "first") + raised("x * x", "second")
    (first, second), _ = run(code + "print(json.dumps([first, second]))", "--compute")
    assert first.startswith("AcceleratorError: CUDA error: out of memory") and second is None


def test_computed_numbers_are_those_of_the_cpu(run):
    code = """
import torch.nn.functional as F
torch.manual_seed(0)
inputs = [torch.randn(2, 3, 8, 8), torch.randn(3, 3, 3, 3), torch.randn(8, 5)]

def results(device):
    x, kernel, w = (t.to(device).requires_grad_() for t in inputs)
    y = F.conv2d(x, kernel, padding=1)
    y = F.scaled_dot_product_attention(y, y, y * 2) @ w
    loss = F.layer_norm(y, [5]).square().sin().mean()
    return [loss, *torch.autograd.grad(loss, [x, kernel, w])]

pairs = zip(results("cpu"), results("cuda"))
print(json.dumps([torch.allclose(a, b.cpu(), rtol=1e-4, atol=1e-6) and bool(a.abs().sum() > 0) for a, b in pairs]))
"""
    alike, stderr = run(code, "--compute", "--races")
    assert alike == [True] * 4 and "a race" not in stderr


def test_interpreted_kernels_compute_on_the_memory_of_the_gpu(run):
    code = f"{KERNEL}copy[(1,)](x, y, 64)\nprint(json.dumps([y.tolist(), emulated.report()['kernels']['triton copy']]))"
    assert run(code, "--compute", "--races")[0] == [64 * [1], 1]
    assert run(code)[0] == [64 * [0], 1]


def test_plans_are_for_the_speed_of_the_emulated_gpu(run):
    code = """
from pathlib import Path
from fluxq.offload.gpus import GPUS, measure
print(json.dumps([measure(Path("absent")).bf16, GPUS["rtx4090"].bf16, measure(Path("absent")).memory_gib]))
"""
    measured, known, memory_gib = run(code, "--gpu", "rtx4090")[0]
    assert measured == known and memory_gib == 23.65


def test_a_thread_that_python_ends_does_not_abort_the_process(run):
    """As a thread of autograd that lets go of the last gradient while Python is already being finalized."""
    code = """
import threading, time
x = torch.ones(600, 600)
def multiply():
    while True:
        x @ x
threading.Thread(target=multiply, daemon=True).start()
time.sleep(0.3)
print(json.dumps("finalizing"))
"""
    assert run(code)[0] == "finalizing"
