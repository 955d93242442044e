"""A LoRA's metadata says in sd-scripts' keys what was minimized, and at which timesteps."""

from __future__ import annotations

import pytest

from fluxq.config import TrainingConfig
from fluxq.training.describe import objective_metadata


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
    ],
)
def test_metadata_has_what_the_objective_uses(training, said):
    assert objective_metadata(training) == said
