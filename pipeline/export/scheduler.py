"""The objective as the config of one of diffusers' schedulers."""

from __future__ import annotations

from typing import Any

from diffusers import DPMSolverMultistepScheduler, EDMDPMSolverMultistepScheduler

from pipeline.config import ObjectiveConfig
from pipeline.diffusion.objective import EPSILON_LOG_SNR, SIGMA_DATA, SIGMA_MAX, SIGMA_MIN
from pipeline.diffusion.path import LINEAR_BETAS, SCALED_LINEAR_BETAS, TABLE_ROWS

_BETAS: dict[str, dict[str, str | float]] = {  # our schedules in diffusers' words
    "linear": {"beta_schedule": "linear", "beta_start": LINEAR_BETAS[0], "beta_end": LINEAR_BETAS[1]},
    "scaled_linear": {
        "beta_schedule": "scaled_linear",
        "beta_start": SCALED_LINEAR_BETAS[0],
        "beta_end": SCALED_LINEAR_BETAS[1],
    },
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
_PREDICTION = {"velocity": "flow_prediction", "epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}


def scheduler_of(objective: ObjectiveConfig) -> DPMSolverMultistepScheduler | EDMDPMSolverMultistepScheduler:
    """DPM-Solver++ on the path that was trained, for what the UNet predicts and the times it is given."""
    if objective.kind == "edm":
        return EDMDPMSolverMultistepScheduler(sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, sigma_data=SIGMA_DATA)
    if objective.kind == "rectified_flow":
        path: dict[str, Any] = {"use_flow_sigmas": True, "flow_shift": 1.0}
    else:
        path = _BETAS[objective.schedule or "scaled_linear"] | {
            "timestep_spacing": "trailing",
            "rescale_betas_zero_snr": objective.zero_terminal_snr,
        }
        if objective.prediction == "epsilon":
            path["lambda_min_clipped"] = EPSILON_LOG_SNR / 2
    return DPMSolverMultistepScheduler(
        num_train_timesteps=TABLE_ROWS,
        prediction_type=_PREDICTION[objective.prediction],
        steps_offset=1,  # without effect here; StableDiffusionPipeline warns of any other value
        **path,
    )
