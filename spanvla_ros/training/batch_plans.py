"""Open-loop plans of a model for many rows at a time, on a CPU or a GPU.

What is planned is what the planner plans on board for a moment alone: prompt with an empty text
slot, no thought before the trajectory of an expert head. An answer head answers as it would on
board, its likeliest tokens (drawn at a temperature near zero).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64
from tqdm import tqdm

from spanvla_ros.model.action_heads import AnswerHead, head_of
from spanvla_ros.model.checkpoint import load_model_dir
from spanvla_ros.model.policy import Policy, load_policy
from spanvla_ros.training import token_policy
from spanvla_ros.training.batches import Batch, make_batch
from spanvla_ros.training.contestants import is_blind
from spanvla_ros.training.data.shards import ShardSet
from spanvla_ros.training.heldout import LIKELIEST, expert_plans
from spanvla_ros.training.run import model_dir_of
from spanvla_ros.training.settings import TrainSettings
from spanvla_ros.training.stages.sft import run_backbone

CHUNK = 64


@dataclass(frozen=True)
class Entry:
    """One line of a table: its name and a model (or run) directory.

    `steps` are Euler steps, None for the model's own; with `tokens` a model with an expert head
    plans by the action tokens of its answer instead.
    """

    name: str
    path: Path
    steps: int | None = None
    tokens: bool = False


@dataclass(frozen=True)
class Plans:
    """Plans of one line in `base_link` at `times_s`, NaN where its answer is none."""

    name: str
    planned: Float64[np.ndarray, 'n t 3']
    times_s: Float64[np.ndarray, ' t']
    sha256: str


def plan_entry(entry: Entry, shards: ShardSet, indices: np.ndarray, device: torch.device) -> Plans:
    """Plans of a model for rows.

    Raises:
        SpanvlaError: no readable model, or rows of other cameras.
    """
    path = model_dir_of(entry.path)
    directory = load_model_dir(path)
    policy = load_policy(path).to(device)
    settings = TrainSettings(blind=is_blind(directory))
    found = []
    for start in tqdm(range(0, len(indices), CHUNK), desc=entry.name, unit='batch', disable=None):
        rows = shards.rows(indices[start : start + CHUNK])
        batch = make_batch(rows, policy, settings, None).to(device)
        found.append(plan_batch(policy, batch, settings, entry))
    return Plans(entry.name, np.concatenate(found), policy.config.times_s, directory.sha256)


@torch.no_grad()
def plan_batch(
    policy: Policy,
    batch: Batch,
    settings: TrainSettings,
    entry: Entry,
) -> Float64[np.ndarray, 'n t 3']:
    """Plans of one batch made for evaluation."""
    config = policy.config
    if entry.tokens or isinstance(head_of(config), AnswerHead):
        prompt, _, _ = run_backbone(policy, batch, settings, None)
        answers = token_policy.sample_answers(
            policy, prompt, batch.valid, 1, LIKELIEST, torch.Generator().manual_seed(0)
        )
        nothing = np.full((config.waypoints, 3), np.nan)
        said = token_policy.to_rollouts(policy, answers)
        return np.stack([nothing if one.poses is None else one.poses for one in said])
    return expert_plans(policy, batch, settings, entry.steps)
