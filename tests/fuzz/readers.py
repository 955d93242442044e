"""Every reader of files that may come from somewhere else: how to write a valid file, and how to read all of it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from helpers import Tensors, randomize, tiny_config
from PIL import Image
from torch import nn

from fluxq import nano
from fluxq.caching.foreign import ForeignCaches, ModelShapes
from fluxq.caching.hashes import Hashes
from fluxq.caching.looks import Looks
from fluxq.caching.store import Store, Text
from fluxq.commands.lora.info import info_command
from fluxq.config_files import config_from_dict, read_toml, to_toml
from fluxq.data.captions import Captions, has_weight, with_trigger
from fluxq.data.dataset import Dataset, Entry
from fluxq.data.examples import Example
from fluxq.data.images import image_size, open_image
from fluxq.data.looks import AREAS, copies, look_at
from fluxq.formats.checkpoint.files import Checkpoint, write_safetensors
from fluxq.formats.checkpoint.shards import Shards
from fluxq.formats.gguf_tokenizer import read_gguf_tokenizer
from fluxq.formats.lora.base import lora_hashes
from fluxq.formats.lora.read import load_lora
from fluxq.formats.npz import NpzFile
from fluxq.formats.quantized import QuantizedFile, fingerprint, load_quantized, write_quantized
from fluxq.formats.tokenizers import load_clip_tokenizer, load_t5_tokenizer
from fluxq.model import Flux
from fluxq.model.linear import Linear
from fluxq.models.check_file import check_file
from fluxq.training.health import Health
from fluxq.training.history import History, compared
from fluxq.training.optim import build_optimizer
from fluxq.training.records import Records
from fluxq.training.report import read_log, smoothed
from fluxq.training.run import Run
from fluxq.training.state import Measured, Progress, Validated, load_state, save_state

from .mutations import as_json, as_lines, as_safetensors, as_text

CPU = torch.device("cpu")
CAPTION = "a photo of zqx, in the park"
EXAMPLE = Example("photos/a.png", Path("a.png"), CAPTION, 1, (32, 32), (32, 32))
EXPECTED = ModelShapes(16, 4, 8, 8)
LAYER = "single_blocks.0.linear1"


@dataclass(frozen=True)
class Reader:
    """file: the name of the file; valid: writes what lies next to it and returns valid contents; read: reads all of it;
    structured: the damage to the structure of such files; may_refuse: whether even a valid one may not be of use.
    """

    file: str
    valid: Callable[[Path], Sequence[bytes]]
    read: Callable[[Path], object]
    structured: Callable[[bytes, Random], bytes] | None = None
    may_refuse: bool = False


def written(folder: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    write_safetensors(folder / "valid", tensors, metadata)
    return (folder / "valid").read_bytes()


# --- checkpoints ---


def stored(folder: Path) -> list[bytes]:
    """A layer in each kind of storage."""
    x, weight = torch.randn(4, 64), f"{LAYER}.weight"
    eight, bits = x.to(torch.float8_e4m3fn), json.dumps({"shape": [4, 64], "blocksize": 64, "nested_offset": 0.5})
    four = {
        weight: torch.randint(256, (128, 1), dtype=torch.uint8),
        f"{weight}.absmax": torch.randint(256, (4,), dtype=torch.uint8),
        f"{weight}.quant_map": torch.randn(16),
        f"{weight}.nested_absmax": torch.randn(1),
        f"{weight}.nested_quant_map": torch.randn(256),
        f"{weight}.quant_state.bitsandbytes__nf4": torch.frombuffer(bytearray(bits.encode()), dtype=torch.uint8),
    }
    format = torch.frombuffer(bytearray(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    return [
        written(folder, {weight: x, "b": x[0].bfloat16(), "c": torch.tensor(True)}, {"modelspec.title": "A title"}),
        written(folder, four),
        written(folder, {weight: eight, f"{LAYER}.weight_scale": torch.rand(4), f"{LAYER}.comfy_quant": format}),
        written(folder, {weight: x.to(torch.int8), f"{LAYER}.SCB": torch.rand(4)}),
        written(folder, {weight: eight}, {"_quantization_metadata": json.dumps({"layers": {LAYER: {"format": "x"}}})}),
    ]


def read_stored(path: Path) -> None:
    check_file(path)
    shards = Shards(path)
    shards.require_readable(shards.tensors)
    for tensor in shards.tensors.values():
        tensor.rows(range((*tensor.shape, 1)[0]))


def read_safetensors(path: Path) -> None:
    file = Checkpoint(path)
    for key in file.keys():
        file.get(key)


def index(folder: Path) -> list[bytes]:
    for name in ("a", "b"):
        write_safetensors(folder / f"{name}-00001-of-00002.safetensors", {name: torch.zeros(2)})
    listed = {name: f"{name}-00001-of-00002.safetensors" for name in ("a", "b")}
    return [json.dumps({"metadata": {"total_size": 16}, "weight_map": listed}).encode()]


def quantized(folder: Path) -> list[bytes]:
    config = tiny_config(hidden_size=64, depth=1, depth_single_blocks=0)
    tensors = dict(randomize(Flux(config)).bfloat16().state_dict())
    write_safetensors(folder / "source.safetensors", tensors)
    source = Tensors(config, tensors, (folder / "source.safetensors",))
    write_quantized(folder / "valid", source, "nf4", {"fingerprint": "00"}, CPU)
    return [(folder / "valid").read_bytes()]


def read_quantized(path: Path) -> None:
    load_quantized(QuantizedFile.open(path), CPU)
    fingerprint([path])


def gguf(folder: Path) -> list[bytes]:
    from gguf import GGMLQuantizationType, GGUFWriter

    contents = []
    for architecture, x in (("flux", np.ones((2, 64), np.float32)), ("t5encoder", None)):
        writer = GGUFWriter(folder / "valid", architecture)
        writer.add_string("general.name", "a name")
        if x is not None:
            writer.add_tensor(f"{LAYER}.weight", x)
            blocks = np.ones((2, 2 * 34), np.uint8)
            writer.add_tensor("b.weight", blocks, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tokenizer_model("t5")
            writer.add_token_list(["<pad>", "</s>", "<unk>", "\u2581a", "b"])
            writer.add_token_scores([0.0, 0.0, 0.0, -1.0, -2.0])
            writer.add_token_types([3, 3, 2, 1, 1])
            writer.add_precompiled_charsmap(b"")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        if x is not None:
            writer.write_tensors_to_file()
        writer.close()
        contents.append((folder / "valid").read_bytes())
    return contents


def read_gguf(path: Path) -> None:
    if b"t5encoder" in path.read_bytes():
        read_gguf_tokenizer(path)
        load_t5_tokenizer([path])(CAPTION)
    else:
        read_stored(path)


# --- LoRAs ---


def loras(folder: Path) -> list[bytes]:
    down, up = torch.randn(2, 192), torch.randn(192, 2)
    kohya = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.0)}
    tags = {"ss_tag_frequency": json.dumps({"photos": {"zqx": 3}}), "modelspec.title": "A title", "ss_steps": "10"}
    split = {"ss_network_args": json.dumps({"split_qkv": "True"})}
    peft = json.dumps({"transformer.lora_alpha": 2.0, "transformer.alpha_pattern": {"single": 3}, "transformer.r": 2})
    own = {"lora_A.weight": down, "lora_B.weight": up}
    path = "transformer_blocks.0.attn.to_q"
    return [
        written(folder, {f"lora_unet_double_blocks_0_img_attn_proj.{k}": v for k, v in kohya.items()}, tags),
        written(folder, {f"transformer.{path}.{k}": v for k, v in own.items()}, {"lora_adapter_metadata": peft}),
        written(folder, {f"lora_unet_double_blocks_0_img_attn_proj.{k}": v for k, v in kohya.items()}, split),
    ]


def read_lora(path: Path) -> None:
    info_command(path)
    lora_hashes([(path, 1.0)])


def peft(folder: Path) -> list[bytes]:
    tensors = {"lora_A.weight": torch.randn(2, 192), "lora_B.weight": torch.randn(192, 2)}
    name = "base_model.model.double_blocks.0.img_attn.proj"
    write_safetensors(folder / "adapter_model.safetensors", {f"{name}.{k}": v for k, v in tensors.items()})
    pattern = {"alpha_pattern": {"double_blocks.0.*": 4}, "use_rslora": True}
    return [json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, **pattern}).encode()]


# --- caches, runs and settings ---


def record(folder: Path) -> list[bytes]:
    store, key = Store(folder), "0" * 32
    store.put_text(key, Text(torch.randn(2, 3), torch.randn(3), CAPTION, 2, False))
    store.put_latents(key, torch.randn(2, 2, 2), torch.rand(2, 2, 2), "a.png")
    return [(folder / kind / f"{key}.safetensors").read_bytes() for kind in ("text", "latents")]


def read_record(path: Path) -> None:
    contents = path.read_bytes()
    kind = "latents" if b"spread" in contents else "text"
    path.with_name(kind).mkdir(exist_ok=True)
    (path.with_name(kind) / f"{'0' * 32}.safetensors").write_bytes(contents)
    store = Store(path.parent)
    store.verify()
    for read in (store.latents_size, store.latents) if kind == "latents" else (store.truncated, store.text):
        read("0" * 32)


def npz(folder: Path) -> list[bytes]:
    contents = []
    for save in (np.savez, np.savez_compressed):
        arrays = {"latents_4x4": np.ones((16, 4, 4), np.float32), "original_size_4x4": np.array([32, 32])}
        save(file := io.BytesIO(), **arrays)
        contents.append(file.getvalue())
    return contents


def read_npz(path: Path) -> None:
    file = NpzFile(path)
    for name, shape in file.shapes.items():
        if np.prod(shape, dtype=float) < 1 << 16:
            file.get(name)
    if cache := ForeignCaches(path.parent, EXPECTED).latents(EXAMPLE, (32, 32), 1 << 20):
        cache.read()


def npz_text(folder: Path) -> list[bytes]:
    text, mask = np.ones((4, 8), np.float32), np.ones(4, np.int32)
    np.savez(file := io.BytesIO(), t5_out=text, l_pooled=text[0], t5_attn_mask=mask, apply_t5_attn_mask=False)
    return [file.getvalue()]


def read_foreign_text(path: Path) -> None:
    if cache := ForeignCaches(path.parent, EXPECTED).text(EXAMPLE, ""):
        cache.read()


def toolkit(folder: Path) -> list[bytes]:
    metadata = {"filename": "a.png", "latent_space_version": "flux1", "crop_width": "32", "crop_height": "32"}
    metadata |= {"scale_to_width": "32", "scale_to_height": "32", "flip_x": "false"}
    return [written(folder, {"latent": torch.zeros(16, 4, 4)}, metadata)]


def read_toolkit(path: Path) -> None:
    inner = path.with_name("_latent_cache")
    inner.mkdir(exist_ok=True)
    (inner / f"a_{'x' * 22}.safetensors").write_bytes(path.read_bytes())
    ForeignCaches(path.parent, EXPECTED).latents(EXAMPLE, (32, 32), 1 << 20)


def dataset(folder: Path) -> list[bytes]:
    entry = Entry("photos/a.png", "/photos/a.png", 10, 1, 1, (32, 32), ("0" * 32,), ("1" * 32,))
    Dataset((entry,), {"": "2" * 32}, 4, ("skipped",), ("a note",)).save(folder / "valid")
    return [(folder / "valid").read_bytes()]


def read_dataset(path: Path) -> None:
    data, store = Dataset.load(path), Store(path.parent)
    data.digest(), data.contents()
    for kind, key in data.records():
        assert store._path(kind, key).parent.parent == path.parent, "a record lies in the cache's own folders"


def hashes(folder: Path) -> list[bytes]:
    (folder / "model").write_bytes(b"x" * 100)
    known = Hashes(folder / "valid")
    known.of(folder / "model")
    known.save()
    return [(folder / "valid").read_bytes()]


def state_parts() -> tuple[dict[str, Linear], object]:
    torch.manual_seed(0)
    layer = Linear(8, 8)
    layer.lora_down, layer.lora_up = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))
    return {LAYER: layer}, build_optimizer("adamw", [layer.lora_down, layer.lora_up], 1e-3, 0.0)


def state(folder: Path) -> list[bytes]:
    measured = Measured(0, {"loss": 0.5}, {"held_out": {"loss": 0.5}}, {"loss": 0.4})
    validated = Validated(measured, measured, measured, measured, 1, "i")
    progress = Progress({"data": "d", "model": "m"}, 3, 1.5, validated, [LAYER], ["a change"])
    save_state(folder / "valid", progress, *state_parts())
    return [(folder / "valid").read_bytes()]


def read_state(path: Path) -> None:
    layers, optimizer = state_parts()
    load_state(path, layers, optimizer)
    for p in (layers[LAYER].lora_down, layers[LAYER].lora_up):
        p.grad = torch.ones_like(p)
    optimizer.step()


CONFIG = config_from_dict(
    {
        "data": {"folders": [{"path": "photos", "repeats": 2}], "trigger": "zqx", "resolution": 96},
        "lora": {"rank": 4, "targets": ["all"]},
        "training": {"learning_rate": 1e-4, "steps": 10},
        "output": {"out": "runs/zqx", "name": "zqx"},
    },
    "here",
)


def toml(folder: Path) -> list[bytes]:
    return [to_toml(CONFIG).encode(), b'[data]\nfolders = ["photos"]\nsize = 96\n[training]\nrate = 1e-4\n']


def read_config_file(path: Path) -> None:
    to_toml(config_from_dict(read_toml(path), str(path)))


def log(folder: Path) -> list[bytes]:
    row = {"step": 1, "loss": 0.5, "learning_rate": 1e-4, "grad": 0.1, "seconds": 0.1, "peak_bytes": None}
    return ["".join(json.dumps(row | {"step": i}) + "\n" for i in range(1, 30)).encode()]


def read_whole_log(path: Path) -> None:
    records = read_log(path)
    smoothed([r["loss"] for r in records])
    list(Health(Records(records)).check())


def run_data(folder: Path) -> list[bytes]:
    return [json.dumps({"photos/a.png": [["0" * 32], ["1" * 32], 1]}).encode()]


def read_run_data(path: Path) -> None:
    run = Run(replace(CONFIG, output=replace(CONFIG.output, out=path.parent.parent)))
    entry = Entry("photos/a.png", "/photos/a.png", 10, 1, 1, (32, 32), ("0" * 32,), ("1" * 32,))
    run._changed_data(Dataset((entry,), {}, 4))


def runs(folder: Path) -> list[bytes]:
    run = {"seconds": 2.0, "peak_bytes": 10 << 30, "date": "2026-11-30", "versions": {"torch": "2.13.0"}}
    return [json.dumps({"a kind": [run, run | {"peak_bytes": None}], "another": [run]}).encode()]


def read_runs(path: Path) -> None:
    history = History("a kind")
    history.path = path
    now = {"seconds": 4.0, "peak_bytes": 20 << 30, "date": "2026-12-01", "versions": {"torch": "2.14.1"}}
    if before := history.runs():
        line = compared(now, before) or ""
        assert line.isprintable() and len(line) < 4096
    history.add(now)
    assert history.runs()[-1] == now


# --- images, captions, tokenizers ---


def images(folder: Path) -> list[bytes]:
    rgb, contents = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)), []
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = ({"format": "JPEG", "exif": exif}, {"format": "PNG", "exif": exif}, {"format": "WEBP"}, {"format": "BMP"})
    for options in (*kinds, {"format": "TIFF", "compression": "tiff_lzw"}, {"format": "GIF"}):
        rgb.save(file := io.BytesIO(), **options)
        contents.append(file.getvalue())
    for mode in ("I;16", "RGBA", "P", "1", "F"):
        image = Image.new(mode, (9, 7), 3) if mode != "RGBA" else rgb.convert(mode)
        image.save(file := io.BytesIO(), format="TIFF" if mode == "F" else "PNG")
        contents.append(file.getvalue())
    return contents


def read_image(path: Path) -> None:
    image_size(path, 1 << 20)
    open_image(path, 1 << 20)
    look_at(path, 1 << 20)


def read_a_caption(path: Path) -> None:
    caption = Captions(path.parent).of(path.with_name("image.png")).text
    has_weight(with_trigger(caption, "zqx"))


def beside_an_image(*valid: str) -> Callable[[Path], list[bytes]]:
    """Contents of a file in the folder of image.png."""

    def contents(folder: Path) -> list[bytes]:
        (folder / "image.png").touch()
        return [text.encode() for text in valid]

    return contents


def caption_json(folder: Path) -> list[bytes]:
    rows = {"caption": CAPTION}, {"text": "", "prompt": CAPTION}, CAPTION
    return beside_an_image(*map(json.dumps, rows))(folder)


def captions_json(folder: Path) -> list[bytes]:
    """By image: sd-scripts' metadata, ai-toolkit's, and a list."""
    row = {"caption": CAPTION, "tags": "red, blue"}
    of = {"/photos/image": row, "image.png": CAPTION}, [row | {"file_name": "image.png"}]
    return beside_an_image(*map(json.dumps, of))(folder)


def looks(folder: Path) -> list[bytes]:
    return [json.dumps({"0" * 32: ["7f" * AREAS, 12.5, 3.0], "1" * 32: ["00" * AREAS, 0.0, 0.0]}).encode()]


def read_looks(path: Path) -> None:
    images = {path.with_name(f"{i}.png"): str(i) * 32 for i in range(2)}
    for image in images:
        image.touch()
    found = Looks(path).of(images)
    list(copies(found))
    assert all(isinstance(look.is_plain or look.is_blurred, bool) for look in found.values())


def clip_vocabulary(folder: Path) -> list[bytes]:
    (folder / "merges.txt").write_bytes((nano.WEIGHTS / "tokenizer" / "merges.txt").read_bytes())
    return [(nano.WEIGHTS / "tokenizer" / "vocab.json").read_bytes()]


def merges(folder: Path) -> list[bytes]:
    (folder / "vocab.json").write_bytes((nano.WEIGHTS / "tokenizer" / "vocab.json").read_bytes())
    return [(nano.WEIGHTS / "tokenizer" / "merges.txt").read_bytes()]


def tokenizer_json(folder: Path) -> list[bytes]:
    from tokenizers import Tokenizer, models, normalizers

    bpe = Tokenizer(models.BPE({"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "b": 3, "ab": 4}, [("a", "b")]))
    bpe.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    unigram = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("a", -1.0)], 2, False))
    unigram.normalizer = normalizers.NFKC()
    return [bpe.to_str().encode(), unigram.to_str().encode()]


def read_tokenizer_json(path: Path) -> None:
    if b"startoftext" in path.read_bytes():
        load_clip_tokenizer([path])[0](CAPTION)
    else:
        load_t5_tokenizer([path])(CAPTION)


READERS = {
    "safetensors": Reader("model.safetensors", stored, read_safetensors, as_safetensors),
    "checkpoint": Reader("model.safetensors", stored, read_stored, as_safetensors, may_refuse=True),
    "index": Reader("model.safetensors.index.json", index, lambda path: Shards(path), as_json),
    "quantized": Reader("model.safetensors", quantized, read_quantized, as_safetensors),
    "gguf": Reader("model.gguf", gguf, read_gguf),
    "lora": Reader("lora.safetensors", loras, read_lora, as_safetensors),
    "peft": Reader("adapter_config.json", peft, lambda path: load_lora(path.parent), as_json),
    "record": Reader("record", record, read_record, as_safetensors),
    "npz": Reader("a_0032x0032_flux.npz", npz, read_npz),
    "npz_text": Reader("a_flux_te.npz", npz_text, read_foreign_text),
    "toolkit": Reader("latent", toolkit, read_toolkit, as_safetensors, may_refuse=True),
    "dataset": Reader("dataset.json", dataset, read_dataset, as_json),
    "hashes": Reader("hashes.json", hashes, lambda path: Hashes(path).of(path.with_name("model")), as_json),
    "state": Reader("state.safetensors", state, read_state, as_safetensors),
    "looks": Reader("looks.json", looks, read_looks, as_json),
    "runs": Reader("runs.json", runs, read_runs, as_json),
    "toml": Reader("config.toml", toml, read_config_file, as_text),
    "log": Reader("log.jsonl", log, read_whole_log, as_lines),
    "run_data": Reader("state/data.json", run_data, read_run_data, as_json),
    "image": Reader("image.png", images, read_image),
    "caption": Reader("image.txt", lambda folder: [CAPTION.encode(), b"\n\n a \r\n b"], read_a_caption, as_text),
    "caption_json": Reader("image.json", caption_json, read_a_caption, as_json),
    "captions_jsonl": Reader(
        "metadata.jsonl",
        beside_an_image(
            f'{{"file_name": "image.png", "text": "{CAPTION}"}}\n\n{{"file_name": "b.png", "prompt": "b"}}\n'
        ),
        read_a_caption,
        as_lines,
    ),
    "captions_csv": Reader(
        "metadata.csv",
        beside_an_image(f'file_name,text\nimage.png,"{CAPTION}"\n\nb.png,"a ""b"""\n'),
        read_a_caption,
        as_text,
    ),
    "captions_json": Reader("meta_cap.json", captions_json, read_a_caption, as_json),
    "clip_vocabulary": Reader(
        "vocab.json",
        clip_vocabulary,
        lambda p: load_clip_tokenizer([p, p.with_name("merges.txt")])[0](CAPTION),
        as_json,
    ),
    "merges": Reader(
        "merges.txt", merges, lambda p: load_clip_tokenizer([p.with_name("vocab.json"), p])[0](CAPTION), as_text
    ),
    "tokenizer_json": Reader("tokenizer.json", tokenizer_json, read_tokenizer_json, as_json),
    "spiece": Reader(
        "spiece.model",
        lambda folder: [(nano.WEIGHTS / "tokenizer_2" / "spiece.model").read_bytes()],
        lambda path: load_t5_tokenizer([path])(CAPTION),
    ),
}
