"""What only a GPU can show. `make gpu` runs these with the python at hand; elsewhere they are skipped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import Tensors, randomize, relative_error, tiny_config

from fluxq.caching.store import Text
from fluxq.config import ModelConfig
from fluxq.config_files import config_from_dict
from fluxq.formats.checkpoint.files import Checkpoint
from fluxq.formats.load import load_text_encoders
from fluxq.formats.quantized import QuantizedFile, load_quantized, write_quantized
from fluxq.formats.stream import expect_training, load_streamed
from fluxq.kernels import Activations, backend, dequantize, quantize
from fluxq.model import Flux, add_lora
from fluxq.model.embed import image_ids, text_ids
from fluxq.model.modulation import Lookahead
from fluxq.models.parts import Models
from fluxq.nano import drawing
from fluxq.offload import CudaStreams, Staged
from fluxq.offload.arena import Arena, streams_for
from fluxq.offload.inputs import inputs_for
from fluxq.sampling.decoding import sample_images
from fluxq.sampling.requests import Request
from fluxq.train import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture(autouse=True)
def _made_for_the_sanitizer(monkeypatch):
    """PyTorch's sanitizer, if it runs, sees PyTorch's operators and not Triton's kernels, so there are none; and notes
    where each operator was called, which takes most of its time, so it notes a part.
    """
    if "TORCH_CUDA_SANITIZER" not in os.environ:
        yield
        return
    walk = traceback.walk_stack
    monkeypatch.setattr(traceback, "walk_stack", lambda frame: islice(walk(frame), 16))
    with backend("reference"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_bytes_on_the_gpu_equal_the_cpu(dtype):
    w = torch.randn(130, 4096).to(dtype)
    host, gpu = quantize(w, "nf4"), quantize(w.cuda(), "nf4")
    assert torch.equal(gpu.codes.cpu(), host.codes)
    assert torch.equal(gpu.absmax.cpu(), host.absmax)
    assert torch.equal(dequantize(gpu, torch.bfloat16).cpu(), dequantize(host, torch.bfloat16))


def plain_linear(x, weight, bias=None, down=None, up=None, scale=1.0, *_):
    """What anybody would write with autograd, in x's dtype. The op before may leave room behind the rows of x."""
    x = (x.x if isinstance(x, Activations) else x)[..., : weight.shape[1]]
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return y if down is None else y + scale * F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))


def test_a_step_in_bf16_is_within_twice_the_error_of_plain_pytorch(monkeypatch):
    """Against fp32 of the same bf16 weights: fluxq's gradient of every LoRA may err at most twice as much as
    autograd's.
    """
    flux = randomize(Flux(tiny_config(hidden_size=256, num_heads=8))).bfloat16().cuda()
    for layer in add_lora(flux, 8, 4).values():
        torch.nn.init.normal_(layer.lora_up, std=0.05)
    img, txt = torch.randn(2, 48, 16, device="cuda"), torch.randn(2, 33, 40, device="cuda")
    y, t, g = torch.randn(2, 24, device="cuda"), torch.rand(2, device="cuda"), torch.ones(2, device="cuda")
    ids, dy = (image_ids(6, 8, "cuda"), text_ids(33, "cuda")), torch.randn(2, 48, 16, device="cuda")

    def gradients() -> list[torch.Tensor]:
        out = flux(img, ids[0], txt, ids[1], t, y, g)
        return list(torch.autograd.grad(out, list(flux.parameters()), dy.to(out.dtype)))

    ours = gradients()
    monkeypatch.setattr("fluxq.model.linear.lora_linear", plain_linear)
    monkeypatch.setattr("fluxq.model.flux.run_block", lambda block, ring, *inputs, mask, offload: block(*inputs, mask))
    theirs = gradients()
    for _, buffer in flux.named_buffers():
        buffer.data = buffer.data.float()
    for a, b, exact in zip(ours, theirs, gradients(), strict=True):
        assert relative_error(a, exact) <= 2 * relative_error(b, exact) + 1e-6


def test_every_model_lies_where_it_is_asked_to_and_answers_as_on_the_cpu():
    answers = {}
    for device in ("cpu", "cuda"):
        models = Models(ModelConfig(name="nano"), torch.device(device))
        text, autoencoder = models.load_text_encoders(), models.load_autoencoder()
        encoded = text.encode(["a large red star", ""])
        image = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)).to(device)
        latents = autoencoder.encode(image)
        texts = {"x": Text(encoded.t5[0].cpu(), encoded.clip[0].cpu(), "x", 5, False)}
        drawn = sample_images(models.load_flux(), models.load_autoencoder, texts, [Request("x", 1, 96, 96, steps=2)])[0]
        answers[device] = [encoded.t5, encoded.clip, latents, autoencoder.decode(latents), to_tensor(drawn)]
    for host, gpu in zip(answers["cpu"], answers["cuda"], strict=True):
        assert relative_error(gpu.cpu(), host) < 0.03


def test_text_encoders_through_the_ring_are_the_same_to_the_bit():
    models = Models(ModelConfig(name="nano"), torch.device("cuda"))
    files = models.clip_l_file, models.t5xxl_file, *models.tokenizer_files()
    captions = [f"a {color} star" for color in ("red", "green", "blue")]
    expected = load_text_encoders(*files, models.t5_length, models.device, slots=0).encode(captions)
    ours = load_text_encoders(*files, models.t5_length, models.device, poison=True)
    for _ in range(3):
        found = ours.encode(captions)
        assert torch.equal(found.t5, expected.t5) and torch.equal(found.clip, expected.clip)


def to_tensor(image) -> torch.Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float()


def test_a_run_trains_saves_and_goes_on(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, (image, caption) in enumerate(drawing.concept(seed=1, count=4)):
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    values = {
        "model": {"name": "nano"},
        "data": {"folders": [str(folder)], "cache": str(tmp_path / "cache")},
        "training": {"steps": 3, "optimizer": "adamw"},
        "samples": {"every": 3, "steps": 2},
        "output": {"out": str(tmp_path / "run"), "name": "x"},
    }
    result = train(config_from_dict(values, "a test"))
    assert result.peak_bytes and 0 < result.peak_bytes < 2**30
    values["training"]["steps"] = 5
    assert train(config_from_dict(values, "a test"), resume=True).steps == 5


def test_a_run_with_masked_text_has_the_losses_of_a_cpu(tmp_path, monkeypatch):
    """Captions of three lengths in a batch, so that attention has a mask, and runs another kernel than without."""
    folder = tmp_path / "photos"
    folder.mkdir()
    captions = "star", "a large red star at the top of a blue field", "a red star"
    for i, ((image, _), caption) in enumerate(zip(drawing.concept(seed=1, count=3), captions, strict=True)):
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)

    def losses(device: str) -> list[float]:
        out = tmp_path / device
        values = {
            "model": {"name": "nano", "text_mask": True},
            "data": {"folders": [str(folder)], "cache": str(tmp_path / "cache")},
            "training": {"steps": 2, "batch": 3, "optimizer": "adamw"},
            "output": {"out": str(out), "name": "x"},
        }
        train(config_from_dict(values, "a test"))
        return [record["loss"] for record in map(json.loads, (out / "log.jsonl").open()) if "loss" in record]

    found = losses("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expected = losses("cpu")
    assert len(found) == 2 and found == pytest.approx(expected, rel=2e-3)


@pytest.mark.skipif(os.name != "posix", reason="Windows ends a process that gets SIGTERM")
def test_a_run_that_is_asked_to_end_saves_its_step_and_exits_143(tmp_path):
    folder, out = tmp_path / "photos", tmp_path / "run"
    folder.mkdir()
    for i, (image, caption) in enumerate(drawing.concept(seed=1, count=2)):
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    command = [sys.executable, "-m", "fluxq", "train", folder, "--model", "nano", "--cache", tmp_path / "cache"]
    command += ["--out", out, "--steps", "5000", "--name", "x"]
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("step     3/5000"):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)  # in a step
        rest = process.stdout.read().splitlines()
    assert process.returncode == 143
    said = re.fullmatch(
        rf"stopped: after step (\d+); continue with: fluxq train --resume {re.escape(str(out))}", rest[-1]
    )
    assert said is not None and 3 <= (done := int(said[1])) < 20, rest
    saved = Checkpoint(out / "state" / "state.safetensors")
    assert json.loads(saved.metadata["fluxq_state"])["step"] == done
    assert all(saved.get(key).float().isfinite().all() for key in saved.keys())
    assert (out / f"x-step{done:08}.safetensors").is_file()


# --- streaming


@pytest.fixture(scope="module")
def streamed_file(tmp_path_factory):
    """A model of 2 + 3 blocks in NF4, whose units are long enough for copies to take a while."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("streamed") / "model.safetensors"
    flux = randomize(Flux(tiny_config(hidden_size=1024, num_heads=32, depth_single_blocks=3))).bfloat16()
    source = Tensors(flux.config, {name: t.contiguous() for name, t in flux.state_dict().items()})
    write_quantized(path, source, "nf4", {}, torch.device("cpu"))
    return QuantizedFile.open(path)


def steps_and_samples(flux: Flux) -> list[torch.Tensor]:
    """Gradients of four steps, with samples in between, nobody waiting for the GPU."""
    for layer in add_lora(flux, 8, 4, generator=torch.Generator().manual_seed(1)).values():
        torch.nn.init.constant_(layer.get_parameter("lora_up"), 0.01)
    expect_training(flux)
    noise = torch.Generator().manual_seed(2)
    img, txt, y = (torch.randn(2, *shape, generator=noise).cuda() for shape in ((48, 16), (33, 40), (24,)))
    given = torch.tensor([0.3, 0.8]).cuda(), y, torch.ones(2).cuda()
    ahead, ids = Lookahead(flux, lambda index: given, 2), (image_ids(6, 8, "cuda"), text_ids(33, "cuda"))
    found = []
    for step in range(4):
        out = flux(img, ids[0], txt, ids[1], *given, ahead.rows(40 * step))  # each in a tile of its own
        found += torch.autograd.grad(out.float().square().mean(), list(flux.parameters()))
        with torch.no_grad():
            found += [flux(img, ids[0], txt, ids[1], *given, rows) for rows in (ahead.rows(40 * step + 1), None)]
    return found


@pytest.fixture(scope="module")
def resident_twice(streamed_file) -> Callable[[], list[list[torch.Tensor]]]:
    """What two runs find with every unit resident. They are made in the first test that asks, under its settings."""
    return cache(lambda: [steps_and_samples(load_quantized(streamed_file, torch.device("cuda"))) for _ in range(2)])


@pytest.mark.parametrize("way", ["as measured", "pinned", "staged"])
@pytest.mark.parametrize("slots", [2, 5])
@pytest.mark.parametrize("poison", [False, True])
def test_streaming_differs_no_more_than_two_runs_do(poison, slots, way, streamed_file, resident_twice):
    gpu, resident = torch.device("cuda"), ("double_blocks.0.img",)
    expected, again = resident_twice()
    said, streams = [], None
    if way != "as measured":
        streams = CudaStreams(gpu)
        if way == "staged":
            streams = Staged(streams, [torch.empty(1 << 24, dtype=torch.uint8).pin_memory() for _ in range(2)])
    flux = load_streamed(streamed_file, gpu, resident, slots, streams, poison, said.append)
    if way == "pinned":
        assert flux.ring.host.pin() is None
    found = steps_and_samples(flux)
    flux.ring.close()
    assert len(said) == (way == "as measured")
    for a, b, c in zip(found, expected, again, strict=True):
        assert relative_error(a, b) <= 2 * relative_error(c, b)


def test_inputs_that_wait_on_the_host_change_nothing(streamed_file, resident_twice):
    """Nor do units that stream beside them, over the same bus."""
    gpu, said = torch.device("cuda"), []
    expected, again = resident_twice()
    for flux in (load_quantized(streamed_file, gpu), load_streamed(streamed_file, gpu, (), 2)):
        flux.inputs = inputs_for(gpu, said.append)
        found = steps_and_samples(flux)
        assert not said, "the driver pins what they wait in"
        for a, b, c in zip(found, expected, again, strict=True):
            assert relative_error(a, b) <= 2 * relative_error(c, b)


class Refusing:
    """A CUDA runtime that pins nothing more; the driver's real error stays behind, as it does."""

    def cudaHostRegister(self, address, length, flags):  # noqa: N802
        return torch.cuda.cudart().cudaHostRegister(0, 0, 0)


def test_a_refused_pin_leaves_no_error_behind():
    arena = Arena({"a": 1 << 20}, lambda unit, out: out.fill_(7))
    assert arena.pin(Refusing())
    assert float(torch.ones(4, device="cuda").sum()) == 4
    said = []
    streams = streams_for(arena, torch.device("cuda"), said.append)
    slot = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
    streams.copy_waits(streams.computed())
    streams.copy(slot, arena["a"])
    streams.compute_waits(streams.copied())
    assert bool((slot == 7).all()) and "GB/s" in said[0]
