"""CLIP-L with LoRA against transformers with peft, and its gradient through the transformer."""

from __future__ import annotations

import pytest
import torch
from helpers import Lazy, randomize, relative_error, tiny_config
from live_bytes import LiveBytes
from torch import nn

from fluxq import nano
from fluxq.formats.checkpoint.files import write_safetensors
from fluxq.formats.checkpoint.source import open_clip, open_flux
from fluxq.formats.load import load_clip
from fluxq.formats.lora.read import load_lora
from fluxq.formats.lora.write import save_lora
from fluxq.formats.quantized import cached, load_quantized
from fluxq.formats.stream import expect_training, load_streamed
from fluxq.kernels.chunks import CHUNKS
from fluxq.model import Flux, FluxConfig, add_lora
from fluxq.model.clip import CLIP_TARGETS, Clip
from fluxq.model.costs import flux_costs
from fluxq.model.embed import image_ids, text_ids
from fluxq.model.lora import lora_layers
from fluxq.offload import Immediate
from fluxq.training.run import adapters_of

transformers = Lazy("transformers")
CPU = torch.device("cpu")
TOKENIZER = (nano.CLIP_TOKENIZER / "vocab.json", nano.CLIP_TOKENIZER / "merges.txt")
CAPTIONS = ["a red circle at the top", "", "blue and red " * 40]
RANK, ALPHA = 3, 2.0


@pytest.fixture
def theirs(tmp_path) -> transformers.CLIPTextModel:
    """A random CLIP; its weights are in tmp_path / "clip_l.safetensors"."""
    sizes = dict(hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2)
    model = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(vocab_size=1000, **sizes, bos_token_id=None, eos_token_id=2)
    )
    randomize(model)
    state = {f"text_model.{k}": v for k, v in model.state_dict().items()}
    write_safetensors(tmp_path / "clip_l.safetensors", state)
    return model.eval().requires_grad_(False)


def loaded(tmp_path, dtype=torch.float64) -> Clip:
    return load_clip(tmp_path / "clip_l.safetensors", TOKENIZER, CPU, dtype)


def with_lora(clip: Clip) -> Clip:
    """Random LoRA, down and up, in the dtype of the weights."""
    torch.manual_seed(1)
    add_lora(clip, RANK, ALPHA, CLIP_TARGETS)
    for layer in lora_layers(clip).values():
        nn.init.normal_(layer.get_parameter("lora_up"), std=0.3)
    return clip.to(clip.final_layer_norm.weight.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pooled_vectors_equal_transformers(tmp_path, theirs, dtype):
    clip = loaded(tmp_path, dtype)
    ids, _, cut = clip._tokens(CAPTIONS)
    assert cut == [False, False, True] and not list(clip.parameters())
    expected = theirs.to(dtype)(ids).pooler_output
    assert relative_error(clip.pooled(CAPTIONS), expected) <= 1e-6


@pytest.mark.slow
def test_gradients_are_those_of_peft(tmp_path, theirs):
    """In fp64, every module with weights of its own: two that are swapped would show."""
    import peft  # late: it takes 2 s, in which nothing can be collected

    clip = with_lora(loaded(tmp_path))
    wrapped = peft.get_peft_model(
        theirs.double(),
        peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
        ),
        autocast_adapter_dtype=False,
    )
    pairs = []
    for path, layer in lora_layers(clip).items():
        module = wrapped.base_model.model.get_submodule(path)
        for ours, other in ((layer.lora_down, module.lora_A.default), (layer.lora_up, module.lora_B.default)):
            other.weight = nn.Parameter(ours.detach().clone())
            pairs.append((ours, other.weight))
    ids, ends, _ = clip._tokens(CAPTIONS)
    dy = torch.randn(3, 128, dtype=torch.float64)
    ours = torch.autograd.grad(clip(ids, ends), [a for a, _ in pairs], dy)
    other = torch.autograd.grad(wrapped(ids).pooler_output, [b for _, b in pairs], dy)
    assert len(pairs) == 2 * 2 * 6
    for a, b in zip(ours, other, strict=True):
        assert relative_error(a, b) <= 1e-10
    of_shapes = {}
    for gradient in ours:
        of_shapes.setdefault(gradient.shape, []).append(gradient)
    assert all(relative_error(a, b) > 0.1 for some in of_shapes.values() for a in some for b in some if a is not b)


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_a_saved_lora_loads_unchanged(tmp_path, theirs, dialect):
    clip = with_lora(loaded(tmp_path, torch.float32))
    wanted = adapters_of(clip)
    save_lora(tmp_path / "x.safetensors", {}, FluxConfig.nano(), dialect, torch.float32, clip=wanted)
    lora = load_lora(tmp_path / "x.safetensors", FluxConfig.nano())
    lora.check_clip(open_clip(tmp_path / "clip_l.safetensors").shapes)
    assert lora.clip.keys() == wanted.keys()
    for module, adapter in wanted.items():
        assert relative_error(lora.clip[module].change(), adapter.change()) <= 1e-6
        assert torch.equal(adapter.change(), clip.get_submodule(module).lora_scale * adapter.up @ adapter.down)


def inputs(config: FluxConfig, dtype=torch.float32) -> tuple:
    torch.manual_seed(2)
    img, txt = torch.randn(2, 15, config.in_channels), torch.randn(2, 7, config.context_in_dim)
    times, guidance = torch.rand(2), torch.ones(2)
    return img.to(dtype), image_ids(3, 5), txt.to(dtype), text_ids(7), times, guidance


def velocity(flux: Flux, y: torch.Tensor) -> torch.Tensor:
    img, img_ids, txt, txt_ids, times, guidance = inputs(flux.config, flux.dtype)
    return flux(img, img_ids, txt, txt_ids, times, y, guidance)


@pytest.mark.parametrize("policy", ["recompute", "keep_attention", "keep_qkv", "keep_all"])
def test_the_gradient_of_y_equals_finite_differences(policy):
    """Central differences in fp64, with and without LoRA in the transformer."""
    for targets in ("attention+mlp", None):
        torch.manual_seed(0)
        flux = randomize(Flux(tiny_config())).double()
        if targets:
            add_lora(flux, 3, 2, targets)
            flux.double()
        flux.set_policy(policy)
        flux.trains_y = True
        assert flux.trains_modulation and flux.blocks_with_backward == range(4)
        assert flux.units_with_backward == {u for b in flux.blocks for u in (*b.units, b.modulation_unit)}
        y, step = torch.randn(2, 24, dtype=torch.float64), 1e-5
        dv = torch.randn(2, 15, 16, dtype=torch.float64)
        asked = y.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(velocity(flux, asked), asked, dv)
        for _ in range(3):
            direction = torch.randn_like(y)
            with torch.no_grad():
                rise = (velocity(flux, y + step * direction) - velocity(flux, y - step * direction)) / (2 * step)
            assert float((gradient * direction).sum()) == pytest.approx(float((rise * dv).sum()), rel=1e-4, abs=1e-4)


def test_streamed_weights_are_resident_for_the_gradient_of_y(tmp_path, monkeypatch):
    """Freed slots are poisoned, and modulation is streamed through them within the step."""
    monkeypatch.setenv("FLUXQ_CACHE", str(tmp_path))
    file = cached(open_flux(nano.FLUX), "nf4", CPU, lambda done, total: None)
    clip, gradients = with_lora(load_clip(nano.CLIP_L, TOKENIZER, CPU)), []
    for flux in (load_quantized(file, CPU), load_streamed(file, CPU, (), 2, Immediate(), poison=True, ahead=False)):
        torch.manual_seed(3)
        add_lora(flux, 2, 2)
        flux.trains_y = True
        expect_training(flux)
        out = velocity(flux, clip.pooled(["a red circle", "blue"]))
        gradients.append(torch.autograd.grad(out.float().square().sum(), list(clip.parameters())))
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(*gradients, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_costs_equal_those_of_the_model(tmp_path, theirs, batch):
    """In bf16: frozen and trained weights to the byte, activations kept for the backward pass within 10 %."""
    clip, shapes = with_lora(loaded(tmp_path, torch.bfloat16)), open_clip(tmp_path / "clip_l.safetensors").shapes
    config = FluxConfig.dev()
    plain, more = (flux_costs(config, "nf4", rank=RANK, batch=batch, clip=c, chunk=CHUNKS[86]) for c in (None, shapes))
    assert more.stays - plain.stays == sum(b.nbytes for b in clip.buffers())
    weights = sum(p.numel() for p in clip.parameters())
    assert more.lora - plain.lora == 6 * weights  # in fp32 and in bf16
    assert more.gradients - plain.gradients == 4 * weights
    with LiveBytes() as live:
        pooled = clip.pooled(CAPTIONS[:1] * batch)
    assert pooled.requires_grad
    kept = more.scratch - plain.scratch
    assert live.live == pytest.approx(kept, rel=0.1)
    # all modulation runs within the step, forward and backward
    assert not more.ahead and more.window == 0 and more.units.keys() == plain.units.keys() | plain.ahead.keys()
    assert all(block.policies for block in more.blocks)
    assert more.outside.flops > plain.outside.flops
