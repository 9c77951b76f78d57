"""The usual loop, to compare with: fetch, decode, encode and write, one after the other."""

from __future__ import annotations

import numpy as np

from pipeline.config import EncodeConfig
from pipeline.data import images
from pipeline.data.manifest import RECEIPT_SUFFIX
from pipeline.data.samples import ImageSample, read_image_shard
from pipeline.encode.job import EncodesAndDescribes
from pipeline.encode.latent_shard import EncodedSample, LatentShard, SourceIdentity
from pipeline.encode.sources import find_sources
from pipeline.storage import open_store, open_stream


def naive(config: EncodeConfig, encoder: EncodesAndDescribes, shards: int) -> int:
    """Encode the first shards of a job, into the same latent shards; without filters, hold-out, manifest or restart.

    Args:
        config: the job: one resolution, squares.
        encoder: as the job's.
        shards: how many.

    Returns:
        Pictures encoded.
    """
    side = int(config.images.resolutions[0])
    store, pictures = open_store(config.output), 0
    digest = encoder.fingerprint(side).digest()
    for source in find_sources(config)[:shards]:
        with open_stream(source.url) as stream:
            samples = [s for s in read_image_shard(stream) if isinstance(s, ImageSample)]
            while stream.read(1 << 20):
                pass
            identity = SourceIdentity(source.name, stream.bytes_read, stream.sha256(), stream.version)
        shard = LatentShard(source.name, encoder.channels, config.block_samples)
        for first in range(0, len(samples), config.batch_size):
            batch = samples[first : first + config.batch_size]
            whole = [images.decode(sample.image_bytes) for sample in batch]
            pixels = np.stack([images.cover(picture, (side, side)) for picture in whole])
            moments, _ = encoder.start(pixels, False).result()
            for sample, picture, latent in zip(batch, whole, moments, strict=True):
                size = images.size_record(picture.shape[0], picture.shape[1], (side, side))
                text = tuple(encoder.text(sample.captions))
                encoded = EncodedSample(sample.key, sample.captions, (side, side), latent, None, text, size)
                shard.add(encoded, holdout=False)
        data, receipt = shard.finish(source.shard, identity, digest, encoder.environment)
        store.write(receipt.shard, data)
        store.write(receipt.shard + RECEIPT_SUFFIX, receipt.to_bytes())
        pictures += len(samples)
    return pictures
