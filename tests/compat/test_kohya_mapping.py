"""What becomes of sd-scripts' options: fluxq's settings, and a line for each."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from fluxq import nano
from fluxq.caching.folders import scan_data
from fluxq.cli.main import main
from fluxq.cli.options import asked_for
from fluxq.compat.kohya import read_command
from fluxq.compat.kohya.mapping import Read, read_options
from fluxq.compat.kohya.table import TABLE, markdown
from fluxq.config import SamplesConfig, TrainConfig, TrainingConfig
from fluxq.config_files import config_from_dict, read_toml
from fluxq.console import silent
from fluxq.errors import WrongRequest
from fluxq.formats.checkpoint.files import Checkpoint
from fluxq.formats.lora.keys import matrices
from fluxq.model import FluxConfig
from fluxq.model.lora import targeted
from fluxq.models import Models
from fluxq.training.asked import refuse_without_effect
from fluxq.training.defaults import epoch_of
from fluxq.training.libraries import Library

DOCS = Path(__file__).parent.parent.parent / "docs" / "kohya.md"
NETWORK = ["--network_module=networks.lora_flux", "--network_train_unet_only"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: photos/ with two images, d.toml, which names it, and nano's files in models/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for i in range(2):
        Image.new("RGB", (96, 96), (90 * i, 90, 200)).save(tmp_path / f"photos/{i}.png")
        (tmp_path / f"photos/{i}.txt").write_text(f"zqx {i}\nnot this line\n")
    (tmp_path / "d.toml").write_text(
        '[[datasets]]\nresolution = 96\nbucket_reso_steps = 16\n[[datasets.subsets]]\nimage_dir = "photos"\n'
    )
    (tmp_path / "models").symlink_to(nano.WEIGHTS)
    return tmp_path


MODELS = [
    "--pretrained_model_name_or_path=models/flux1-nano.safetensors",
    *(f"--{name}=models/{name}.safetensors" for name in ("clip_l", "t5xxl", "ae")),
]
DATA = ["--dataset_config=d.toml", "--output_dir=out"]


def read(*argv: str) -> Read:
    return read_options(read_command([*MODELS, *DATA, *NETWORK, *argv]))


def config(*argv: str) -> TrainConfig:
    found = read(*argv)
    assert found.config, found.refused
    return found.config


def test_every_row_says_one_thing_and_names_settings_that_exist():
    keys = {
        f"{section.name}.{f.name}"
        for section in dataclasses.fields(TrainConfig)
        for f in dataclasses.fields(getattr(TrainConfig(), section.name))
    }
    for row in TABLE:
        assert sum(map(bool, (row.to, row.ignored, row.refused))) == 1, row.name
        assert all(key in keys for key in row.to.split(", ") if "." in key), row.to
    assert len({row.name for row in TABLE}) == len(TABLE)


def test_the_page_has_the_table():
    assert markdown() in DOCS.read_text(encoding="utf-8"), (
        "write markdown() of compat/kohya/table.py into docs/kohya.md"
    )


def test_defaults_keep_their_meaning_and_what_is_wrong_for_flux_is_said(folder):
    found = read()
    training = found.config.training
    assert (training.timesteps, training.shift, training.prediction) == ("sigma", 3.0, "sigma_scaled")
    assert (training.guidance, training.learning_rate, training.steps, training.epochs) == (3.5, 2e-6, 1600, None)
    assert (training.optimizer, training.weight_decay, training.clip) == ("adamw", 0.01, 1.0)
    assert (found.config.lora.rank, found.config.lora.alpha, found.config.lora.text_encoder) == (4, 1.0, None)
    assert (found.config.output.name, found.config.output.save_every) == ("last", 0)
    said = "\n".join(found.lines)
    for words in ("sigma kept, but", "sigma_scaled kept, but", "3.5 kept, but"):
        assert words in said


def test_a_usual_command_becomes_settings(folder):
    """After fluxgym's for 12 GB."""
    found = config(
        *["--fp8_base", "--highvram", "--network_dim", "4", "--learning_rate", "8e-4", "--seed", "42", "--split_mode"],
        *["--optimizer_type", "adafactor", "--optimizer_args", "relative_step=False", "scale_parameter=False"],
        *["warmup_init=False", "--lr_scheduler", "constant_with_warmup", "--max_grad_norm", "0.0", "--sdpa"],
        *["--network_args", "train_blocks=single", "--max_train_epochs", "16", "--save_every_n_epochs", "4"],
        *["--save_last_n_epochs", "2", "--timestep_sampling", "shift", "--discrete_flow_shift", "3.1582"],
        *["--model_prediction_type", "raw", "--guidance_scale", "1", "--loss_type", "l2", "--lr_warmup_steps", "5"],
    )
    training, output = found.training, found.output
    assert (training.timesteps, training.shift, training.prediction, training.guidance) == ("shift", 3.1582, "raw", 1)
    assert (training.optimizer, training.weight_decay, training.clip) == ("adafactor", 0, 0)
    assert training.optimizer_args == ("scale_parameter=False",)
    assert (training.schedule, training.warmup, training.epochs, training.seed) == ("constant", 5, 16, 42)
    assert (output.save_every_epochs, output.numbering, output.keep) == (4, "epoch", 2)
    assert found.model.format == "fp8" and found.memory.blocks_to_swap == 18
    assert found.lora.targets == (r"single_blocks\.\d+\..*",)


LAYERS = list(matrices(FluxConfig.dev()))


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ([], 19 * 10 + 38 * 3),
        (["train_blocks=single"], 38 * 3),
        (["train_blocks=double", "img_mod_dim=0", "txt_mod_dim=0"], 19 * 8),
        (["train_double_block_indices=none", "train_single_block_indices=0,3-5"], 4 * 3),
        (["single_mod_dim=0", "img_mlp_dim=0", "txt_attn_dim=6"], 19 * 8 + 38 * 2),
        (["in_dims=[8,0,8,0,8]", "train_blocks=single"], 1 + 2 + 1 + 38 * 3),
        (["conv_dim=4", "verbose=True", "split_qkv=False"], 19 * 10 + 38 * 3),
    ],
)
def test_network_args_choose_the_layers(folder, arguments, count):
    targets = config("--network_dim=8", "--network_args", *arguments).lora.targets
    assert len(targeted(LAYERS, targets)) == count


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        (["single_dim=4", "txt_mod_dim=2"], {8: 19 * 9 + 38, 4: 38 * 2, 2: 19}),
        (["in_dims=[4,0,0,0,8]"], {8: 19 * 10 + 38 * 3 + 1, 4: 1}),
        (["network_reg_dims=single_blocks_3_=4,img_attn=2"], {8: 19 * 8 + 37 * 3, 4: 3, 2: 19 * 2}),
    ],
)
def test_layers_have_the_ranks_of_their_types_and_names_and_one_alpha(folder, arguments, sizes):
    lora = config("--network_dim=8", "--network_alpha=3", "--network_args", *arguments).lora
    layers = lora.adapted().layers(LAYERS)
    assert Counter(size.rank for size in layers.values()) == sizes
    assert {size.alpha for size in layers.values()} == {3.0}


def test_variants_of_lora_become_settings(folder):
    lora = config(
        *["--scale_weight_norms=1.5", "--network_dropout=0.3"],
        *["--network_args", "rank_dropout=0.1", "module_dropout=0.2", "loraplus_lr_ratio=4"],
    ).lora
    assert lora.inner_dropout == 0.3
    assert (lora.max_norm, lora.rank_dropout, lora.module_dropout, lora.plus_ratio) == (1.5, 0.1, 0.2, 4)
    different = ["--network_args", "loraplus_lr_ratio=4", "loraplus_unet_lr_ratio=8"]
    assert config(*different).lora.plus_ratio == 8
    assert config("--network_args", "loraplus_unet_lr_ratio=0").lora.plus_ratio == 1
    both = read_options(read_command([*MODELS, *DATA, NETWORK[0], *different]))
    assert "have one ratio" in both.refused


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--network_args", "network_reg_lrs=a=1"], "one learning rate"),
        (["--network_args", "network_reg_dims=single=8", "single_dim=4"], "network_reg_dims is read without"),
        (["--network_args", "network_reg_dims=single"], "must be REGEX=RANK"),
        (["--network_args", "train_single_block_indices=38"], "not among 0 to 37"),
        (["--network_args", "split_qkv=True"], "split_qkv"),
        (["--network_args", "who=1"], "no argument who"),
        (["--network_args", "train_blocks=double", "train_double_block_indices=none"], "no layer is left"),
        (["--network_module", "lycoris.kohya"], "lycoris.kohya is not read"),
        (["--model_type", "chroma"], "Chroma"),
        (["--use_8bit_adam", "--optimizer_type", "Lion"], "it contradicts --optimizer_type Lion"),
        (["--blocks_to_swap", "8", "--cpu_offload_checkpointing"], "it contradicts --blocks_to_swap"),
        (["--save_every_n_steps", "8", "--save_every_n_epochs", "1"], "keep one of them"),
        (["--lr_warmup_steps", "8"], "use constant_with_warmup"),
        (["--optimizer_type", "Adafactor"], "add relative_step=False"),
        (["--lr_scheduler", "piecewise_constant"], "is not read"),
        (["--lr_scheduler", "wsd"], "wsd is not read; use one of constant, "),
        (["--lr_scheduler=warmup_stable_decay", "--lr_decay_steps=0.2", "--max_train_steps=0"], "do not fit"),
        (["--lr_scheduler=warmup_stable_decay", "--lr_decay_steps=9", "--max_train_epochs=2"], "as shares of all"),
        (
            ["--lr_scheduler=warmup_stable_decay", "--lr_decay_steps=0.9", "--lr_warmup_steps=0.2"],
            "do not fit into all steps",
        ),
        (["--dim_from_weights"], "needs --network_weights"),
        (
            ["--dim_from_weights", "--network_weights=models/ae.safetensors", "--network_args", "img_attn_dim=4"],
            "not read with --dim_from_weights",
        ),
        (["--network_args", "loraplus_lr_ratio=0"], "a ratio of 0"),
        (["--base_weights_multiplier", "1"], "more of them"),
        (["--optimizer_type=prodigy", "--network_args", "loraplus_lr_ratio=16"], "two learning rates"),
        (["--caption_extension", ".cap"], "not .cap"),
        (["--secondary_separator", ";"], "second separator"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(folder, argv, said):
    found = read(*argv)
    assert found.config is None and said in found.refused
    assert any(line.startswith("refused: --") and said in line for line in found.lines)


def test_the_largest_norm_contradicts_an_optimizer_that_averages(folder, monkeypatch):
    monkeypatch.setattr(Library, "averages", lambda self: True)
    asked = ["--optimizer_type=AdamWScheduleFree", "--scale_weight_norms=1"]
    assert "averages the weights itself; leave lora.max_norm out" in read(*asked).refused
    assert config(asked[0]).lora.max_norm == 0


def test_a_huber_loss_needs_another_schedule_than_the_default(folder):
    with pytest.raises(WrongRequest, match="--huber_schedule constant"):
        read("--loss_type", "huber")
    training = config("--loss_type", "huber", "--huber_schedule", "exponential", "--huber_scale", "2").training
    assert (training.loss, training.huber_schedule, training.huber_scale) == ("huber", "exponential", 2)


def test_weights_count_only_with_sigma_scaled(folder):
    assert config("--weighting_scheme", "cosmap").training.weighting == "cosmap"
    assert config("--weighting_scheme", "cosmap", "--model_prediction_type", "raw").training.weighting == "none"
    assert config("--weighting_scheme", "mode").training.timesteps == "mode"


def test_clip_trains_unless_it_is_told_not_to(folder):
    found = read_options(
        read_command([*MODELS, *DATA, NETWORK[0], "--learning_rate=1e-4", "--text_encoder_lr", "5e-5"])
    )
    assert (found.config.lora.text_encoder, found.config.training.text_learning_rate) == ("clip_l", 5e-5)
    none = read_options(read_command([*MODELS, *DATA, NETWORK[0], "--text_encoder_lr", "0", "0"]))
    assert none.config.lora.text_encoder is none.config.training.text_learning_rate is None


@pytest.mark.parametrize(
    ("argv", "ours"),
    [
        ([], ("adamw", 0.01, ())),
        (["--optimizer_type=AdamW8bit", "--optimizer_args", "weight_decay=0.1", "betas=(0.9,0.99)"],
         ("adamw8bit", 0.1, ("betas=(0.9, 0.99)",))),
        (["--use_lion_optimizer"], ("lion_pytorch.Lion", 0.0, ())),
        (["--optimizer_type=prodigy", "--optimizer_args", "decouple=True", "d_coef=2"],
         ("prodigy", 0.0, ("weight_decouple=True", "d_coef=2"))),
        (["--optimizer_type=SGDNesterov"], ("torch.optim.SGD", 0.0, ("nesterov=True", "momentum=0.9"))),
        (["--optimizer_type=pytorch_optimizer.CAME"], ("pytorch_optimizer.CAME", 0.0, ())),
        (["--optimizer_type=NAdam"], ("torch.optim.NAdam", 0.0, ())),
        (["--optimizer_type=AdamWScheduleFree", "--lr_scheduler=cosine"], ("schedulefree.AdamWScheduleFree", 0.0, ())),
        (["--optimizer_type=RAdamScheduleFree"], ("schedulefree.RAdamScheduleFree", 0.0, ())),
    ],
)  # fmt: skip
def test_optimizers_are_those_of_the_same_library(folder, argv, ours):
    training = config(*argv).training
    assert (training.optimizer, training.weight_decay, training.optimizer_args) == ours
    assert training.schedule == "constant"


@pytest.mark.parametrize(
    ("argv", "ours"),
    [
        (["cosine_with_restarts", "--lr_scheduler_num_cycles=3"], {"schedule": "cosine", "schedule_cycles": 3}),
        (["polynomial"], {"schedule": "polynomial", "schedule_power": 1.0}),
        (["cosine_with_min_lr", "--lr_scheduler_min_lr_ratio=0.1"], {"schedule": "cosine", "schedule_floor": 0.1}),
        (["linear", "--lr_warmup_steps=10%"], {"schedule": "linear", "warmup": 0.1}),
        (["warmup_stable_decay", "--lr_warmup_steps=3"], {"schedule": "constant", "warmup": 3}),
        (
            ["warmup_stable_decay", "--lr_decay_steps=0.2", "--lr_warmup_steps=0.2", "--lr_scheduler_min_lr_ratio=0.1"],
            {"schedule": "wsd", "schedule_decay": 0.25, "warmup": 0.2, "schedule_floor": 0.1},
        ),
        (
            ["warmup_stable_decay", "--lr_decay_steps=20", "--lr_warmup_steps=60%", "--max_train_steps=100"],
            {"schedule": "wsd", "schedule_decay": 0.5, "warmup": 0.6},
        ),
        (
            ["warmup_stable_decay", "--lr_decay_steps=0.2", "--max_train_epochs=2"],
            {"schedule": "wsd", "schedule_decay": 0.2},
        ),
    ],
)
def test_schedules_are_the_same_curves(folder, argv, ours):
    training = dataclasses.asdict(config("--lr_scheduler", *argv).training)
    assert ours.items() <= training.items()


def test_datasets_become_folders(folder):
    (folder / "masks").mkdir()
    (folder / "d.toml").write_text(
        """
        [general]
        enable_bucket = true
        min_bucket_reso = 64
        max_bucket_reso = 128
        bucket_reso_steps = 32
        caption_extension = ".txt"
        keep_tokens = 1
        [[datasets]]
        resolution = [96, 64]
        batch_size = 2
          [[datasets.subsets]]
          image_dir = "photos"
          num_repeats = 3
          class_tokens = "zqx man"
          shuffle_caption = true
          flip_aug = true
          [[datasets.subsets]]
          image_dir = "photos"
        [[datasets]]
        resolution = 64
          [[datasets.subsets]]
          image_dir = "photos"
          is_reg = true
          alpha_mask = true
          caption_dropout_rate = 0.1
        """
    )
    found = read("--prior_loss_weight=0.5", "--train_batch_size=4")
    data = found.config.data
    assert (data.step, data.min_side, data.max_side, data.upscale) == (32, 64, 128, True)
    first, second = data.folders
    assert (first.resolution, first.batch, first.repeats, first.class_tokens) == (((96, 64),), 2, 3, "zqx man")
    assert (first.shuffle_tags, first.keep_tokens, first.flip, first.caption_line) == (True, 1, True, "first")
    assert (second.resolution, second.batch, second.regularization, second.prior_weight) == (64, 4, True, 0.5)
    assert (second.masks, second.caption_dropout, second.keep_tokens) == ("alpha", 0.1, 0)
    assert any("is there twice" in line for line in found.lines)
    (folder / "d.toml").write_text(
        '[[datasets]]\nresolution = 96\n[[datasets.subsets]]\nimage_dir = "photos"\nconditioning_data_dir = "masks"\n'
    )
    (only,) = config("--masked_loss").data.folders
    assert only.masks == "masks"


def test_a_share_of_the_images_is_held_out(folder):
    asked = ["--validation_split=0.1", "--validate_every_n_steps=50"]
    found = read(*asked, "--validation_seed=3")
    assert (found.config.data.validation_split, found.config.training.validate_every) == (0.1, 50)
    assert any("not by --validation_seed" in line for line in found.lines)
    assert config(asked[1]).training.validate_every is None
    for argv, said in (
        (["--validation_split=0.6"], "0 to 0.5"),
        ([asked[0], "--validate_every_n_epochs=1"], "times the"),
    ):
        assert said in read(*argv).refused
    text = (folder / "d.toml").read_text()
    (folder / "d.toml").write_text(text.replace("resolution", "validation_split = 0.2\nresolution"))
    assert config(asked[0]).data.validation_split == 0.2
    (folder / "d.toml").write_text((folder / "d.toml").read_text() + text)
    assert "one share of all" in read(asked[0]).refused


SIZES = [(96, 96), (96, 128), (200, 100), (64, 300), (97, 131), (500, 500), (40, 40)]


def bucket_of(width: int, height: int, area: int, low: int, high: int, step: int) -> tuple[int, int]:
    """sd-scripts' rule: the square, and for each side the longest other one; the nearest in width / height."""
    square = int(area**0.5) // step * step
    table = {(square, square)}
    for side in range(low, high + 1, step):
        if (other := min(high, area // side // step * step)) >= low:
            table |= {(side, other), (other, side)}
    return min(sorted(table), key=lambda b: abs(b[0] / b[1] - width / height))


@pytest.mark.parametrize(("batch", "repeats"), [(1, 1), (2, 3), (4, 1)])
def test_buckets_and_steps_of_an_epoch_follow_its_rule(folder, batch, repeats):
    for path in (folder / "photos").iterdir():
        path.unlink()
    for i, size in enumerate(SIZES):
        Image.new("RGB", size, (9 * i, 0, 0)).save(folder / f"photos/{i}.png")
    (folder / "d.toml").write_text(
        f"""
        [[datasets]]
        resolution = 128
        batch_size = {batch}
        enable_bucket = true
        min_bucket_reso = 64
        max_bucket_reso = 256
        bucket_reso_steps = 32
          [[datasets.subsets]]
          image_dir = "photos"
          class_tokens = "zqx"
          num_repeats = {repeats}
        """
    )
    data = config().data
    scanned = scan_data(data)
    wanted = [bucket_of(*size, 128 * 128, 64, 256, 32) for size in SIZES]
    assert [example.bucket for example in scanned.examples] == wanted
    batches = sum(-(-wanted.count(bucket) * repeats // batch) for bucket in set(wanted))
    assert epoch_of(data, scanned, batch).batches == batches


def test_folders_are_found_by_their_names(folder):
    (folder / "all" / "10_zqx man").mkdir(parents=True)
    (folder / "all" / "else").mkdir()
    (folder / "reg" / "1_man").mkdir(parents=True)
    named = ["--train_data_dir=all", "--reg_data_dir=reg", "--resolution=64,64", "--output_dir=out"]
    found = read_options(read_command([*MODELS, *named, *NETWORK]))
    first, second = found.config.data.folders
    assert (first.path, first.repeats, first.class_tokens) == (Path("all/10_zqx man"), 10, "zqx man")
    assert second.regularization and second.class_tokens == "man"
    assert (found.config.data.min_side, found.config.data.max_side) == (64, 64)  # without --enable_bucket
    assert any("else is left out" in line for line in found.lines)


def test_paths_of_another_machine_are_all_listed_and_replaced(folder):
    argv = [*MODELS[1:], "--pretrained_model_name_or_path=D:\\data\\flux1-nano.safetensors", *DATA, *NETWORK]
    missing = read_options(read_command([*argv, "--network_weights=/none/a.safetensors"]))
    assert "D:\\data\\flux1-nano.safetensors, /none/a.safetensors; --map OLD=NEW" in missing.refused
    assert "refused: not on this machine: D:" in missing.lines[-1]
    relative = read_options(
        read_command([*argv, "--network_weights", "models\\ae.safetensors"]), [("D:/data", "models")]
    )
    assert relative.config.lora.from_lora == Path("models/ae.safetensors")
    found = read_options(read_command(argv), [("D:/data", "models")])
    assert found.config.model.flux == Path("models/flux1-nano.safetensors")


def test_prompts_become_those_of_previews(folder):
    (folder / "p.txt").write_text("a zqx --w 70 --h 32 --d 3 --s 9 --l 2 --g 4 --n bad\nanother --w 64\n")
    found = read("--sample_prompts=p.txt", "--sample_every_n_epochs=2", "--sample_every_n_steps=5")
    assert found.config.samples == SamplesConfig(
        prompts=("a zqx", "another"), width=64, height=64, steps=9, guidance=4.0, cfg=2.0, negative="bad", seed=3,
        every_epochs=2,
    )  # fmt: skip
    assert any("previews share" in line for line in found.lines)


def test_unknown_keys_and_wrong_types_of_a_config_file_are_told(folder):
    (folder / "c.toml").write_text("network_dimm = 4\n")
    assert any("did you mean network_dim?" in line for line in read("--config_file=c").lines)
    (folder / "c.toml").write_text('learning_rate = "1e-4"\n')
    with pytest.raises(WrongRequest, match="--learning_rate cannot be '1e-4'"):
        read("--config_file=c")


def test_metadata_go_into_the_file(folder):
    output = config("--training_comment=a=b", "--metadata_author=Me", "--metadata_usage_hint=use it").output
    assert output.metadata == ("ss_training_comment=a=b", "modelspec.author=Me", "modelspec.usage_hint=use it")


def invoke(*argv: str):
    return CliRunner().invoke(main, ["kohya", *argv])


def test_lint_only_reports(folder):
    good = invoke("--lint", *MODELS, *DATA, *NETWORK, "--sdpa", "--max_train_steps", "5")
    assert good.exit_code == 0 and "--sdpa ignored: attention" in good.stdout
    assert "--max_train_steps 5 becomes training.steps = 5" in good.stdout
    bad = invoke("--lint", *MODELS, *DATA, *NETWORK, "--network_train_text_encoder_only")
    assert bad.exit_code == 2 and "refused: --network_train_text_encoder_only" in bad.stdout
    assert invoke().exit_code == invoke("--sdp_a").exit_code == 2
    assert not (folder / "out").exists()


def test_write_config_writes_what_would_be_trained(folder):
    argv = [*MODELS, *DATA, *NETWORK, "--blocks_to_swap=18", "--max_train_steps=5"]
    done = invoke("--write-config", "my.toml", *argv)
    assert done.exit_code == 0, done.stderr
    text = (folder / "my.toml").read_text()
    assert "blocks_to_swap = 3" in text and 'prediction = "sigma_scaled"' in text
    assert "this transformer has only 3" in done.stdout
    values = read_toml(folder / "my.toml")
    config = config_from_dict(values, "my.toml")
    refuse_without_effect(config, Models(config.model, notify=silent), asked_for(folder / "my.toml", (), {}))


@pytest.mark.slow
def test_the_command_of_the_flux_guide_trains_and_saves_ten_epochs(folder):
    """With nano's files; the last epoch is the LoRA without a number, as in sd-scripts."""
    (folder / "train.sh").write_text(
        f"""accelerate launch --num_cpu_threads_per_process 1 flux_train_network.py \\
        {" ".join(MODELS + DATA)} --output_name="my_flux_lora" --save_model_as=safetensors \\
        --network_module=networks.lora --network_dim=16 --network_alpha=1 --learning_rate=1e-4 \\
        --optimizer_type="AdamW8bit" --lr_scheduler="constant" --sdpa --max_train_epochs=10 --save_every_n_epochs=1 \\
        --mixed_precision="fp16" --gradient_checkpointing --guidance_scale=1.0 --timestep_sampling="flux_shift" \\
        --model_prediction_type="raw" --blocks_to_swap=18 --apply_t5_attn_mask --cache_text_encoder_outputs \\
        --cache_latents --metadata_author="Me = I"
        """
    )
    done = invoke("--script", "train.sh")
    assert done.exit_code == 0, done.output
    assert Checkpoint(folder / "out" / "my_flux_lora.safetensors").metadata["modelspec.author"] == "Me = I"
    numbered = [f"my_flux_lora-{epoch:06}.safetensors" for epoch in range(1, 10)]
    assert sorted(path.name for path in (folder / "out").glob("*.safetensors")) == [
        *numbered,
        "my_flux_lora.safetensors",
    ]


def test_training_settings_that_only_sd_scripts_has_are_plain_by_default():
    plain = TrainingConfig()
    assert (plain.prediction, plain.huber_scale, plain.input_noise, plain.input_noise_random) == ("raw", 1, 0, False)
