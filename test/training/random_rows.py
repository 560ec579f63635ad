"""Rows with random content: enough to run every stage, nothing to learn."""

from __future__ import annotations

import numpy as np

from spanvla_ros.model.config import ModelConfig
from spanvla_ros.training.data.shards import TrainingRow, write_shard
from spanvla_ros.types import CameraFrame, EgoState, Observation, Sample

TEXT = 'lead vehicle 15 m braking ; decelerate , keep lane ; because lead vehicle braking'


def random_rows(count, seed, config=None):
    rng = np.random.default_rng(seed)
    config = config or ModelConfig()
    return [_row(index, config, rng) for index in range(count)]


def _row(index, config, rng):
    speed, bend = rng.uniform(0.0, 13.0), rng.normal() * 0.01
    along = speed * config.times_s
    future = np.stack([along, 0.5 * bend * along**2, bend * along], -1)
    future += rng.normal(size=future.shape) * [0.5, 0.1, 0.01]
    behind = speed * config.history_times_s
    coarse = rng.integers(0, 255, (3, 7, 14, 3), dtype=np.uint8)
    pictures = coarse.repeat(16, 1).repeat(16, 2)
    slow = index % 2 == 0
    observation = Observation(
        stamp_ns=10**9,
        frames=tuple(
            (CameraFrame(name, 10**9, picture),)
            for name, picture in zip(config.camera_names, pictures, strict=True)
        ),
        ego=EgoState(10**9, 0.0, 0.0, 0.0, speed),
        history=np.stack([behind, 0 * behind, 0 * behind], -1),
        history_valid=np.ones(config.history_poses, bool),
        route=np.stack([15.0 * np.arange(1, 6), rng.normal(size=5)], -1),
        reasoning=TEXT if slow else '',
    )
    sample = Sample(
        observation=observation,
        future=future,
        scene_id=f'scene {index}',
        family=('lane_keeping', 'pedestrian')[index // 2 % 2],
        reasoning=TEXT if slow else '',
        thinking='slow' if slow else 'fast',
        pair_id=f'pair {index // 2}' if index % 4 < 2 else '',
    )
    facts = (rng.random(14) < 0.3).astype(np.float32)
    return TrainingRow(sample, rng.random((96, 7)) < 0.1, facts)


def write_shards(folder, count, seed, config=None):
    folder.mkdir(parents=True)
    write_shard(folder / 'scenes-0000.parquet', random_rows(count, seed, config))
    return folder
