"""The planner: observation in, plan out, with cached vision and one of three schedules.

`off`: no reasoning. `concurrent` (default on board): a plan never waits; `reason_slice` works on a
reasoning between frames, and its text enters the prompts of the next two seconds. `sequential`
(the paper's): each plan reasons first, and the expert also attends to that reasoning's K/V.

Paper: SpanVLA 3.1.2 and 3.2. Deviations: the concurrent schedule; every picture is encoded as a
still, so that vision is cached by camera and stamp.
"""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Float64

from spanvla_ros.geometry import world_from_local
from spanvla_ros.model.action_heads import AnswerError, AnswerHead, flow_start, flow_steps, head_of
from spanvla_ros.model.checkpoint import load_model_dir
from spanvla_ros.model.config import bridged_layers
from spanvla_ros.model.flow import (
    Normalization,
    decode_trajectory,
    load_normalization,
    source_path,
    time_features,
)
from spanvla_ros.model.inputs import ego_features, pixels
from spanvla_ros.model.prompt import PromptLayout, load_tokenizer
from spanvla_ros.model.reasoning import agreement, meta_action
from spanvla_ros.runtime.backend import (
    Backend,
    DeviceBackend,
    DeviceCache,
    ask_expert,
    open_backend,
)
from spanvla_ros.runtime.reasoner import (
    Answer,
    AnswerCache,
    Prompt,
    Reasoner,
    padded,
)
from spanvla_ros.runtime.settling import settled
from spanvla_ros.runtime.thinking import Reasoning, ThinkLimits, ThinkMeter
from spanvla_ros.types import (
    SCHEDULES,
    CameraFrame,
    EgoState,
    Observation,
    Plan,
    PlanError,
    SpanvlaError,
    StageTimes,
    Trajectory,
)

REASONING_MAX_AGE_S = 2.0
SLICE_MS = 10.0
VISION_KEEP_S = 0.5
NS = 1_000_000_000


@dataclass(frozen=True)
class Bridge:
    """Bridged K/V in S slots, and what they were made from; `answer` is there for answer heads."""

    stamp_ns: int
    image_stamps_ns: tuple[int | None, ...]
    reasoning: str
    reasoning_stamp_ns: int | None
    thinking: str
    cache: AnswerCache | DeviceCache
    answer: Answer | None = None


@dataclass(frozen=True)
class Deed:
    """What a plan does, as far as words may be held against it: poses in `base_link`."""

    poses: Float64[np.ndarray, 't 3']
    speed_mps: float
    command: str


class Planner:
    """Plans of one model; keeps vision and K/V of recent frames and the last reasoning.

    Not safe for use from two threads at once: `plan` and `reason_slice` share the backend.
    """

    def __init__(
        self,
        backend: Backend,
        layout: PromptLayout,
        normalization: Normalization,
        *,
        schedule: str | None = None,
        steps: int | None = None,
        vision_every: int = 1,
        limits: ThinkLimits | None = None,
        model_sha256: str = '',
        frame_id: str = 'odom',
    ) -> None:
        """Take a loaded model.

        Args:
            backend: the engine.
            layout: token layout of the same model.
            normalization: of the same model.
            schedule: `sequential`, `concurrent` or `off`; None takes the model's own.
            steps: Euler steps; None takes the model's own.
            vision_every: encode pictures on every n-th frame; between them the expert runs on
                K/V no older than the model's `kv_max_age_s`.
            limits: bounds on thinking; None is none.
            model_sha256: the model's name for the plans' record.
            frame_id: name of the odometry frame.
        """
        config = backend.config
        self.schedule = config.schedule if schedule is None else schedule
        self.steps = config.steps if steps is None else steps
        if self.schedule not in SCHEDULES:
            raise SpanvlaError(
                f'schedule {self.schedule!r} is not known; use one of {", ".join(SCHEDULES)}'
            )
        if self.steps < 1 or vision_every < 1:
            raise SpanvlaError('steps and vision_every must be at least 1; raise them')
        self.backend = backend
        self.config = config
        self.layout = layout
        self.vision_every = vision_every
        self._normalization = normalization
        self._head = head_of(config)
        self.model_sha256 = model_sha256
        self._frame_id = frame_id
        self._reasoner = Reasoner(backend, layout, limits)
        self._plans = 0
        self.pictures_encoded = 0
        self.reset()

    @staticmethod
    def open(
        model_dir: str | Path,
        backend: str = 'auto',
        *,
        schedule: str | None = None,
        steps: int | None = None,
        vision_every: int = 1,
        limits: ThinkLimits | None = None,
        frame_id: str = 'odom',
    ) -> Planner:
        """Verify a model directory, load it on an engine and warm it up."""
        directory = load_model_dir(model_dir)
        engine = open_backend(directory, backend)
        planner = Planner(
            engine,
            PromptLayout(directory.config, load_tokenizer(directory.path)),
            load_normalization(directory.path, directory.config),
            schedule=schedule,
            steps=steps,
            vision_every=vision_every,
            limits=limits,
            model_sha256=directory.sha256,
            frame_id=frame_id,
        )
        planner.warm_up()
        return planner

    @property
    def meter(self) -> ThinkMeter:
        """Slow and fast thinking so far, and the decoding rate."""
        return self._reasoner.meter

    @property
    def reasoning(self) -> Reasoning | None:
        """The last finished reasoning, however old."""
        return self._reasoning

    @property
    def busy(self) -> bool:
        """Whether `reason_slice` has something left to work on."""
        waiting = self._reasoner.busy or self._prompt is not None
        return self.schedule == 'concurrent' and waiting

    def reset(self) -> None:
        """Forget cached vision, K/V and reasoning, as after a clock jump."""
        self._vision: dict[tuple[str, int], Float32[np.ndarray, 'n d']] = {}
        self._bridge: Bridge | None = None
        self._prompt: Prompt | None = None
        self._newest: Deed | None = None
        self._spoken_of: Deed | None = None
        self._reasoning: Reasoning | None = None
        self._since_vision = 0
        self._reasoner.reset()
        self.meter.new_drive()

    def warm_up(self) -> None:
        """Run every graph once on a blank observation, then forget it."""
        config = self.config
        blank = np.zeros((config.height_px, config.width_px, 3), dtype=np.uint8)
        frames = tuple(
            (CameraFrame(name, 0, blank),) * config.frames_per_camera
            for name in config.camera_names
        )
        observation = Observation(
            stamp_ns=0,
            frames=frames,
            ego=EgoState(0, 0.0, 0.0, 0.0, 0.0),
            history=np.zeros((config.history_poses, 3)),
            history_valid=np.zeros(config.history_poses, dtype=np.bool_),
            route=None,
        )
        with suppress(AnswerError):
            self.plan(observation)
        if self.schedule == 'concurrent':
            self.reason_slice(budget_ms=0.0)
            self.reason_slice(budget_ms=0.0)
        self.reset()
        self._plans = self.pictures_encoded = 0

    def plan(self, observation: Observation) -> Plan:
        """Make a plan.

        An observation that carries a reasoning keeps it, so that a plan can be made again from
        its record; else the last finished reasoning enters, if it is younger than 2 s.

        Raises:
            PlanError: the model gave a number that is not finite.
            AnswerError: the language model's answer is no trajectory (head `text`).
        """
        began = time.perf_counter()
        observation = self._with_reasoning(observation)
        times = _Stopwatch()
        bridge = self._condition(observation, times)
        poses = self._act(observation, bridge)
        times.lap('step_ms')
        if not np.isfinite(poses).all():
            raise PlanError('plan: the model gave a number that is not finite; check its files')
        poses = settled(poses, self.config.times_s, observation.ego.speed_mps)
        total_ms = (time.perf_counter() - began) * 1e3
        self._plans += 1
        self._newest = Deed(poses, observation.ego.speed_mps, observation.command)
        return self._record(observation, bridge, self._newest, times.stages(total_ms))

    def reason_slice(
        self, budget_ms: float = SLICE_MS, tokens: int | None = None
    ) -> Reasoning | None:
        """Work on the concurrent reasoning for one slice; returns one that has just finished.

        A new episode starts from the newest planned frame. Call it between frames; it does
        nothing under other schedules.

        Args:
            budget_ms: wall time to stay within, about.
            tokens: most tokens in this slice; with an infinite budget the result does not depend
                on the clock (lockstep and replay).
        """
        if self.schedule != 'concurrent':
            return None
        if not self._reasoner.busy:
            if self._prompt is None:
                return None
            self._reasoner.start(self._prompt)
            self._prompt, self._spoken_of = None, self._newest
        finished = self._reasoner.advance(budget_ms, tokens)
        if finished is not None:
            done = self._spoken_of
            assert done is not None
            self._reasoning = finished = replace(
                finished, agreement=self._agreement(finished.text, done)
            )
        return finished

    def _agreement(self, text: str, done: Deed) -> bool | None:
        return agreement(text, self.config.times_s, done.poses, done.speed_mps, done.command)

    def _said_and_done(self, bridge: Bridge, done: Deed) -> bool | None:
        """Whether the plan's words agree with the plan of the picture they tell of.

        Words are up to two seconds older than the plan that carries them, and are judged by what
        was planned when they were true. Words from elsewhere are judged by this plan.
        """
        said = self._reasoning
        own = bridge.reasoning_stamp_ns == bridge.stamp_ns
        if own or said is None or said.stamp_ns != bridge.reasoning_stamp_ns:
            return self._agreement(bridge.reasoning, done)
        return said.agreement

    def _with_reasoning(self, observation: Observation) -> Observation:
        if self.schedule != 'concurrent':
            return replace(observation, reasoning='', reasoning_stamp_ns=None)
        last = self._reasoning
        if observation.reasoning or last is None or not last.text:
            return observation
        age_s = (observation.stamp_ns - last.stamp_ns) / NS
        if not 0 <= age_s <= REASONING_MAX_AGE_S:
            return observation
        return replace(observation, reasoning=last.text, reasoning_stamp_ns=last.stamp_ns)

    def _condition(self, observation: Observation, times: _Stopwatch) -> Bridge:
        """Bridged K/V for this plan: fresh, or cached between vision frames."""
        cached = self._bridge
        if cached is not None and self.schedule != 'sequential':
            age_s = (observation.stamp_ns - cached.stamp_ns) / NS
            turn = self._since_vision + 1 < self.vision_every
            if turn and 0 <= age_s <= self.config.kv_max_age_s:
                self._since_vision += 1
                return cached
        self._since_vision = 0
        ids, valid = self.layout.encode(observation)
        embeds = self._encode_pictures(observation)
        times.lap('vision_ms')
        prompt = Prompt(observation.stamp_ns, ids[None], embeds, valid[None].astype(np.float32))
        self._prompt = prompt
        if self.schedule == 'sequential':
            self._bridge = self._reasoned_bridge(observation, prompt)
            times.lap('reason_ms')
        else:
            self._bridge = self._prompt_bridge(observation, prompt)
            times.lap('prefill_ms')
        return self._bridge

    def _prompt_bridge(self, observation: Observation, prompt: Prompt) -> Bridge:
        answer, cache = self._prefill(prompt)
        return Bridge(
            stamp_ns=observation.stamp_ns,
            image_stamps_ns=_image_stamps(observation),
            reasoning=observation.reasoning,
            reasoning_stamp_ns=observation.reasoning_stamp_ns,
            thinking='none' if self._reasoning is None else self._reasoning.thinking,
            cache=cache,
            answer=answer,
        )

    def _prefill(self, prompt: Prompt) -> tuple[Answer | None, AnswerCache | DeviceCache]:
        config, backend = self.config, self.backend
        if isinstance(self._head, AnswerHead):
            answer = self._reasoner.without_thought(prompt)
            return answer, answer.cache
        if isinstance(backend, DeviceBackend) and config.expert_graph == 'step':
            return None, backend.condition(prompt.ids, prompt.embeds, prompt.valid)
        keys, values = backend.prefill_action(prompt.ids, prompt.embeds, prompt.valid)
        return None, AnswerCache(
            padded(keys, config.sequence_tokens),
            padded(values, config.sequence_tokens),
            np.pad(prompt.valid, ((0, 0), (0, config.answer_room))),
        )

    def _reasoned_bridge(self, observation: Observation, prompt: Prompt) -> Bridge:
        said, answer = self._reasoner.run(prompt)
        self._reasoning = said
        cache = answer.cache
        layers = list(bridged_layers(len(cache.keys), self.config.interval))
        return Bridge(
            stamp_ns=observation.stamp_ns,
            image_stamps_ns=_image_stamps(observation),
            reasoning=said.text,
            reasoning_stamp_ns=said.stamp_ns,
            thinking=said.thinking,
            cache=AnswerCache(cache.keys[layers], cache.values[layers], cache.valid),
            answer=answer if isinstance(self._head, AnswerHead) else None,
        )

    def _encode_pictures(self, observation: Observation) -> Float32[np.ndarray, 'i d']:
        rows: list[Float32[np.ndarray, 'n d'] | None] = []
        for frame in (frame for camera in observation.frames for frame in camera):
            if frame is None:
                rows.append(None)
                continue
            key = frame.camera, frame.stamp_ns
            if key not in self._vision:
                picture = pixels(frame.image, self.config.height_px, self.config.width_px)
                self._vision[key] = self.backend.vision(picture)
                self.pictures_encoded += 1
            rows.append(self._vision[key])
        span_s = (self.config.frames_per_camera - 1) * self.config.frame_lag_s + VISION_KEEP_S
        oldest_ns = observation.stamp_ns - round(span_s * NS)
        self._vision = {
            key: row
            for key, row in self._vision.items()
            if oldest_ns <= key[1] <= observation.stamp_ns + round(VISION_KEEP_S * NS)
        }
        present = next((row for row in rows if row is not None), None)
        if present is None:
            raise SpanvlaError('observation: holds no picture at all; give the anchor camera')
        return np.concatenate([np.zeros_like(present) if row is None else row for row in rows])

    def _act(self, observation: Observation, bridge: Bridge) -> Float64[np.ndarray, 't 3']:
        """Poses in `base_link` by the model's head."""
        config, backend, cache, head = self.config, self.backend, bridge.cache, self._head
        if isinstance(head, AnswerHead):
            assert bridge.answer is not None
            said = bridge.answer.say(head, self.layout)
            return head.decode(self.layout, self._normalization, said)
        ego = ego_features(observation)[None]
        source = source_path(config.source, observation, config.times_s)
        if isinstance(backend, DeviceBackend) and isinstance(cache, DeviceCache):
            steps = flow_steps(config, self.steps)
            x = backend.flow(flow_start(config)[None], ego, cache, steps)[0]
            return decode_trajectory(x, source, self._normalization.std)

        def ask(x: np.ndarray, at: float) -> np.ndarray:
            assert isinstance(cache, AnswerCache)
            features = time_features(at)[None]
            return ask_expert(backend, x, features, ego, cache.keys, cache.values, cache.valid)

        planned = head.plan(config, self._normalization, ask, self.steps, source[None])
        return np.asarray(planned[0])

    def _record(
        self,
        observation: Observation,
        bridge: Bridge,
        done: Deed,
        stage_ms: StageTimes,
    ) -> Plan:
        ego, times_s, poses = observation.ego, self.config.times_s, done.poses
        route = observation.route
        return Plan(
            plan_id=self._plans,
            trajectory=Trajectory(
                observation.stamp_ns, self._frame_id, times_s, world_from_local(ego.pose, poses)
            ),
            origin=(ego.x_m, ego.y_m, ego.yaw_rad),
            image_stamps_ns=bridge.image_stamps_ns,
            kv_stamp_ns=bridge.stamp_ns,
            schedule=self.schedule,
            steps=self.steps,
            speed_mps=ego.speed_mps,
            accel_mps2=ego.accel_mps2,
            yaw_rate_radps=ego.yaw_rate_radps,
            thinking=bridge.thinking,
            reasoning=bridge.reasoning,
            reasoning_stamp_ns=bridge.reasoning_stamp_ns,
            decision=str(meta_action(times_s, poses, done.speed_mps, done.command)),
            agreement=self._said_and_done(bridge, done),
            think_alarm=self.meter.alarm,
            history=tuple((x, y, yaw) for x, y, yaw in observation.history.tolist()),
            history_valid=tuple(observation.history_valid.tolist()),
            route=None if route is None else tuple((x, y) for x, y in route.tolist()),
            route_hash='' if route is None else hashlib.sha256(route.tobytes()).hexdigest()[:16],
            command=observation.command,
            degraded=observation.degraded,
            stage_ms=stage_ms,
            model_sha256=self.model_sha256,
            backend=self.backend.name,
        )


def _image_stamps(observation: Observation) -> tuple[int | None, ...]:
    return tuple(
        None if frame is None else frame.stamp_ns
        for camera in observation.frames
        for frame in camera
    )


class _Stopwatch:
    """Wall time of the named parts, each since the one before."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._spent_ms = {'vision_ms': 0.0, 'prefill_ms': 0.0, 'reason_ms': 0.0, 'step_ms': 0.0}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._spent_ms[name] = (now - self._last) * 1e3
        self._last = now

    def stages(self, total_ms: float) -> StageTimes:
        return StageTimes(total_ms=total_ms, **self._spent_ms)


def plan_again(planner: Planner, observation: Observation, plan: Plan) -> Plan:
    """Make a plan a second time from `observations.observation_of` its record.

    Raises:
        SpanvlaError: the record was made with other settings, or on K/V of an earlier picture
            (then make the plan of that picture again first).
    """
    if (plan.schedule, plan.steps) != (planner.schedule, planner.steps):
        raise SpanvlaError(
            f'plan {plan.plan_id}: made with schedule {plan.schedule} and {plan.steps} steps; '
            'open the planner with these'
        )
    if plan.kv_stamp_ns != plan.trajectory.stamp_ns:
        raise SpanvlaError(
            f'plan {plan.plan_id}: ran on K/V of an earlier picture; make that plan again'
        )
    planner.reset()
    again: Plan = planner.plan(observation)
    return again
