"""Training-only heads that teach small eyes to see; never part of a graph.

A tower of a million weights trained from scratch on trajectories alone stays blind for thousands
of samples. Asked for each visual token which classes its cell of the picture holds, it learns to
see first, and the facts (gap, lamps, light, pedestrian, lane) follow.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLASSES = 7
FACTS = 14


class PictureHeads(nn.Module):
    """Presence of classes per visual token, facts from attention pooling and from the prompt."""

    def __init__(self, hidden: int, tokens: int, queries: int = 8) -> None:
        """Make the heads for `tokens` visual tokens of width `hidden`."""
        super().__init__()
        self.presence = nn.Linear(hidden, CLASSES)
        self.attention = _AttentionPool(hidden, tokens, queries)
        self.pooled = nn.Sequential(
            nn.Linear(queries * hidden, 128), nn.SiLU(), nn.Linear(128, FACTS)
        )
        self.prompt = nn.Sequential(nn.Linear(hidden, 128), nn.SiLU(), nn.Linear(128, FACTS))

    def forward(self, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Presence logits `[B, n, 7]` and facts `[B, 14]` of visual tokens `[B, n, >= H]`."""
        embeds = embeds[..., : self.presence.in_features]
        return self.presence(embeds), self.pooled(self.attention(embeds))

    def facts_from_prompt(self, hidden: Tensor) -> Tensor:
        """Facts `[B, 14]` read from the hidden state `[B, H]` of the prompt's last token."""
        return self.prompt(hidden)


class _AttentionPool(nn.Module):
    """Pools tokens by learned queries.

    The tower tells only relative places, and nothing of the camera: each token's own place is
    added here, so that where a marking stands can be read off the pooled sum.
    """

    def __init__(self, hidden: int, tokens: int, queries: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(queries, hidden) * 0.1)
        self.place = nn.Parameter(torch.randn(tokens, hidden) * 0.3)
        self.key = nn.Linear(hidden, hidden)

    def forward(self, embeds: Tensor) -> Tensor:
        placed = embeds + self.place
        scores = torch.einsum('qd,bnd->bqn', self.query, self.key(placed))
        weight = torch.softmax(scores.float(), -1).to(embeds.dtype)
        return (weight @ placed).flatten(1)
