"""Action heads: from bridged K/V to a trajectory, chosen by `head` of `config.yaml`.

Two kinds. An expert head asks the action expert, a small transformer over the bridged K/V:

* `flow`: Euler steps along its velocity (SpanVLA 3.2);
* `l1`: its answer at the source is the trajectory (SpanVLA Table 4, the controlled swap);
* `diffusion`: anchors, slightly noised, are denoised in a few steps, and the best scored one is
  taken (IRL-VLA's policy, after DiffusionDrive). Anchors are K-means of what the flow moves, the
  difference from the source path, not of whole trajectories. In that space trajectories have a
  spread of one, so the schedule is cut at step 150 of 1000, a noise of a quarter;
* `parallel`: one action token for each waypoint, all at once (OpenVLA-OFT's decoding).

An answer head reads what the language model itself says after the action start:

* `tokens`: action tokens, exactly one a waypoint (AutoVLA);
* `text`: waypoints in words (ELF-VLA), unconstrained: a malformed answer raises `AnswerError`.

A new head is one entry of `HEADS` here and one loss in `training.objectives.EXPERT_LOSSES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int64

from spanvla_ros.model.config import WAYPOINT_WORDS, ModelConfig
from spanvla_ros.model.flow import Normalization, decode_trajectory, euler, start_state
from spanvla_ros.model.prompt import PromptLayout, number_word
from spanvla_ros.types import PlanError, SpanvlaError

AXES = 3
WAYPOINT_END = ';'
KMEANS_ROUNDS = 50

# Scaled-linear noise as in latent diffusion: 1000 steps, of which the first 150 are used.
DIFFUSION_STEPS = 1000
TRUNCATED_STEPS = 150
BETAS = (1e-4, 0.02)

Ask = Callable[[Float32[np.ndarray, 'b d t 3'], float], Float32[np.ndarray, 'b d t a']]
Poses = Float64[np.ndarray, 'b t 3']


class AnswerError(PlanError):
    """An answer of the language model that is no trajectory; `reason` says in what way."""

    def __init__(self, reason: str) -> None:
        """Name the fault."""
        super().__init__(f'answer: {reason}; no plan is made of it')
        self.reason = reason


@dataclass(frozen=True)
class ExpertHead:
    """A head on the action expert.

    `draws` is the number of trajectories in one question, `outputs` the numbers given for each
    waypoint; `plan` turns answers of the expert into poses in `base_link`.
    """

    draws: Callable[[ModelConfig], int]
    outputs: Callable[[ModelConfig], int]
    plan: Callable[[ModelConfig, Normalization, Ask, int, Poses], Poses]


@dataclass(frozen=True)
class AnswerHead:
    """A head that is the language model's own answer.

    `encode` gives the tokens of a trajectory, without the mark that ends the answer; `allowed`
    the tokens that may follow so many others; `decode` the poses in `base_link` of an answer.
    """

    encode: Callable[[PromptLayout, Normalization, Float64[np.ndarray, 't 3']], list[int]]
    allowed: Callable[[PromptLayout, int], Int64[np.ndarray, 'v']]
    decode: Callable[[PromptLayout, Normalization, Sequence[int]], Float64[np.ndarray, 't 3']]


def head_of(config: ModelConfig) -> ExpertHead | AnswerHead:
    """The head of a model."""
    return HEADS[config.head]


def expert_draws(config: ModelConfig) -> int:
    """Trajectories the expert is asked about at once."""
    head = head_of(config)
    return head.draws(config) if isinstance(head, ExpertHead) else 1


def expert_outputs(config: ModelConfig) -> int:
    """Numbers the expert gives for a waypoint; beside an answer head it stays a flow's."""
    head = head_of(config)
    return head.outputs(config) if isinstance(head, ExpertHead) else AXES


# Flow and L1.


def flow_start(config: ModelConfig) -> Float32[np.ndarray, 't 3']:
    """The state that the expert is asked about first."""
    source = 'history' if config.head == 'l1' else config.source
    return start_state(source, config.waypoints)


def flow_steps(config: ModelConfig, steps: int) -> int:
    """Number of Euler steps; one whole step is the answer of the L1 head itself."""
    return 1 if config.head == 'l1' else steps


def _plan_flow(
    config: ModelConfig, normalization: Normalization, ask: Ask, steps: int, sources: Poses
) -> Poses:
    start = np.tile(flow_start(config), (len(sources), 1, 1, 1))
    states = euler(ask, start, flow_steps(config, steps))
    return _decoded(states[:, 0], sources, normalization)


def _decoded(
    states: Float32[np.ndarray, 'b t 3'], sources: Poses, normalization: Normalization
) -> Poses:
    pairs = zip(states, sources, strict=True)
    return np.stack([decode_trajectory(x, source, normalization.std) for x, source in pairs])


# Anchored, truncated diffusion.


def kept_share(step: Float64[np.ndarray, '*n'] | float) -> Float64[np.ndarray, '*n']:
    """Share of the signal's power that is left at a noise step: the product of 1 - beta.

    Args:
        step: noise step from 0 (clean) to 1000; between whole steps it is interpolated.
    """
    low, high = (math.sqrt(beta) for beta in BETAS)
    betas = np.linspace(low, high, DIFFUSION_STEPS) ** 2
    kept = np.concatenate([[1.0], np.cumprod(1.0 - betas)])
    return np.asarray(np.interp(step, np.arange(DIFFUSION_STEPS + 1), kept))


def diffusion_time(step: float) -> float:
    """Time feature of a noise step: 0 at the cut, 1 clean, as the flow counts."""
    return 1.0 - step / TRUNCATED_STEPS


def _plan_diffusion(
    config: ModelConfig, normalization: Normalization, ask: Ask, steps: int, sources: Poses
) -> Poses:
    """DDIM from the shrunken anchors, without noise: the same inputs give the same plan."""
    anchors = anchors_of(normalization)
    state = np.tile((np.sqrt(kept_share(TRUNCATED_STEPS)) * anchors).astype(np.float32),
                    (len(sources), 1, 1, 1))  # fmt: skip
    clean, scores = state, np.zeros(state.shape[:2])
    for index in range(steps):
        here, there = (TRUNCATED_STEPS * (1.0 - k / steps) for k in (index, index + 1))
        answer = ask(state, diffusion_time(here))
        clean, scores = answer[..., :AXES], answer[..., AXES].mean(-1)
        kept, next_kept = float(kept_share(here)), float(kept_share(there))
        noise = (state - math.sqrt(kept) * clean) / math.sqrt(1.0 - kept)
        moved = math.sqrt(next_kept) * clean + math.sqrt(1.0 - next_kept) * noise
        state = moved.astype(np.float32)
    best = scores.argmax(-1)
    return _decoded(clean[np.arange(len(best)), best], sources, normalization)


def anchors_of(normalization: Normalization) -> Float64[np.ndarray, 'k t 3']:
    """The anchors; a model without raises `SpanvlaError`."""
    if normalization.anchors is None:
        raise SpanvlaError('normalization.json: holds no anchors; train this head first')
    return normalization.anchors


def fit_anchors(
    states: Float64[np.ndarray, 'n t 3'], count: int, seed: int = 0
) -> Float64[np.ndarray, 'k t 3']:
    """K-means of normalized trajectories, started by k-means++; empty clusters start anew."""
    if len(states) < count:
        raise SpanvlaError(f'anchors: {count} need as many trajectories, there are {len(states)}')
    rng = np.random.default_rng(seed)
    points = states.reshape(len(states), -1)
    centers = points[rng.integers(len(points))][None]
    while len(centers) < count:
        gap = _squared_gaps(points, centers).min(1)
        weight = gap if gap.sum() > 0 else np.ones(len(points))
        chosen = points[rng.choice(len(points), p=weight / weight.sum())]
        centers = np.concatenate([centers, chosen[None]])
    for _ in range(KMEANS_ROUNDS):
        gaps = _squared_gaps(points, centers)
        owner = gaps.argmin(1)
        lonely = iter(np.argsort(-gaps.min(1)))
        moved = np.stack([
            points[owner == k].mean(0) if (owner == k).any() else points[next(lonely)]
            for k in range(count)
        ])  # fmt: skip
        if np.array_equal(moved, centers):
            break
        centers = moved
    return centers.reshape(count, *states.shape[1:])


def _squared_gaps(
    points: Float64[np.ndarray, 'n d'], centers: Float64[np.ndarray, 'k d']
) -> Float64[np.ndarray, 'n k']:
    return np.stack([((points - center) ** 2).sum(1) for center in centers], axis=1)


# Action tokens: all at once, or one after another.


def _plan_parallel(
    config: ModelConfig, normalization: Normalization, ask: Ask, steps: int, sources: Poses
) -> Poses:
    blank = np.zeros((len(sources), 1, config.waypoints, AXES), dtype=np.float32)
    tokens = ask(blank, 0.0)[:, 0].argmax(-1)
    codebook = normalization.actions
    return np.stack([codebook.decode(row) for row in tokens])


def _encode_tokens(
    layout: PromptLayout, normalization: Normalization, poses: Float64[np.ndarray, 't 3']
) -> list[int]:
    return [int(layout.action_ids[index]) for index in normalization.actions.encode(poses)]


def _allowed_tokens(layout: PromptLayout, said: int) -> Int64[np.ndarray, 'v']:
    return layout.action_ids if said < layout.config.waypoints else np.array([layout.turn_end_id])


def _decode_tokens(
    layout: PromptLayout, normalization: Normalization, ids: Sequence[int]
) -> Float64[np.ndarray, 't 3']:
    said, wanted = _before_end(layout, ids), layout.config.waypoints
    actions = layout.decode_actions(said)
    if len(actions) != len(said):
        raise AnswerError('holds a token that is no action')
    if len(actions) != wanted:
        raise AnswerError(f'holds {len(actions)} actions where {wanted} are wanted')
    return normalization.actions.decode(np.array(actions, dtype=np.int64))


# Waypoints in words.


def waypoint_text(poses: Float64[np.ndarray, 't 3']) -> str:
    """Poses in words: `x y yaw ;` for each, meters and degrees on the 0.5 grid."""
    words = [
        (number_word(x), number_word(y), number_word(math.degrees(yaw)), WAYPOINT_END)
        for x, y, yaw in poses.tolist()
    ]
    return ' '.join(word for waypoint in words for word in waypoint)


def parse_waypoints(text: str, count: int) -> Float64[np.ndarray, 't 3']:
    """The poses in a text of `count` waypoints, the inverse of `waypoint_text`.

    Raises:
        AnswerError: another number of waypoints, one that is not three numbers, a number that is
            not finite, a last waypoint that is cut off.
    """
    whole, end, rest = text.strip().rpartition(WAYPOINT_END)
    if not end:
        raise AnswerError('holds no waypoint')
    if rest.strip():
        raise AnswerError(f'breaks off in a waypoint after {rest.strip()!r:.40}')
    parts = whole.split(WAYPOINT_END)
    if len(parts) != count:
        raise AnswerError(f'holds {len(parts)} waypoints where {count} are wanted')
    poses = np.array([_waypoint(part) for part in parts])
    poses[:, 2] = np.radians(poses[:, 2])
    return poses


def _waypoint(part: str) -> tuple[float, ...]:
    words = part.split()
    if len(words) != AXES:
        raise AnswerError(f'waypoint {part.strip()!r:.40} is not three numbers')
    try:
        numbers = tuple(float(word) for word in words)
    except ValueError:
        raise AnswerError(f'waypoint {part.strip()!r:.40} is not three numbers') from None
    if not all(math.isfinite(number) for number in numbers):
        raise AnswerError(f'waypoint {part.strip()!r:.40} is not finite')
    return numbers


def _encode_text(
    layout: PromptLayout, normalization: Normalization, poses: Float64[np.ndarray, 't 3']
) -> list[int]:
    return layout.encode_text(waypoint_text(poses)).tolist()


def _allowed_text(layout: PromptLayout, said: int) -> Int64[np.ndarray, 'v']:
    if said >= WAYPOINT_WORDS * layout.config.waypoints:
        return np.array([layout.turn_end_id])
    return np.append(layout.text_ids, layout.turn_end_id)


def _decode_text(
    layout: PromptLayout, normalization: Normalization, ids: Sequence[int]
) -> Float64[np.ndarray, 't 3']:
    said = _before_end(layout, ids)
    return parse_waypoints(layout.decode_text(said), layout.config.waypoints)


def _before_end(layout: PromptLayout, ids: Sequence[int]) -> list[int]:
    said = [int(token) for token in ids]
    return said[: said.index(layout.turn_end_id)] if layout.turn_end_id in said else said


def _one(_: ModelConfig) -> int:
    return 1


def _axes(_: ModelConfig) -> int:
    return AXES


HEADS: dict[str, ExpertHead | AnswerHead] = {
    'flow': ExpertHead(_one, _axes, _plan_flow),
    'l1': ExpertHead(_one, _axes, _plan_flow),
    'diffusion': ExpertHead(lambda c: c.anchors, lambda _: AXES + 1, _plan_diffusion),
    'parallel': ExpertHead(_one, lambda c: c.action_tokens, _plan_parallel),
    'tokens': AnswerHead(_encode_tokens, _allowed_tokens, _decode_tokens),
    'text': AnswerHead(_encode_text, _allowed_text, _decode_text),
}
