"""The loss by hand."""

import torch

from pipeline.diffusion.loss import squared_error, weighted_loss


def test_each_sample_has_its_own_error_and_the_loss_is_their_mean() -> None:
    target = torch.zeros(2, 1, 2, 2)
    output = torch.stack([torch.full((1, 2, 2), 2.0), torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])])
    assert squared_error(output, target).tolist() == [4.0, 0.25]
    assert weighted_loss(output, target, torch.ones(len(target))).item() == 2.125


def test_samples_count_by_their_weights() -> None:
    target, output = torch.zeros(2, 1, 1, 1), torch.tensor([2.0, 3.0]).reshape(2, 1, 1, 1)
    assert weighted_loss(output, target, torch.tensor([2.0, 0.0])).item() == 4.0


def test_the_loss_is_float32_under_mixed_precision() -> None:
    output = torch.full((1, 1, 64, 64), 300.0, dtype=torch.float16)  # 300**2 is past float16's range
    assert weighted_loss(output, torch.zeros(1, 1, 64, 64), torch.ones(1)).item() == 90_000.0
