"""From training rows to tensors: augmentation, prompt, answer, flow target.

Everything random comes from one numpy generator given by the caller, so that a batch is a
function of (seed, step, process) and a resumed run sees the same batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from spanvla_ros.model.action_heads import HEADS, AnswerHead, head_of
from spanvla_ros.model.backbone import Prefix
from spanvla_ros.model.flow import encode_trajectory, source_path
from spanvla_ros.model.inputs import ego_features, fitted
from spanvla_ros.model.policy import Policy
from spanvla_ros.model.prompt import ANSWER_MARKS
from spanvla_ros.training.settings import TrainSettings
from spanvla_ros.types import Observation, SpanvlaError

if TYPE_CHECKING:
    from spanvla_ros.training.data.shards import TrainingRow


@dataclass(frozen=True)
class Batch:
    """Tensors of B rows; A answer tokens, n visual tokens a picture.

    `answer` holds ids padded at the end; `reasoning_weight` and `action_weight` mark which of
    them are text (with the marks around it) and which are actions. `seen` marks the answer slots
    the expert may attend to. `actions [B, T]` are the action tokens of the future, where the model
    has a codebook. `picture_valid` is 0 where a picture was taken away. `rows` are the rows and
    `observations` what was made of theirs, both without pictures; in `kept` a stage keeps what it
    needs again when it updates more than once on this batch. `prefix` holds the bridged K/V of
    prompt and answer where they come from a cache.
    """

    images: Tensor
    ids: Tensor
    valid: Tensor
    ego: Tensor
    target: Tensor
    actions: Tensor
    answer: Tensor
    reasoning_weight: Tensor
    action_weight: Tensor
    seen: Tensor
    presence: Tensor
    facts: Tensor
    picture_valid: Tensor
    rows: tuple[TrainingRow, ...] = ()
    observations: tuple[Observation, ...] = ()
    kept: dict[str, Any] = field(default_factory=dict)
    prefix: Prefix | None = None

    def __len__(self) -> int:
        """Number of rows."""
        return self.ids.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """What has a line for each row, by name."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on a device."""
        if device == self.ids.device:
            return self
        moved: dict[str, Any] = {
            name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors().items()
        }
        if self.prefix is not None:
            moved['prefix'] = Prefix(self.prefix.keys.to(device), self.prefix.values.to(device))
        return replace(self, **moved)


def make_batch(
    rows: Sequence[TrainingRow],
    policy: Policy,
    settings: TrainSettings,
    rng: np.random.Generator | None,
    answers: str = 'none',
) -> Batch:
    """Tensors of some rows.

    Args:
        rows: the rows.
        policy: gives layout, source, normalisation, codebook.
        settings: augmentation.
        rng: source of augmentation; None for evaluation, without any and without last reasoning,
            which would give away what the eyes are asked for.
        answers: `none`, `reasoning` (ends at the action start), `full` (with action tokens).
    """
    observations = [row.sample.observation for row in rows]
    present = observations
    if rng is not None:
        texts = [row.sample.reasoning for row in rows]
        observations = [
            _disturbed(seen, row.sample.reasoning, texts, settings, rng)
            for seen, row in zip(observations, rows, strict=True)
        ]
    else:
        observations = [replace(seen, reasoning='') for seen in observations]
    if settings.blind:
        observations = [without_pictures(seen) for seen in observations]
    encoded = [policy.layout.encode(seen) for seen in observations]
    seen_share = settings.answer_seen if rng is not None else 0.0
    chosen = np.zeros(len(rows), bool) if rng is None else rng.random(len(rows)) < seen_share
    answer, text_weight, action_weight = encode_answers(rows, policy, answers, chosen)
    return Batch(
        images=torch.from_numpy(np.stack([_pictures(seen, policy) for seen in present])),
        ids=torch.from_numpy(np.stack([ids for ids, _ in encoded])),
        valid=torch.from_numpy(np.stack([valid for _, valid in encoded]).astype(np.float32)),
        ego=torch.from_numpy(np.stack([ego_features(seen) for seen in observations])),
        target=torch.from_numpy(
            np.stack(
                [_target(row, seen, policy) for row, seen in zip(rows, observations, strict=True)]
            )
        ),
        actions=torch.from_numpy(_actions(rows, policy)),
        answer=torch.from_numpy(answer),
        reasoning_weight=torch.from_numpy(text_weight),
        action_weight=torch.from_numpy(action_weight),
        seen=torch.from_numpy((text_weight * chosen[:, None]).astype(np.float32)),
        presence=torch.from_numpy(np.stack([row.presence for row in rows]).astype(np.float32)),
        facts=torch.from_numpy(np.stack([row.facts for row in rows]).astype(np.float32)),
        picture_valid=torch.tensor(
            [[float(f is not None) for c in seen.frames for f in c] for seen in observations]
        ),
        rows=tuple(_unseen(row) for row in rows),
        observations=tuple(replace(seen, frames=()) for seen in observations),
    )


def _unseen(row: TrainingRow) -> TrainingRow:
    """The row without its pictures, which are in the batch."""
    observation = replace(row.sample.observation, frames=())
    return replace(row, sample=replace(row.sample, observation=observation))


def _pictures(observation: Observation, policy: Policy) -> np.ndarray:
    config = policy.config
    blank = np.zeros((config.height_px, config.width_px, 3), np.uint8)
    frames = [frame for camera in observation.frames for frame in camera]
    wanted = len(config.cameras) * config.frames_per_camera
    if len(frames) != wanted:
        raise SpanvlaError(
            f'training data: {len(frames)} pictures a row, the model takes {wanted}; draw the '
            'scenes with its cameras (spanvla scenes --model)'
        )
    return np.stack(
        [
            blank if frame is None else fitted(frame.image, config.height_px, config.width_px)
            for frame in frames
        ]
    )


def _target(row: TrainingRow, observation: Observation, policy: Policy) -> np.ndarray:
    config = policy.config
    std = np.ones((config.waypoints, 3))
    if policy.normalization is not None:
        std = policy.normalization.std
    source = source_path(config.source, observation, config.times_s)
    return encode_trajectory(row.sample.future, source, std)


def _actions(rows: Sequence[TrainingRow], policy: Policy) -> np.ndarray:
    if policy.codebook is None or policy.config.head != 'parallel':
        return np.zeros((len(rows), 0), np.int64)
    return np.stack([policy.codebook.encode(row.sample.future) for row in rows])


def encode_answers(
    rows: Sequence[TrainingRow], policy: Policy, kind: str, thought: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, text marks, action marks, each `[B, A]`; A = 0 for kind `none`.

    Where an answer head plans without a thought of its own (`thought` is false), the action
    follows the fast template; its words then teach nothing, for thinking fast is not what that
    scene asks for.
    """
    if kind == 'none':
        return np.zeros((len(rows), 0), np.int64), *(np.zeros((2, len(rows), 0), np.float32))
    answers, texts, silent = [], [], []
    longest = policy.config.answer_tokens - ANSWER_MARKS
    layout, head = policy.layout, head_of(policy.config)
    said = head if isinstance(head, AnswerHead) else HEADS['tokens']
    assert isinstance(said, AnswerHead)
    for row, thinks in zip(rows, thought, strict=True):
        sample = row.sample
        reasoning = ' '.join(sample.reasoning.split()[:longest])
        thinking = sample.thinking if thinks or said is not head else 'fast'
        silent.append(thinking != sample.thinking)
        text = layout.encode_answer(reasoning, thinking)
        action: list[int] = []
        if kind == 'full':
            if policy.normalization is None:
                raise SpanvlaError('training: the model has no normalization; run sft first')
            action = said.encode(layout, policy.normalization, sample.future)
            action.append(layout.turn_end_id)
        answers.append(np.array([*text, *action], np.int64))
        texts.append(len(text))
    length = max(len(answer) for answer in answers)
    ids = np.full((len(rows), length), policy.layout.padding_id, np.int64)
    text_mark = np.zeros((len(rows), length), np.float32)
    action_mark = np.zeros((len(rows), length), np.float32)
    for index, (answer, text_length) in enumerate(zip(answers, texts, strict=True)):
        ids[index, : len(answer)] = answer
        text_mark[index, :text_length] = 0.0 if silent[index] else 1.0
        action_mark[index, text_length : len(answer)] = 1.0
    return ids, text_mark, action_mark


def _disturbed(
    observation: Observation,
    reasoning: str,
    others: Sequence[str],
    settings: TrainSettings,
    rng: np.random.Generator,
) -> Observation:
    """Sensor noise, lost inputs, and a last reasoning as it may stand there while driving.

    The slot is empty, or holds the row's own text (its earlier one where the data has it), or now
    and then that of another scene, so that the text is a hint and never believed over the eyes.
    """
    frames = observation.frames
    if rng.random() < settings.camera_drop:
        lost = int(rng.integers(len(frames)))
        frames = tuple(
            (None,) * len(camera) if index == lost else camera
            for index, camera in enumerate(frames)
        )
    noise = np.array([1.0, 1.0, 0.2]) * settings.history_noise_m
    history = observation.history + rng.standard_normal(observation.history.shape) * noise
    history_valid = observation.history_valid
    if rng.random() < settings.history_drop:
        # A drive begins with its newest poses: the oldest are those that lack.
        history_valid = history_valid & (
            np.arange(len(history_valid)) >= rng.integers(1, len(history_valid) + 1)
        )
    route = observation.route
    if route is not None:
        route = route + rng.standard_normal(route.shape) * settings.route_noise_m
        if rng.random() < settings.route_drop:
            route = None
    draw = rng.random()
    last = observation.reasoning or reasoning
    if draw < settings.slot_empty:
        last = ''
    elif draw < settings.slot_empty + settings.slot_foreign:
        last = others[int(rng.integers(len(others)))]
    return replace(
        observation,
        frames=frames,
        history=history,
        history_valid=history_valid,
        route=route,
        reasoning=last,
    )


def without_pictures(observation: Observation) -> Observation:
    """The observation of a model that has no eyes."""
    frames = tuple((None,) * len(camera) for camera in observation.frames)
    return replace(observation, frames=frames)
