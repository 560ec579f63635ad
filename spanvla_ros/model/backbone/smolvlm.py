"""SmolVLM (SigLIP and a Llama language model).

transformers joins patches only on a square grid; here any rectangle is joined cell by cell in the
same order. Which learned position a patch takes is asked of transformers once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import SmolVLMForConditionalGeneration

from spanvla_ros.model.backbone.decoder import Backbone
from spanvla_ros.model.backbone.pictures import merged
from spanvla_ros.model.config import ModelConfig


class SmolVLMBackbone(Backbone):
    """The static way through a SmolVLM network."""

    network_class = SmolVLMForConditionalGeneration
    pixel_mean = (0.5, 0.5, 0.5)
    pixel_std = (0.5, 0.5, 0.5)

    @staticmethod
    def cell(config: Any) -> tuple[int, int]:
        """Pixels along a patch, patches along a visual token."""
        return config.vision_config.patch_size, config.scale_factor

    @property
    def text(self) -> Any:
        """The language model of the network."""
        return self.network.model.text_model

    @property
    def eyes(self) -> list[nn.Module]:
        """What makes visual tokens of a picture."""
        return [self.network.model.vision_model, self.network.model.connector]

    @property
    def eye_blocks(self) -> list[nn.Module]:
        """The blocks of the eyes, as they follow one another."""
        return list(self.network.model.vision_model.encoder.layers)

    @torch.no_grad()
    def _place_vision(self, config: ModelConfig) -> None:
        embeddings = self.network.model.vision_model.embeddings
        asked: list[Tensor] = []
        hook = embeddings.position_embedding.register_forward_pre_hook(
            lambda _, inputs: asked.append(inputs[0])
        )
        try:
            embeddings(
                torch.zeros(1, 3, config.height_px, config.width_px),
                torch.ones(1, self.rows, self.columns, dtype=torch.bool),
            )
        finally:
            hook.remove()
        self._buffer('patch_places', asked[0][0])

    def vision(self, pixels: Tensor) -> Tensor:
        """Encode pictures `[N, 3, H, W]` in 0..1 to visual tokens `[N, tokens, hidden]`."""
        model = self.network.model
        tower = model.vision_model
        x = tower.embeddings.patch_embedding(self._normalized(pixels)).flatten(2).transpose(1, 2)
        x = x + tower.embeddings.position_embedding(self.patch_places)
        for layer in self.eye_blocks:
            x = self.call_block(type(layer).forward, layer, x, None)
        x = tower.post_layernorm(x)
        return model.connector.modality_projection(merged(x, self.rows, self.columns, self.merge))
