"""A model of published sizes with random weights, and every way through it that is timed.

Times of matrix products do not depend on what the weights say, so a model that cannot be shipped
can be timed. Weights are drawn on the device itself, which takes seconds for billions of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spanvla_ros.model.backbone import qwen_network
from spanvla_ros.model.config import CameraSpec, ModelConfig
from spanvla_ros.model.expert import EGO_FEATURES, ActionExpert
from spanvla_ros.model.policy import Policy
from spanvla_ros.model.prompt import PromptLayout, build_tokenizer
from spanvla_ros.runtime.torch_cuda import PRECISIONS, placed
from spanvla_ros.runtime.torch_flow import ExpertFlow, empty_slots, fill_slots

# Two frames of a camera make one temporal grid of Qwen's video.
FRAMES_PER_GRID = 2
TOKEN = 5


@dataclass(frozen=True)
class Size:
    """Sizes of a network by transformers' names, and the model around it.

    `shallow_last` is the last bridged layer of the truncated variant. `config` counts a temporal
    grid as one picture.
    """

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    config: ModelConfig
    shallow_last: int


def _cameras(width_px: int, height_px: int) -> tuple[CameraSpec, ...]:
    yaws = {'front': 0.0, 'front_left': 55.0, 'front_right': -55.0}
    return tuple(
        CameraSpec(name, width_px, height_px, 60.0, 1.5, 0.0, 1.5, yaw)
        for name, yaw in yaws.items()
    )


SIZES = {
    # Qwen2.5-VL-3B; three cameras of four frames are two grids of 140 tokens each: 840 visual
    # tokens and 160 of text. Every third layer is bridged: 12 of 36.
    '3b': Size(
        text={
            'hidden_size': 2048,
            'num_hidden_layers': 36,
            'num_attention_heads': 16,
            'num_key_value_heads': 2,
            'intermediate_size': 11008,
            'vocab_size': 151936,
            'max_position_embeddings': 128000,
            'rope_parameters': {
                'rope_type': 'default',
                'rope_theta': 1e6,
                'mrope_section': [16, 24, 24],
            },
        },
        vision={
            'depth': 32,
            'hidden_size': 1280,
            'num_heads': 16,
            'intermediate_size': 3420,
            'out_hidden_size': 2048,
            'fullatt_block_indexes': [7, 15, 23, 31],
        },
        config=ModelConfig(
            name='3b', cameras=_cameras(392, 280), frames_per_camera=2, waypoints=50, interval=3,
            expert_width=1024, answer_tokens=96, prompt_tokens=1000,
        ),
        shallow_last=18,
    ),
    # The same paths at a size for one CPU core.
    'tiny': Size(
        text={
            'hidden_size': 64,
            'num_hidden_layers': 4,
            'num_attention_heads': 4,
            'num_key_value_heads': 2,
            'intermediate_size': 96,
            'vocab_size': 2048,
            'max_position_embeddings': 1024,
            'rope_parameters': {
                'rope_type': 'default',
                'rope_theta': 1e4,
                'mrope_section': [2, 3, 3],
            },
        },
        vision={
            'depth': 2,
            'hidden_size': 32,
            'num_heads': 2,
            'intermediate_size': 52,
            'out_hidden_size': 64,
            'fullatt_block_indexes': [1],
        },
        config=ModelConfig(
            name='tiny', cameras=_cameras(84, 56), frames_per_camera=2, waypoints=50, interval=1,
            expert_width=48, answer_tokens=64, prompt_tokens=160,
        ),
        shallow_last=2,
    ),
}  # fmt: skip


@torch.no_grad()
def sized_policies(size: Size, device: torch.device, precision: str) -> tuple[Policy, Policy]:
    """A policy of a size and its truncated variant on one network, random in every weight.

    The tower's feed-forward layers are left as they are (`torch_cuda.align_eyes`).
    """
    tokenizer = build_tokenizer(size.config.action_tokens)
    special = tokenizer.get_vocab(with_added_tokens=True)
    layout = PromptLayout(size.config, tokenizer)
    with torch.device(device):
        network = qwen_network(size.text, size.vision, special)
        deep, short = (Policy(size.config, layout, network) for _ in range(2))
        short.backbone.bridged = tuple(range(0, size.shallow_last + 1, size.config.interval))
        short.expert = ActionExpert(
            short.backbone,
            size.config.expert_width,
            size.config.waypoints,
            size.config.sequence_tokens,
        )
    for policy in (deep, short):
        # An untrained expert has zeros, which run faster than numbers do.
        for weight in policy.expert.parameters():
            weight.normal_(0.0, 0.02)
        placed(policy, device, PRECISIONS[precision])
    return deep, short


class Frame:
    """One frame of a policy on fixed buffers: pictures in, state of the flow out."""

    def __init__(self, policy: Policy, device: torch.device, draws: int = 1) -> None:
        """Lay out the buffers, for so many states at once; pictures and prompt are random."""
        config, backbone = policy.config, policy.backbone
        self.policy, self.device = policy, device
        self.kind = backbone.text.norm.weight.dtype
        grids = len(config.cameras) * config.frames_per_camera
        shape = (grids * FRAMES_PER_GRID, config.height_px, config.width_px, 3)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        self.ids = torch.full((1, config.prompt_tokens), TOKEN, device=device)
        self.valid = torch.ones((1, config.prompt_tokens), device=device, dtype=self.kind)
        self.ego = torch.randn((1, EGO_FEATURES), device=device)
        self.start = torch.randn((1, 1, config.waypoints, 3), device=device)
        self.slots = empty_slots(policy, device, self.kind, draws)
        self.flows = ExpertFlow(policy.expert)
        self.embeds = self.see()[0]
        self.prefill()

    def see(self) -> tuple[Tensor]:
        """Visual tokens `[1, n, H]` of the uint8 pictures, two frames to a grid."""
        pixels = self.images.permute(0, 3, 1, 2).float() * (1.0 / 255.0)
        grids = pixels.unflatten(0, (-1, FRAMES_PER_GRID)).mean(1)
        tokens = self.policy.backbone.vision(grids)
        return (tokens.reshape(1, -1, tokens.shape[-1]),)

    def prefill(self) -> tuple[Tensor, ...]:
        """Bridged keys and values of the visual tokens at hand, in their slots."""
        fill_slots(self.policy, self.slots, self.ids, self.embeds, self.valid)
        return self.slots.bridged, self.slots.bias

    def act(self, steps: int, draws: int = 1) -> Any:
        """What runs the flow of so many steps on the cache at hand, `draws` states at once."""
        flow = self.flows.of(self.slots, steps, draws)
        start = self.start.expand(-1, draws, -1, -1).contiguous()
        return lambda: (flow(start, self.ego),)

    def whole(self, steps: int) -> Any:
        """What runs a frame from pictures to the state, all on the device."""
        act = self.act(steps)

        def run() -> tuple[Tensor]:
            embeds = self.see()[0]
            fill_slots(self.policy, self.slots, self.ids, embeds, self.valid)
            state: tuple[Tensor] = act()
            return state

        return run


class Answer:
    """Decoding over one prefilled cache of all layers, keys and values written in place."""

    def __init__(self, frame: Frame) -> None:
        """Prefill the cache."""
        policy = frame.policy
        config, backbone = policy.config, policy.backbone
        self.backbone, self.frame = backbone, frame
        self.prompt, self.room = config.prompt_tokens, config.answer_tokens
        shape = (backbone.layers, 1, backbone.kv_heads, config.sequence_tokens, backbone.head_size)
        self.keys = torch.zeros(shape, device=frame.device, dtype=frame.kind)
        self.values = torch.zeros_like(self.keys)
        self.seen = torch.zeros((1, config.sequence_tokens), device=frame.device, dtype=frame.kind)
        self.token = torch.full((1, 1), TOKEN, device=frame.device)
        self.position = torch.full((1,), self.prompt, device=frame.device)
        self.prefill()

    def prefill(self) -> tuple[Tensor]:
        """The prompt through all layers: the cache, and logits after its last token."""
        frame = self.frame
        prefix = self.backbone.prefill(frame.ids, frame.embeds, frame.valid)
        assert prefix.hidden is not None
        self.keys[:, :, :, : self.prompt].copy_(prefix.keys)
        self.values[:, :, :, : self.prompt].copy_(prefix.values)
        self.seen[:, : self.prompt].copy_(frame.valid)
        return (self.backbone.logits(prefix.hidden[:, -1]),)

    def step(self) -> tuple[Tensor]:
        """One greedy token, fed back; after the last slot the first is written again."""
        backbone, place = self.backbone, self.position
        found = backbone.decode(self.token, place, self.keys, self.values, self.seen)
        assert found.hidden is not None
        self.keys.index_copy_(3, place, found.keys)
        self.values.index_copy_(3, place, found.values)
        self.seen.index_fill_(1, place, 1.0)
        self.token.copy_(backbone.logits(found.hidden[:, 0]).argmax(-1, keepdim=True))
        place.copy_((place + 1 - self.prompt) % self.room + self.prompt)
        return (self.token,)

    def parallel(self, tokens: int) -> Any:
        """What decodes so many tokens in one pass, each from a placeholder."""
        ids = torch.full((1, tokens), TOKEN, device=self.frame.device)
        places = torch.arange(self.prompt, self.prompt + tokens, device=self.frame.device)

        def run() -> tuple[Tensor]:
            found = self.backbone.decode(ids, places, self.keys, self.values, self.seen)
            assert found.hidden is not None
            return (self.backbone.logits(found.hidden).argmax(-1),)

        return run
