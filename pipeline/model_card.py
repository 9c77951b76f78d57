"""What an exported pipeline's README.md says: how to use it, what it was trained on, whom the pictures are by."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config import DataSetConfig, ObjectiveConfig


def model_card(
    *,
    resolution: int,
    context_length: int,
    objective: ObjectiveConfig,
    guidance: float,
    steps: int,
    attributions: Sequence[str],
    trained_on: str,
    padding: str = "full",
) -> str:
    """The text of README.md.

    Args:
        resolution: side of the pictures in pixels.
        context_length: tokens of a prompt.
        objective: what was learned.
        guidance: guidance scale to suggest.
        steps: sampler steps to suggest.
        attributions: of each data set, whom its pictures are by, under which licence; "" = not recorded.
        trained_on: what and how long, in a few words.
        padding: of the captions it was trained on, "full" or "trimmed".
    """
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [lathe, stable-diffusion, {objective.kind.replace("_", "-")}]
---

# Text-to-image model, {resolution} x {resolution} pixels

Trained with Lathe (`lathe-ldm`): {trained_on}. To use it, diffusers and transformers are enough.

```python
import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder")
pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
picture = pipeline("your prompt", guidance_scale={guidance:g}, num_inference_steps={steps}).images[0]
picture.save("picture.png")

variant = AutoPipelineForImage2Image.from_pipe(pipeline)(
    "your prompt", image=picture, strength=0.6, guidance_scale={guidance:g}, num_inference_steps={steps}
).images[0]
```

- Prompts are cut after {context_length} tokens, start and end token included.
{_of_padding(padding)}- {_of_schedulers(objective)}
- Latents are brought to their scale by the autoencoder: its `scaling_factor`, or its first and last 1x1 convolution.
- There is no safety checker.

## Licence and attribution

Training pictures:{_sources(attributions)}
"""


def _of_padding(padding: str) -> str:
    """A line on captions that were trained on without their padding, which stock pipelines show the UNet."""
    if padding == "full":
        return ""
    return (
        "- The model was trained without padding behind the prompt: pass `prompt_embeds` cut to the prompt's tokens,"
        " since a plain call shows it the padding, which it does not know.\n"
    )


def training_pictures(samples: Sequence[int], sources: Sequence[DataSetConfig]) -> str:
    """How many pictures of how many data sets, and what part of each, in a few words.

    Args:
        samples: training samples of each whole data set.
        sources: the data sets as the run file names them, in the same order.
    """
    parts = [source.part_in_words for source in sources]
    several = f" of {len(samples)} data sets" if len(samples) > 1 else ""
    whole = f"{sum(samples):,} pictures{several}"
    if not any(parts):
        return whole
    if not several:
        return f"{parts[0]} of {whole}"
    each = [f"{part or 'all'} of {n:,}" for n, part in zip(samples, parts, strict=True)]
    return f"a part of {whole} ({', '.join(each)})"


def _of_schedulers(objective: ObjectiveConfig) -> str:
    """Which schedulers go with the model, in a sentence."""
    if objective.kind == "edm":
        return "The model is preconditioned as EDM: keep the scheduler, or take another of diffusers' EDM ones."
    if objective.kind == "rectified_flow":
        knows = "flow_prediction" if objective.prediction == "velocity" else "sample"
        return (
            "The model is a rectified flow: keep the scheduler, or take another that knows"
            f' `prediction_type="{knows}"` on flow sigmas.'
        )
    return (
        f"The model predicts {objective.prediction} on DDPM's {objective.schedule} schedule: keep the scheduler, or"
        " take another, `from_config(pipeline.scheduler.config)`."
    )


def _sources(attributions: Sequence[str]) -> str:
    """Each attribution once; where there are several, as a list."""
    unknown = "not recorded. Ask whoever trained this model before you publish what it makes."
    told = [attribution.strip() for attribution in attributions]
    distinct = [attribution for attribution in dict.fromkeys(told) if attribution]
    if (missing := told.count("")) == len(told):
        return f" {unknown}"
    lines = [*distinct, f"{missing} of {len(told)} data sets: {unknown}"] if missing else distinct
    if len(lines) == 1:
        return f" {lines[0]}"
    return "\n\n" + "\n".join("- " + line.replace("\n", "\n  ") for line in lines)
