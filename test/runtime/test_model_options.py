"""Cameras, pictures, frames, waypoints and the bridge change by configuration alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

from spanvla_ros.model.config import (  # noqa: E402
    CameraSpec,
    ModelConfig,
    dump_config,
    parse_config,
)
from spanvla_ros.model.flow import Normalization  # noqa: E402
from spanvla_ros.model.policy import new_policy  # noqa: E402
from spanvla_ros.model.prompt import build_tokenizer, prompt_length  # noqa: E402
from spanvla_ros.runtime.observations import ObservationBuilder  # noqa: E402
from spanvla_ros.runtime.planner import Planner  # noqa: E402
from spanvla_ros.runtime.torch_ import TorchBackend  # noqa: E402
from spanvla_ros.types import CameraFrame, EgoState, Route  # noqa: E402

NAMES = ('front', 'front_left', 'front_right', 'back', 'back_left', 'back_right')
NOW_NS = 10_000_000_000


def config_of(cameras=3, width=112, height=56, **settings):
    specs = tuple(
        CameraSpec(name, width, height, 60.0, 1.5, 0.0, 1.5, 60.0 * index)
        for index, name in enumerate(NAMES[:cameras])
    )
    config = replace(ModelConfig(), cameras=specs, **settings)
    config = replace(config, prompt_tokens=prompt_length(config, build_tokenizer()))
    # What a file can say is what can be built.
    assert parse_config(dump_config(config)) == config
    return config


def observed(config, seed=0):
    """An observation of moving random pictures, built as on board."""
    rng = np.random.default_rng(seed)
    builder = ObservationBuilder(config)
    for tick in range(31):
        at_ns = NOW_NS - (30 - tick) * 100_000_000
        builder.add_ego(EgoState(at_ns, 0.5 * tick, 0.0, 0.0, 5.0))
        if tick % 5 == 0:
            for name in config.camera_names:
                shape = (config.height_px, config.width_px, 3)
                builder.add_frame(
                    CameraFrame(name, at_ns, rng.integers(0, 255, shape, dtype=np.uint8))
                )
    points = np.stack([np.arange(0.0, 200.0, 5.0), np.zeros(40)], -1)
    builder.set_route(Route(NOW_NS, 'odom', points))
    return builder.build(NOW_NS)


def planner_of(config):
    policy = new_policy(config, seed=1)
    with torch.no_grad():
        for weight in policy.expert.parameters():
            weight.add_(torch.randn(weight.shape) * 0.05)
    policy.normalization = Normalization('history', np.ones((config.waypoints, 3)))
    return Planner(TorchBackend(policy), policy.layout, policy.normalization, schedule='off')


@pytest.mark.parametrize(
    ('settings', 'blocks'),
    [
        ({'interval': 1}, 5),
        ({'interval': 2, 'expert_width': 40}, 3),
        ({'interval': 4, 'expert_width': 264}, 2),
        ({'interval': 0}, 1),
        ({'cameras': 1}, 3),
        ({'cameras': 6}, 3),
        ({'width': 224, 'height': 84}, 3),
        ({'width': 28, 'height': 140, 'cameras': 1}, 3),
        ({'waypoints': 50}, 3),
        ({'frames_per_camera': 2}, 3),
        ({'frames_per_camera': 4, 'cameras': 1, 'frame_lag_s': 0.5}, 3),
    ],
)
def test_an_option_changes_the_whole_way_from_pictures_to_waypoints(settings, blocks):
    config = config_of(**settings)
    planner = planner_of(config)
    expert = planner.backend._modules['step'].expert
    assert len(expert.blocks) == blocks
    assert expert.blocks[0].qkv.in_features == config.expert_width
    seen = observed(config)
    assert seen.degraded == ()
    stamps = [[frame.stamp_ns for frame in camera] for camera in seen.frames]
    lags_ns = [500_000_000 * k for k in range(config.frames_per_camera - 1, -1, -1)]
    assert stamps == [[NOW_NS - lag_ns for lag_ns in lags_ns]] * len(config.cameras)
    plan = planner.plan(seen)
    assert plan.trajectory.poses.shape == (config.waypoints, 3)
    np.testing.assert_allclose(plan.trajectory.times_s[-1], 5.0)
    assert planner.pictures_encoded == len(config.cameras) * config.frames_per_camera
    # Every picture counts, the oldest of the last camera too.
    camera = seen.frames[-1]
    other = replace(camera[0], stamp_ns=camera[0].stamp_ns + 1, image=255 - camera[0].image)
    changed = replace(seen, frames=(*seen.frames[:-1], (other, *camera[1:])))
    assert not np.array_equal(planner.plan(changed).trajectory.poses, plan.trajectory.poses)
    # One that is missing is masked, so what stands in its place does not.
    ids, valid = planner.layout.encode(
        replace(seen, frames=(*seen.frames[:-1], (None, *camera[1:])))
    )
    images = planner.layout.image_positions
    last = len(images) - config.frames_per_camera * config.image_tokens
    assert not valid[images[last : last + config.image_tokens]].any()
    assert valid[images].sum() == len(images) - config.image_tokens
    assert len(ids) == config.prompt_tokens


def test_with_several_frames_only_new_pictures_are_encoded():
    config = config_of(cameras=1, frames_per_camera=4)
    planner = planner_of(config)
    seen = observed(config)
    planner.plan(seen)
    assert planner.pictures_encoded == 4
    # Half a second on, three of the four pictures have been seen.
    frames = seen.frames[0]
    new = replace(frames[-1], stamp_ns=NOW_NS + 500_000_000)
    later = replace(seen, stamp_ns=new.stamp_ns, frames=((*frames[1:], new),))
    planner.plan(later)
    assert planner.pictures_encoded == 5
