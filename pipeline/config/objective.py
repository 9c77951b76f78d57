"""What a training run learns."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.config.base import Fraction, Positive, Section

_OWN: dict[str, dict[str, Any]] = {
    "rectified_flow": {"prediction": "velocity", "timesteps": "logit_normal", "weighting": "none"},
    "ddpm": {"prediction": "epsilon", "timesteps": "uniform", "weighting": "none", "schedule": "scaled_linear"},
    "edm": {"prediction": "edm", "timesteps": "log_normal", "weighting": "edm"},
    "logit_normal": {"timestep_mean": 0.0, "timestep_std": 1.0},
    "log_normal": {"timestep_mean": -0.5, "timestep_std": 1.2},
    "min_snr": {"weighting_parameter": 5.0},
    "soft_min_snr": {"weighting_parameter": 4.0},
    "p2": {"weighting_parameter": 1.0},
}
"""What a choice brings along where the run file says nothing, or null. EDM's P_mean of -1.2 is for data of standard
deviation 0.5; for whitened latents, of 1, it is ln 2 more."""

_SHAPES = {"timestep_mean", "timestep_std"}  # whoever gives one has chosen a distribution that has it
_PREDICTIONS = {"rectified_flow": ("velocity", "x0"), "ddpm": ("epsilon", "v", "x0"), "edm": ("edm",)}
_TIMESTEPS = {
    "rectified_flow": ("logit_normal", "uniform"),
    "ddpm": ("uniform", "logit_normal"),
    "edm": ("log_normal",),
}
_WEIGHTINGS = {
    "rectified_flow": ("none", "p2"),
    "ddpm": ("none", "min_snr", "soft_min_snr", "p2"),
    "edm": ("edm", "min_snr", "soft_min_snr", "p2"),
}


class ObjectiveConfig(Section):
    """What the UNet learns, by default rectified flow at logit-normal times. Papers: docs/objectives.md."""

    kind: Literal["rectified_flow", "ddpm", "edm"] = "rectified_flow"
    prediction: Literal["velocity", "epsilon", "v", "x0", "edm"] = Field(
        "velocity", description="what the network says; null = the kind's own: velocity, epsilon, edm"
    )
    schedule: Literal["linear", "scaled_linear", "cosine"] | None = Field(
        None, description="of ddpm; null = scaled_linear, which Stable Diffusion has"
    )
    zero_terminal_snr: bool = Field(False, description="of ddpm: the last step is pure noise")
    timesteps: Literal["uniform", "logit_normal", "log_normal"] = Field(
        "logit_normal",
        description="distribution; null = the kind's own: logit_normal (uniform for x0), uniform, log_normal",
    )
    timestep_mean: float | None = Field(
        None, description="of logit(t), null = 0; or of ln(sigma) in log_normal, null = -0.5"
    )
    timestep_std: Positive | None = Field(None, description="likewise; null = 1, in log_normal 1.2")
    stratified: bool = Field(False, description="spread the times of every global batch evenly over their distribution")
    weighting: Literal["none", "min_snr", "soft_min_snr", "p2", "edm"] = Field(
        "none", description="of the noise levels; null = the kind's own: none, none, edm"
    )
    weighting_parameter: Positive | None = Field(
        None, description="gamma of the weighting; null = 5 in min_snr, 4 in soft_min_snr, 1 in p2"
    )
    offset_noise: float = Field(
        0.0, ge=0, description="of ddpm: scale of noise that is the same over a channel; 0 = off"
    )
    caption_dropout: Fraction = Field(0.1, description="share of captions replaced by the empty one, for guidance")
    dropout_by_tower: bool = Field(False, description="each text tower's captions are dropped apart from the others'")

    @model_validator(mode="before")
    @classmethod
    def _what_belongs_together(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        fields = {name: value for name, value in given.items() if value is not None}
        kind = str(fields.get("kind", "rectified_flow"))
        if kind == "rectified_flow" and fields.get("prediction") == "x0" and not fields.keys() & _SHAPES:
            fields = {"timesteps": "uniform"} | fields  # few logit-normal times are near clean data, where x0 counts
        fields = _OWN.get(kind, {}) | fields
        for choice in ("timesteps", "weighting"):
            fields = _OWN.get(str(fields.get(choice)), {}) | fields
        return fields

    @model_validator(mode="after")
    def _no_contradiction(self) -> ObjectiveConfig:
        if self.kind == "rectified_flow" and self.weighting in ("min_snr", "soft_min_snr"):
            raise ValueError(
                f"weighting: {self.weighting} hardly weighs the noise end of kind=rectified_flow, where sampling begins"
                " and decides what it is to be; set none or p2, or choose times by timestep_mean"
            )
        for field, allowed in (("prediction", _PREDICTIONS), ("timesteps", _TIMESTEPS), ("weighting", _WEIGHTINGS)):
            value, fitting = getattr(self, field), allowed[self.kind]
            if value not in fitting:
                raise ValueError(f"{field}: {value} does not go with kind={self.kind}; set {' or '.join(fitting)}")
        self._only_of_ddpm()
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError(
                "prediction: epsilon says nothing of the data at the last step of zero_terminal_snr=true; set v or x0"
            )
        if self.zero_terminal_snr and self.weighting != "none":
            raise ValueError(
                f"weighting: {self.weighting} gives the last step of zero_terminal_snr=true weight 0, and it is never"
                " learned; set none"
            )
        if self.zero_terminal_snr and self.offset_noise:
            raise ValueError(
                "offset_noise: sampling from the pure noise of zero_terminal_snr=true has none, and needs none; set 0"
            )
        if self.timesteps == "uniform" and (self.timestep_mean, self.timestep_std) != (None, None):
            raise ValueError("timestep_mean, timestep_std: timesteps=uniform has none; set both to null")
        if self.weighting in ("none", "edm") and self.weighting_parameter is not None:
            raise ValueError(f"weighting_parameter: weighting={self.weighting} has none; set null")
        self._weights_are_bounded()
        return self

    def _weights_are_bounded(self) -> None:
        # Choi et al. 2022 weigh epsilon, by 1 / (1 + SNR)^gamma; of x0 that is t^(2 gamma - 2) near the flow's t = 0
        gamma = self.weighting_parameter
        if (self.kind, self.prediction, self.weighting) == ("rectified_flow", "x0", "p2") and gamma and gamma < 1:
            raise ValueError(
                f"weighting_parameter: {gamma:g}, but below 1 p2 weighs x0 without bound towards clean data on"
                " kind=rectified_flow; set 1 or more, or prediction to velocity"
            )

    def _only_of_ddpm(self) -> None:
        if self.kind == "ddpm":
            return
        if self.schedule:
            raise ValueError(f"schedule: {self.schedule} is of kind=ddpm, not of {self.kind}; set null")
        if self.zero_terminal_snr:
            raise ValueError(f"zero_terminal_snr: kind={self.kind} ends in noise as it is; set false")
        if self.offset_noise:
            raise ValueError(
                f"offset_noise: is for ddpm, whose last step is not pure noise; kind={self.kind} ends in noise: set 0"
            )
