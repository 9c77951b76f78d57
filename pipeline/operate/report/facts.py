"""What the demo's report tells: plain, frozen values. A section whose facts are empty is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.data.images import Pixels
from pipeline.operate.report.charts import Chart


@dataclass(frozen=True, kw_only=True)
class RetrievalScores:
    """Do pictures follow their prompts: whose training picture is nearest to the generated one?"""

    top1: float  # share of prompts, 0 to 1, whose own picture is the nearest
    top5: float  # ... is among the nearest five
    candidates: int  # training pictures it is looked for among
    prompts: int


@dataclass(frozen=True, kw_only=True)
class ReconstructionScores:
    """What the autoencoder loses: mean PSNR over held-out pictures, in dB."""

    psnr_db: float
    psnr_nonwhite_db: float  # over pixels that are not white in the original
    pictures: int
    of: str = "held-out pictures"  # which they are


@dataclass(frozen=True)
class CaptionedPicture:
    """A picture of the data set."""

    caption: str
    pixels: Pixels


@dataclass(frozen=True)
class Reconstruction:
    """A picture before and after the autoencoder."""

    caption: str
    original: Pixels
    reconstruction: Pixels
    psnr_db: float | None = None


@dataclass(frozen=True)
class GeneratedPicture:
    """A picture made from a prompt, and the training picture of that caption where there is one."""

    prompt: str
    pixels: Pixels
    training_picture: Pixels | None = None
    rank: int | None = None  # of the training picture among all candidates; 1 = nearest


@dataclass(frozen=True)
class UnseenPicture:
    """A picture for a caption that was never trained on, and the held-out picture that has it."""

    caption: str
    kind: str  # what is new in it, such as "skin tone"
    pixels: Pixels
    true_picture: Pixels
    colour_delta_e: float  # distance of mean colours in CIELAB; 0 = equal
    shape_iou: float  # overlap of the non-white areas, 0 to 1


@dataclass(frozen=True, kw_only=True)
class ReportFacts:
    """All of a report. Texts are plain text; the page escapes them."""

    title: str
    summary: str = ""
    retrieval: RetrievalScores | None = None
    reconstruction: ReconstructionScores | None = None
    wall_seconds: Mapping[str, float] = field(default_factory=dict)  # stage -> seconds, in order of the stages
    peak_rss_bytes: int | None = None  # largest resident memory of all processes together
    images_per_second: Mapping[str, float] = field(default_factory=dict)  # stage -> mean over the stage
    samples: Sequence[CaptionedPicture] = ()
    reconstructions: Sequence[Reconstruction] = ()
    loss_charts: Sequence[Chart] = ()
    throughput_charts: Sequence[Chart] = ()
    generated: Sequence[GeneratedPicture] = ()
    unseen: Sequence[UnseenPicture] = ()
    settings: Mapping[str, str] = field(default_factory=dict)  # stage -> its resolved settings as YAML
    versions: Mapping[str, str] = field(default_factory=dict)  # package -> version
    hardware: Mapping[str, str] = field(default_factory=dict)  # what -> value, such as "CPU cores" -> "2"
    attribution: str = ""
