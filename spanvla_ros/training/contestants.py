"""Models opened for evaluation, in this process or in a pool of processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float64, Int64

from spanvla_ros.model.checkpoint import ModelDirectory, load_model_dir
from spanvla_ros.model.config import ModelConfig
from spanvla_ros.model.flow import load_normalization
from spanvla_ros.model.prompt import PromptLayout, load_tokenizer
from spanvla_ros.runtime.backend import open_backend
from spanvla_ros.runtime.planner import Planner
from spanvla_ros.training.closed_loop import Episode, drive
from spanvla_ros.training.data.shards import ShardSet
from spanvla_ros.training.open_loop import mirrored_observation, plan_or_none, plan_rows
from spanvla_ros.types import Observation

Job = TypeVar('Job')
Result = TypeVar('Result')


@dataclass(frozen=True)
class Contestant:
    """A model as it is to be run; None takes the model's own schedule and steps."""

    path: Path
    backend: str = 'auto'
    schedule: str | None = None
    steps: int | None = None


@dataclass(frozen=True)
class PlanJob:
    """Open-loop plans for some rows of a scene set, or for their mirror images."""

    contestant: Contestant
    scenes: Path
    indices: tuple[int, ...]
    mirrored: bool = False


@dataclass(frozen=True)
class DriveJob:
    """One closed-loop drive; without a contestant one of `closed_loop.REFERENCES` drives."""

    driver: str
    family: str
    seed: int
    config: ModelConfig
    contestant: Contestant | None
    plan_period_s: float
    latency_s: float


class BlindLayout(PromptLayout):
    """The prompt of a model that was trained without pictures: their tokens are always masked."""

    def encode(
        self, observation: Observation
    ) -> tuple[Int64[np.ndarray, ' p'], Bool[np.ndarray, ' p']]:
        """As if every picture were missing."""
        frames = tuple((None,) * len(camera) for camera in observation.frames)
        return super().encode(replace(observation, frames=frames))


def is_blind(directory: ModelDirectory) -> bool:
    """Whether the model was trained without pictures, as its manifest tells."""
    stages = directory.training.get('stages', [])
    return any(stage.get('settings', {}).get('blind', False) for stage in stages)


@lru_cache(maxsize=4)
def open_planner(contestant: Contestant) -> Planner:
    """The planner of a model, opened once a process."""
    directory = load_model_dir(contestant.path)
    layout = BlindLayout if is_blind(directory) else PromptLayout
    return Planner(
        open_backend(directory, contestant.backend),
        layout(directory.config, load_tokenizer(directory.path)),
        load_normalization(directory.path, directory.config),
        schedule=contestant.schedule,
        steps=contestant.steps,
        model_sha256=directory.sha256,
    )


@lru_cache(maxsize=2)
def open_scenes(path: Path) -> ShardSet:
    """A scene set, loaded once a process."""
    return ShardSet(path)


def do_plans(job: PlanJob) -> Float64[np.ndarray, 'n t 3']:
    """Plans in `base_link` for the rows of a job."""
    planner = open_planner(job.contestant)
    config = planner.config
    rows = open_scenes(job.scenes).rows(job.indices, config.frames_per_camera)
    if not job.mirrored:
        return plan_rows(planner, config, rows)
    seen = (mirrored_observation(row.sample.observation, config.cameras) for row in rows)
    return np.stack([plan_or_none(planner, config, observation) for observation in seen])


def do_drive(job: DriveJob) -> Episode:
    """One drive."""
    planner = None if job.contestant is None else open_planner(job.contestant)
    return drive(
        job.driver,
        job.family,
        job.seed,
        planner,
        job.config,
        job.plan_period_s,
        job.latency_s,
    )


def in_parallel(
    work: Callable[[Job], Result], jobs: Sequence[Job], workers: int
) -> Iterator[Result]:
    """Results in the order of their jobs, from a pool of fresh processes if that pays."""
    if workers <= 1 or len(jobs) <= 1:
        yield from map(work, jobs)
        return
    context = multiprocessing.get_context('spawn')
    with context.Pool(min(workers, len(jobs))) as pool:
        yield from pool.imap(work, jobs)
