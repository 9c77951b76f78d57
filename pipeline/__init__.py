"""Lathe: image shards to latents, latents to text-to-image diffusion models."""

__version__ = "0.1.0"
