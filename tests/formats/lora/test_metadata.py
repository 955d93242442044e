"""The metadata of a LoRA, and the hashes by which UIs recognize it."""

import hashlib
import json

import torch
from safetensors.torch import save

from fluxq.formats.lora.metadata import lora_metadata, sshs_hashes

ARGUMENTS = {
    "name": "zqx",
    "rank": 16,
    "alpha": 8.0,
    "steps": 1200,
    "last_step": 1500,
    "epochs": 25,
    "learning_rate": 1e-4,
    "seed": 42,
    "resolution": (768, 512),
    "variant": "dev",
    "base_model": "/home/someone/models/flux1-dev.safetensors",
    "optimizer": "AdamW8bit",
    "datasets": {"/home/someone/photos/zqx": (10, 24), "/home/someone/other/zqx": (1, 5)},
    "tag_frequency": {"/home/someone/photos/zqx": {"zqx": 24, "a red \N{CAT FACE}": 3}},
    "buckets": {(768, 512): 240, (512, 768): 5},
    "trigger": "zqx",
    "title": "Zqx",
    "started": 1_700_000_000.25,
    "finished": 1_700_003_600.5,
    "timestep_sampling": "flux_shift",
    "shift": 3.1582,
    "guidance": 1.0,
    "precision": "bf16",
}


def test_metadata_is_what_the_uis_look_for():
    metadata = lora_metadata(**ARGUMENTS)
    expected = {
        "ss_base_model_version": "flux1",
        "ss_network_module": "networks.lora_flux",
        "ss_network_dim": "16",
        "ss_steps": "1200",
        "ss_max_train_steps": "1500",
        "ss_network_alpha": "8.0",
        "ss_v2": "False",
        "ss_output_name": "zqx",
        "ss_sd_model_name": "flux1-dev.safetensors",
        "ss_num_train_images": "245",
        "ss_learning_rate": "0.0001",
        "ss_training_started_at": "1700000000.25",
        "modelspec.architecture": "flux-1-dev/lora",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux",
        "modelspec.resolution": "768x512",
        "modelspec.date": "2023-11-14T23:13:20+00:00",
        "modelspec.trigger_phrase": "zqx",
        "modelspec.title": "Zqx",
    }
    assert {key: metadata[key] for key in expected} == expected
    assert json.loads(metadata["ss_dataset_dirs"]) == {
        "zqx": {"n_repeats": 10, "img_count": 24},
        "zqx 2": {"n_repeats": 1, "img_count": 5},
    }
    assert json.loads(metadata["ss_tag_frequency"])["zqx"]["a red \N{CAT FACE}"] == 3
    assert json.loads(metadata["ss_bucket_info"])["buckets"]["1"] == {"resolution": [768, 512], "count": 240}
    assert json.loads(metadata["ss_network_args"]) == {}


def test_metadata_is_text_repeatable_and_has_no_paths():
    metadata = lora_metadata(**ARGUMENTS)
    assert metadata == lora_metadata(**ARGUMENTS)
    assert all(isinstance(value, str) and "someone" not in value for value in metadata.values())


def test_no_trigger_means_no_trigger_phrase():
    metadata = lora_metadata(**ARGUMENTS | {"trigger": None, "variant": "schnell"})
    assert "modelspec.trigger_phrase" not in metadata
    assert metadata["modelspec.architecture"] == "flux-1-schnell/lora"


def test_hashes_are_those_of_the_librarys_file():
    """Sizes around the legacy hash's window of 0x100000 to 0x110000: before, across and beyond it."""
    for count in (10, (1 << 20) + 5_000, 3 << 20):
        tensors = {"z": torch.randint(0, 256, (count,), dtype=torch.uint8), "a": torch.randn(70_000)}
        data = save(tensors, {"ss_steps": "7"})
        start = 8 + int.from_bytes(data[:8], "little")
        assert sshs_hashes(tensors, {"ss_steps": "7", "modelspec.title": "x"}) == {
            "sshs_model_hash": hashlib.sha256(data[start:]).hexdigest(),
            "sshs_legacy_hash": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8],
        }
