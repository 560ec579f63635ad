"""Plans of a toy model on ONNX Runtime against the same sums done by hand."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spanvla_ros.geometry import local_from_world, world_from_local
from spanvla_ros.model.config import ModelConfig
from spanvla_ros.model.flow import Normalization, history_source, time_features
from spanvla_ros.model.inputs import ego_features
from spanvla_ros.model.prompt import PromptLayout
from spanvla_ros.runtime.backend import open_backend
from spanvla_ros.runtime.observations import observation_of
from spanvla_ros.runtime.planner import Planner, plan_again
from spanvla_ros.runtime.settling import settled
from spanvla_ros.types import CameraFrame, EgoState, Observation, Plan, PlanError, SpanvlaError

NS = 1_000_000_000
WORDS = 'lead vehicle 15 m braking ; decelerate , keep lane'


def observation(stamp_s=10.0, speed=8.0, missing=()):
    stamp_ns = round(stamp_s * NS)
    names = ModelConfig().camera_names
    frames = tuple(
        (None if name in missing else CameraFrame(name, stamp_ns, picture(i)),)
        for i, name in enumerate(names)
    )
    return Observation(
        stamp_ns=stamp_ns,
        frames=frames,
        ego=EgoState(stamp_ns, 100.0, 50.0, 0.7, speed, 0.4, 0.1),
        history=np.array([[-12.0, 0.1, 0.0], [-8.0, 0.1, 0.0], [-4.0, 0.0, 0.0]]),
        history_valid=np.array([True, True, True]),
        route=np.stack([np.arange(15.0, 76.0, 15.0), np.zeros(5)], axis=-1),
        degraded=tuple(f'camera_missing:{name}' for name in missing),
    )


def picture(index):
    return np.full((112, 224, 3), 40 * (index + 1), np.uint8)


def planner_of(toy, schedule='off', **settings):
    return Planner(
        open_backend(toy.path, 'onnxruntime'),
        toy.layout,
        Normalization('history', toy.std),
        schedule=schedule,
        model_sha256='abc',
        **settings,
    )


def by_hand(toy, seen, steps=5):
    ids, valid = toy.layout.encode(seen)
    embeds = np.zeros((3, 32, 4))
    for i, camera in enumerate(seen.frames):
        if camera[0] is not None:
            embeds[i, :, :3] = camera[0].image[0, 0] / 255.0
    pooled = toy.pooled(ids, valid.astype(float), embeds)
    x = np.zeros((10, 3))
    for k in range(steps):
        ego = ego_features(seen).astype(float)
        x = x + toy.velocity(x, pooled, ego, time_features(k / steps)) / steps
    local = history_source(seen, toy.config.times_s) + x * toy.std
    return world_from_local(seen.ego.pose, local)


def test_a_plan_is_the_flow_of_the_graphs_in_the_odometry_frame(toy):
    seen = observation()
    plan = planner_of(toy).plan(seen)
    np.testing.assert_allclose(plan.trajectory.poses, by_hand(toy, seen), atol=1e-4)
    assert plan.trajectory.stamp_ns == seen.stamp_ns == plan.kv_stamp_ns
    assert plan.trajectory.frame_id == 'odom'
    assert (plan.backend, plan.model_sha256, plan.schedule) == ('onnxruntime', 'abc', 'off')
    assert plan.stage_ms.total_ms >= plan.stage_ms.step_ms > 0


def test_steps_are_a_run_time_number(toy):
    seen = observation()
    plan = planner_of(toy, steps=2).plan(seen)
    assert plan.steps == 2
    np.testing.assert_allclose(plan.trajectory.poses, by_hand(toy, seen, 2), atol=1e-4)


def test_a_missing_camera_is_masked_and_its_reason_passed_on(toy):
    seen = observation(missing=('front_left',))
    plan = planner_of(toy).plan(seen)
    assert plan.degraded == ('camera_missing:front_left',)
    assert plan.image_stamps_ns == (seen.stamp_ns, None, seen.stamp_ns)
    np.testing.assert_allclose(plan.trajectory.poses, by_hand(toy, seen), atol=1e-4)


def test_pictures_are_encoded_once(toy):
    planner = planner_of(toy)
    seen = observation()
    planner.plan(seen)
    assert planner.pictures_encoded == 3
    planner.plan(seen)
    assert planner.pictures_encoded == 3
    planner.plan(observation(10.1))
    assert planner.pictures_encoded == 6


def test_vision_every_second_frame_runs_on_cached_kv_no_older_than_its_bound(toy):
    planner = planner_of(toy, vision_every=3)
    stamps = [planner.plan(observation(10.0 + t)).kv_stamp_ns / NS for t in (0, 0.1, 0.2, 0.3)]
    assert stamps == pytest.approx([10.0, 10.0, 10.0, 10.3])
    late = planner.plan(observation(10.3 + 0.31))
    assert late.kv_stamp_ns == late.trajectory.stamp_ns


def test_a_plan_on_cached_kv_names_the_pictures_it_used(toy):
    planner = planner_of(toy, vision_every=2)
    planner.plan(observation(10.0))
    plan = planner.plan(observation(10.1))
    assert plan.image_stamps_ns == (10 * NS,) * 3
    with pytest.raises(SpanvlaError, match='earlier picture'):
        plan_again(planner, observation(10.1), plan)


@pytest.mark.parametrize('schedule', ['off', 'concurrent', 'sequential'])
def test_a_plan_can_be_made_again_from_its_record_and_pictures(toy, schedule):
    planner = planner_of(toy, schedule)
    planner.plan(observation(9.9))
    while planner.reasoning is None and schedule == 'concurrent':
        planner.reason_slice(float('inf'), tokens=3)
    seen = observation(10.0, missing=('front_right',))
    plan = Plan.from_json(planner.plan(seen).to_json())
    assert bool(plan.reasoning) == (schedule != 'off')
    again = plan_again(planner_of(toy, schedule), observation_of(plan, seen.frames), plan)
    assert np.array_equal(again.trajectory.poses, plan.trajectory.poses)
    assert (again.reasoning, again.decision) == (plan.reasoning, plan.decision)


def test_concurrent_reasoning_enters_the_next_prompts_and_expires(toy):
    planner = planner_of(toy, 'concurrent')
    first = planner.plan(observation(10.0))
    assert (first.reasoning, first.thinking, first.agreement) == ('', 'none', None)
    slices = 0
    while planner.reasoning is None:
        planner.reason_slice(float('inf'), tokens=4)
        slices += 1
    assert slices == 4  # prefill, <think>, ten words, </think>: 13 graph calls
    assert planner.reasoning.text == WORDS
    plan = planner.plan(observation(10.2))
    assert (plan.reasoning, plan.reasoning_stamp_ns) == (WORDS, 10 * NS)
    assert plan.thinking == 'slow'
    assert plan.agreement is not None
    seen = replace(observation(10.2), reasoning=WORDS)
    np.testing.assert_allclose(plan.trajectory.poses, by_hand(toy, seen), atol=1e-4)
    assert planner.plan(observation(12.1)).reasoning == ''
    assert planner.meter.slow_share == 1.0


def test_words_are_held_against_the_plan_of_the_picture_they_tell_of(toy, monkeypatch):
    def fast_enough(text, times_s, poses, speed_mps, command):
        return speed_mps > 4.0 if text else None

    monkeypatch.setattr('spanvla_ros.runtime.planner.agreement', fast_enough)
    planner = planner_of(toy, 'concurrent')
    planner.plan(observation(10.0, speed=8.0))
    while planner.reasoning is None:
        planner.reason_slice(float('inf'), tokens=4)
    later = planner.plan(observation(10.2, speed=1.0))
    assert later.reasoning == WORDS
    assert later.agreement is planner.reasoning.agreement is True
    # Words from a record have no plan of their own picture at hand.
    again = planner_of(toy, 'concurrent').plan(
        replace(observation(10.2, speed=1.0), reasoning='x')
    )
    assert again.agreement is False


def test_a_slice_makes_progress_and_respects_its_budget(toy):
    planner = planner_of(toy, 'concurrent')
    planner.plan(observation())
    planner.reason_slice(budget_ms=0.0)
    planner.reason_slice(budget_ms=0.0)
    assert planner.meter.tokens == 0
    planner.reason_slice(budget_ms=0.0)
    assert planner.meter.tokens == 1


def test_no_reasoning_without_a_plan_or_under_other_schedules(toy):
    assert planner_of(toy, 'concurrent').reason_slice() is None
    planner = planner_of(toy, 'off')
    planner.plan(observation())
    planner.reason_slice(float('inf'))
    assert planner.reasoning is None


def test_sequential_lets_the_expert_attend_to_its_own_reasoning(toy):
    seen = observation()
    plan = planner_of(toy, 'sequential').plan(seen)
    assert (plan.reasoning, plan.reasoning_stamp_ns) == (WORDS, seen.stamp_ns)
    ids, valid = toy.layout.encode(seen)
    answer = toy.layout.encode_answer(WORDS, 'slow')
    embeds = np.concatenate([np.tile([40 / 255 * (i + 1)] * 3 + [0.0], (32, 1)) for i in range(3)])
    row = np.concatenate([ids * valid * 1e-3 + embeds.mean(), answer * 1e-3])
    mask = np.concatenate([valid.astype(float), np.ones(len(answer))])
    pooled = (row * mask).sum() / mask.sum()
    x = np.zeros((10, 3))
    for k in range(5):
        x = x + toy.velocity(x, pooled, ego_features(seen), time_features(k / 5)) / 5
    local = history_source(seen, toy.config.times_s) + x * toy.std
    expected = world_from_local(seen.ego.pose, local)
    np.testing.assert_allclose(plan.trajectory.poses, expected, rtol=1e-4, atol=1e-3)


def test_reset_forgets_reasoning_and_vision(toy):
    planner = planner_of(toy, 'concurrent')
    planner.plan(observation())
    planner.reason_slice(float('inf'))
    assert planner.reasoning is not None
    planner.reset()
    assert planner.plan(observation(10.1)).reasoning == ''
    assert planner.pictures_encoded == 6


def test_a_model_that_gives_nan_is_refused(toy):
    planner = Planner(
        open_backend(toy.path, 'onnxruntime'),
        toy.layout,
        Normalization('history', np.full((10, 3), np.nan)),
        schedule='off',
    )
    with pytest.raises(PlanError, match='not finite'):
        planner.plan(observation())


def test_settings_are_checked(toy):
    backend = open_backend(toy.path, 'onnxruntime')
    layout = PromptLayout(toy.config, toy.layout.tokenizer)
    with pytest.raises(SpanvlaError, match='schedule'):
        Planner(backend, layout, Normalization('history', toy.std), schedule='always')
    with pytest.raises(SpanvlaError, match='at least 1'):
        Planner(backend, layout, Normalization('history', toy.std), steps=0)


def test_open_verifies_loads_and_warms_up(toy):
    planner = Planner.open(toy.path, 'onnxruntime')
    assert planner.schedule == toy.config.schedule
    plan = planner.plan(observation())
    assert plan.plan_id == 1
    assert len(plan.model_sha256) == 64
    assert planner.pictures_encoded == 3


TIMES = np.arange(0.5, 5.1, 0.5)


@given(st.lists(st.floats(-0.06, 0.06), min_size=30, max_size=30))
def test_a_standing_car_stands_still_whatever_small_wriggle_is_planned(noise):
    poses = np.array(noise).reshape(10, 3)
    assert not settled(poses, TIMES, 0.0).any()


@given(st.lists(st.floats(-0.05, 0.05), min_size=30, max_size=30), st.floats(1.0, 10.0))
def test_a_stopping_plan_never_goes_back(noise, speed):
    stop_s = 3.0
    s = speed * np.minimum(TIMES, stop_s) - speed * np.minimum(TIMES, stop_s) ** 2 / (2 * stop_s)
    poses = np.stack([s, 0 * s, 0 * s], axis=-1) + np.array(noise).reshape(10, 3)
    calm = settled(poses, TIMES, speed)
    previous = np.concatenate([np.zeros((1, 3)), calm[:-1]])
    ahead = [local_from_world(a, b)[0] for a, b in zip(previous, calm, strict=True)]
    assert min(ahead) >= -1e-9
    assert np.abs(calm[:, 0] - poses[:, 0]).max() < 0.3


def test_nonsense_is_left_for_the_validator():
    poses = np.stack([-3.0 * TIMES, 0 * TIMES, 0 * TIMES], axis=-1)
    assert np.array_equal(settled(poses, TIMES, 5.0), poses)


@pytest.mark.parametrize('step_s', [0.5, 0.1])
def test_driving_and_a_slow_start_are_not_touched(step_s):
    times_s = np.arange(1, round(5 / step_s) + 1) * step_s
    drive = np.stack([6.0 * times_s, 0.2 * times_s, 0 * times_s], axis=-1)
    assert np.array_equal(settled(drive, times_s, 6.0), drive)
    start = np.stack([0.5 * times_s**2, 0 * times_s, 0 * times_s], axis=-1)
    calm = settled(start, times_s, 0.0)
    assert np.abs(calm - start).max() < 0.05
    assert np.array_equal(calm[-1], start[-1])


def test_a_plan_that_overshoots_its_halt_does_not_roll_back() -> None:
    """Even a large step back, a wavering of the far waypoints, is no way to drive."""
    along = np.array([2.0, 3.5, 4.2, 3.4, 3.9, 3.3, 4.0, 3.2, 3.6, 3.1])
    poses = np.stack([along, np.zeros(10), np.zeros(10)], axis=-1)
    calm = settled(poses, TIMES, 4.0)
    assert np.array_equal(calm[:3], poses[:3])
    assert (calm[3:] == poses[2]).all()
