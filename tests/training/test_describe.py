"""A LoRA's metadata says in sd-scripts' keys what was minimized, and at which timesteps."""

from __future__ import annotations

import pytest

from fluxq.config import LoraConfig, TrainingConfig
from fluxq.training.describe import objective_metadata, variant_metadata


@pytest.mark.parametrize(
    ("training", "said"),
    [
        (
            TrainingConfig(),
            {
                "ss_loss_type": "l2",
                "ss_model_prediction_type": "raw",
                "ss_weighting_scheme": "none",
                "ss_sigmoid_scale": "1.0",
            },
        ),
        (
            TrainingConfig(timesteps="logit_normal", logit_mean=-0.5, min_timestep=0.25),
            {
                "ss_loss_type": "l2",
                "ss_model_prediction_type": "raw",
                "ss_weighting_scheme": "logit_normal",
                "ss_logit_mean": "-0.5",
                "ss_logit_std": "1.0",
                "fluxq_timestep_range": "0.25 to 1",
            },
        ),
        (
            TrainingConfig(
                timesteps="mode",
                weighting="cosmap",
                loss="huber",
                huber_schedule="snr",
                prediction="additive",
                input_noise=0.1,
            ),
            {
                "ss_loss_type": "huber",
                "ss_model_prediction_type": "additive",
                "ss_ip_noise_gamma": "0.1",
                "ss_ip_noise_gamma_random_strength": "False",
                "ss_huber_scale": "1.0",
                "ss_weighting_scheme": "cosmap",
                "ss_huber_c": "0.1",
                "ss_huber_schedule": "snr",
                "ss_mode_scale": "1.29",
            },
        ),
        (
            TrainingConfig(timesteps="uniform", preserve_class="dog", preserve_weight=0.5),
            {
                "ss_loss_type": "l2",
                "ss_model_prediction_type": "raw",
                "ss_weighting_scheme": "none",
                "fluxq_preserve_class": "dog",
                "fluxq_preserve_weight": "0.5",
            },
        ),
    ],
)
def test_metadata_has_what_the_objective_uses(training, said):
    assert objective_metadata(training) == said


def test_variants_of_lora_are_said_as_sd_scripts_says_them_and_what_it_lacks_in_keys_of_its_own():
    assert variant_metadata(LoraConfig()) == {"ss_network_args": "{}"}
    lora = LoraConfig(
        ranks=("mlp=2", "single=6"),
        single_blocks="0-3,5",
        rank_stabilized=True,
        dropout=0.1,
        rank_dropout=0.2,
        inner_dropout=0.3,
        module_dropout=0.0,
        plus_ratio=16.0,
        max_norm=1.0,
    )
    assert variant_metadata(lora) == {
        "ss_network_args": '{"train_single_block_indices": "0-3,5", "rank_dropout": "0.2",'
        ' "loraplus_lr_ratio": "16.0"}',
        "ss_network_dropout": "0.3",
        "ss_scale_weight_norms": "1.0",
        "fluxq_ranks": "mlp=2,single=6",
        "fluxq_rank_stabilized": "True",
        "fluxq_input_dropout": "0.1",
    }
