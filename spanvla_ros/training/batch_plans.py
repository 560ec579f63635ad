"""Open-loop plans of a model for many rows at a time, on a CPU or a GPU.

What is planned is what the planner plans on board for a moment alone: prompt with an empty text
slot, no thought before the trajectory of an expert head. An answer head thinks first, as under
the schedule `sequential`, and says its likeliest tokens (drawn at a temperature near zero).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64, Int64
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
    """Plans of one line in `base_link` at `times_s`, NaN where its answer is none.

    `tokens` counts what the language model said for each plan: words and marks of a thought, and
    behind the action start the plan itself; both 0 where an expert plans.
    """

    name: str
    planned: Float64[np.ndarray, 'n t 3']
    times_s: Float64[np.ndarray, ' t']
    sha256: str
    tokens: Int64[np.ndarray, 'n 2']


def plan_entry(entry: Entry, shards: ShardSet, indices: np.ndarray, device: torch.device) -> Plans:
    """Plans of a model for rows.

    Raises:
        SpanvlaError: no readable model, or rows of other cameras.
    """
    path = model_dir_of(entry.path)
    directory = load_model_dir(path)
    policy = load_policy(path).to(device)
    settings = TrainSettings(blind=is_blind(directory))
    found, tokens = [], []
    for start in tqdm(range(0, len(indices), CHUNK), desc=entry.name, unit='batch', disable=None):
        rows = shards.rows(indices[start : start + CHUNK], policy.config.frames_per_camera)
        batch = make_batch(rows, policy, settings, None).to(device)
        planned, said = plan_batch(policy, batch, settings, entry)
        found.append(planned)
        tokens.append(said)
    times_s, said = policy.config.times_s, np.concatenate(tokens)
    return Plans(entry.name, np.concatenate(found), times_s, directory.sha256, said)


@torch.no_grad()
def plan_batch(
    policy: Policy,
    batch: Batch,
    settings: TrainSettings,
    entry: Entry,
) -> tuple[Float64[np.ndarray, 'n t 3'], Int64[np.ndarray, 'n 2']]:
    """Plans of one batch made for evaluation, and the tokens said for each."""
    config = policy.config
    if entry.tokens or isinstance(head_of(config), AnswerHead):
        prompt, _, _ = run_backbone(policy, batch, settings, None)
        answers = token_policy.sample_answers(
            policy, prompt, batch.valid, 1, LIKELIEST, torch.Generator().manual_seed(0)
        )
        nothing = np.full((config.waypoints, 3), np.nan)
        said = token_policy.to_rollouts(policy, answers)
        poses = np.stack([nothing if one.poses is None else one.poses for one in said])
        return poses, token_policy.lengths(policy, answers)
    planned = expert_plans(policy, batch, settings, entry.steps)
    return planned, np.zeros((len(planned), 2), np.int64)
