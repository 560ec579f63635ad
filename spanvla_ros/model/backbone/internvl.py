"""InternVL (InternViT and a Qwen or Llama language model), in transformers' own layout.

transformers joins patches only on a square grid, as InternVL cuts pictures into square tiles; here
a whole picture of any rectangle is one tile, joined cell by cell in the same order, and the
learned positions are resampled to its grid as transformers resamples them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import InternVLForConditionalGeneration

from spanvla_ros.model.backbone.decoder import Backbone
from spanvla_ros.model.backbone.pictures import merged, resampled, resampling
from spanvla_ros.model.config import ModelConfig
from spanvla_ros.types import SpanvlaError


class InternVLBackbone(Backbone):
    """The static way through an InternVL network."""

    network_class = InternVLForConditionalGeneration
    pixel_mean = (0.485, 0.456, 0.406)
    pixel_std = (0.229, 0.224, 0.225)

    @staticmethod
    def cell(config: Any) -> tuple[int, int]:
        """Pixels along a patch, patches along a visual token."""
        return config.vision_config.patch_size[0], round(1.0 / config.downsample_ratio)

    @property
    def text(self) -> Any:
        """The language model of the network."""
        return self.network.model.language_model

    @property
    def eyes(self) -> list[nn.Module]:
        """What makes visual tokens of a picture."""
        return [self.network.model.vision_tower, self.network.model.multi_modal_projector]

    @property
    def eye_blocks(self) -> list[nn.Module]:
        """The blocks of the eyes, as they follow one another."""
        return list(self.network.model.vision_tower.encoder.layer)

    def _place_vision(self, config: ModelConfig) -> None:
        whole = self.network.config
        if whole.vision_feature_layer != -1 or whole.vision_feature_select_strategy != 'default':
            raise SpanvlaError(
                'backbone: takes visual features from another layer than the last; only '
                'vision_feature_layer -1 with strategy default is known'
            )
        side = whole.vision_config.image_size[0] // self.patch
        for name, size in (('down', self.rows), ('across', self.columns)):
            self._buffer(name, resampling(side, size, 'bicubic', align_corners=False))

    def vision(self, pixels: Tensor) -> Tensor:
        """Encode pictures `[N, 3, H, W]` in 0..1 to visual tokens `[N, tokens, hidden]`."""
        model = self.network.model
        tower = model.vision_tower
        x = tower.embeddings.patch_embeddings(self._normalized(pixels))
        x = torch.cat([tower.embeddings.cls_token.expand(x.shape[0], -1, -1), x], 1)
        places = tower.embeddings.position_embeddings
        if places is not None:
            grid = resampled(places[0, 1:], self.down, self.across)
            x = x + torch.cat([places[0, :1], grid])
        for layer in self.eye_blocks:
            x = self.call_block(type(layer).forward, layer, x)
        x = tower.layernorm(x)[:, 1:]
        return model.multi_modal_projector(merged(x, self.rows, self.columns, self.merge))
