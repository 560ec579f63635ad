"""Vectors for the tokens that a pretrained network has not met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from spanvla_ros.model.backbone.tiny import number_waves

ROUND_TO = 64


@torch.no_grad()
def grow_vocabulary(
    network: nn.Module,
    new: Sequence[int],
    numbers: Mapping[int, float],
    generator: torch.Generator,
) -> None:
    """Make room for new token ids and draw their vectors like those that are there.

    Marks and actions are drawn around the mean of all vectors with their spread; numbers have
    the same mean and spread along Fourier features of their value, so near numbers start alike.

    Args:
        network: of transformers; its configuration grows along.
        new: ids of the new tokens.
        numbers: value of each number token.
        generator: source of the draw.
    """
    wanted = -(-(max(new) + 1) // ROUND_TO) * ROUND_TO
    known = network.get_input_embeddings().weight.shape[0]
    if wanted > known:
        network.resize_token_embeddings(wanted, mean_resizing=False)
    tables = {id(t): t for t in (network.get_input_embeddings().weight, network.lm_head.weight)}
    fresh = sorted({*new, *range(known, max(wanted, known))})
    old = torch.ones(max(wanted, known), dtype=torch.bool)
    old[fresh] = False
    for table in tables.values():
        mean, spread = table[old].mean(0), table[old].std(0)
        drawn = torch.randn(len(fresh), table.shape[1], generator=generator)
        table[fresh] = mean + spread * drawn
        for token, value in numbers.items():
            table[token] = mean + spread * _waves(value, table.shape[1])


def _waves(value: float, width: int) -> Tensor:
    """Fourier features of a number with unit spread."""
    return 2.0**0.5 * number_waves(value, width)
