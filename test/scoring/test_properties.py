"""What must hold for scores whatever the scene: invariance, batching, order, and plain sense."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spanvla_ros.geometry import wrap_angle
from spanvla_ros.scoring.pdms import PreviousPlan, Scorer, score_scenes
from spanvla_ros.scoring.reference import Reference
from spanvla_ros.types import (
    Scene,
    SceneAgent,
    SceneEgo,
    SceneLane,
    SceneLight,
    SceneMap,
    SceneRoadblock,
    SpanvlaError,
)

SPEED = 8.0


def road(length: float = 200.0, width: float = 4.0) -> Scene:
    """A straight road along x with one lane, the ego in its middle at 8 m/s."""
    ring = np.array([[-50.0, -width], [length, -width], [length, width], [-50.0, width]])
    line = np.array([[-50.0, 0.0], [length, 0.0]])
    block = SceneRoadblock('A', False, ring, (SceneLane('a', line, ring, 15.0, ()),))
    return Scene('road', SceneEgo(0.0, 0.0, 0.0, SPEED), SceneMap((block,)), ('A',))


def box(x: float, y: float = 0.0, vx: float = 0.0, kind: str = 'vehicle') -> SceneAgent:
    times = np.array([-1.0, 6.0])
    states = np.array([[x + vx * t, y, 0.0, vx, 0.0] for t in times])
    return SceneAgent('other', kind, 4.0, 2.0, 1.5, times, states)


def straight(speed: float = SPEED, lateral: float = 0.0) -> np.ndarray:
    t = np.arange(1, 9) * 0.5
    return np.stack([speed * t, np.full(8, lateral), np.zeros(8)], axis=-1)


def reference(scene: Scene, speed: float = SPEED) -> Reference:
    t = np.arange(41) * 0.1
    plan = np.stack([speed * t, np.zeros(41), np.zeros(41)], axis=-1)
    return Reference(scene.map.roadblocks[0].lanes[0].centerline, ('a',), plan, multiplier=1.0)


def one(scene: Scene, plan: np.ndarray, version: str = 'v2', **options: object):
    return Scorer(scene, version, reference(scene)).score(plan[None], **options)[0]


def moved_points(points: np.ndarray, turn: float, shift: np.ndarray) -> np.ndarray:
    cos, sin = np.cos(turn), np.sin(turn)
    return points @ np.array([[cos, sin], [-sin, cos]]) + shift


def moved(scene: Scene, turn: float, shift: np.ndarray) -> Scene:
    """The same scene, rotated about the world's origin and shifted."""

    def points(array: np.ndarray) -> np.ndarray:
        return moved_points(array, turn, shift)

    def poses(array: np.ndarray) -> np.ndarray:
        return np.column_stack([points(array[:, :2]), array[:, 2] + turn])

    def ego(state: SceneEgo) -> SceneEgo:
        x, y = points(np.array([[state.x_m, state.y_m]]))[0]
        return replace(state, x_m=float(x), y_m=float(y), yaw_rad=state.yaw_rad + turn)

    def lane(one: SceneLane) -> SceneLane:
        return replace(one, centerline=points(one.centerline), polygon=points(one.polygon))

    def states(array: np.ndarray) -> np.ndarray:
        velocity = moved_points(array[:, 3:], turn, np.zeros(2))
        return np.column_stack([poses(array[:, :3]), velocity])

    blocks = tuple(
        replace(b, polygon=points(b.polygon), lanes=tuple(lane(one) for one in b.lanes))
        for b in scene.map.roadblocks
    )
    return replace(
        scene,
        ego=ego(scene.ego),
        ego_history=tuple(ego(state) for state in scene.ego_history),
        human=None if scene.human is None else poses(scene.human),
        agents=tuple(replace(a, states=states(a.states)) for a in scene.agents),
        map=SceneMap(
            blocks,
            tuple(points(ring) for ring in scene.map.intersections),
            tuple(points(ring) for ring in scene.map.carparks),
        ),
    )


def values(scores) -> list[float]:
    numbers = [
        getattr(score, field.name)
        for score in scores
        for field in fields(score)
        if isinstance(getattr(score, field.name), float | None)
    ]
    return [np.nan if value is None else value for value in numbers]


def drift(*lateral: float) -> np.ndarray:
    """A plan along the road that is so far to the left at each half second."""
    plan = straight()
    plan[:, 1] = lateral
    plan[:, 2] = np.arctan2(np.diff([0.0, *lateral]), SPEED / 2.0)
    return plan


@pytest.mark.parametrize('version', ['v1', 'v2'])
@pytest.mark.parametrize(('turn', 'shift'), [(0.7, (30.0, -80.0)), (-2.5, (4.5e5, -3.9e6))])
def test_turning_and_shifting_the_world_changes_nothing(golden, version, turn, shift):
    for name in ('syn_d037', 'syn_d072'):
        scene, plans = golden.scenes[name], golden.plans(name)
        given = golden.reference(name, version)
        shifted = np.array(shift)
        turned = replace(
            given,
            centerline=moved_points(given.centerline, turn, shifted),
            plan=np.column_stack(
                [moved_points(given.plan[:, :2], turn, shifted), given.plan[:, 2] + turn]
            ),
            states=None,
        )
        world = moved(scene, turn, shifted)
        local = np.stack(
            [
                np.column_stack([moved_points(p[:, :2], turn, shifted), p[:, 2] + turn])
                for p in plans
            ]
        )
        before = Scorer(scene, version, given).score(plans, frame='world')
        after = Scorer(world, version, turned).score(local, frame='world')
        np.testing.assert_allclose(values(before), values(after), atol=2e-5)


def test_retiming_the_past_of_a_still_object_changes_nothing():
    scene = replace(road(), agents=(box(60.0, 1.5),))
    still = replace(
        scene.agents[0], times_s=np.array([-7.0, 9.0]), states=scene.agents[0].states.copy()
    )
    longer = replace(scene, agents=(still,))
    for version in ('v1', 'v2'):
        assert one(scene, straight(), version) == one(longer, straight(), version)


@pytest.mark.parametrize('version', ['v1', 'v2'])
def test_a_batch_equals_its_rows_and_order_is_irrelevant(golden, version):
    for name in ('syn_d091', 'syn_d072'):
        scorer = Scorer(golden.scenes[name], version, golden.reference(name, version))
        plans = golden.plans(name)
        together = scorer.score(plans, frame='world')
        alone = [scorer.score(plan[None], frame='world')[0] for plan in plans]
        np.testing.assert_allclose(values(together), values(alone), atol=1e-9)
        order = np.random.default_rng(3).permutation(len(plans))
        shuffled = scorer.score(plans[order], frame='world')
        expected = [together[at] for at in order]
        np.testing.assert_allclose(values(shuffled), values(expected), atol=1e-9)


def test_many_scenes_at_once_score_like_each_alone(golden):
    names = ('syn_d037', 'syn_d072', 'syn_d091')
    scorers = [Scorer(golden.scenes[n], 'v2', golden.reference(n, 'v2')) for n in names]
    plans = [golden.plans(name) for name in names]
    together = score_scenes(scorers, plans, frame='world')
    for scorer, group, scores in zip(scorers, plans, together, strict=True):
        alone = scorer.score(group, frame='world')
        np.testing.assert_allclose(values(scores), values(alone), atol=1e-9)
    assert score_scenes([], []) == []
    with pytest.raises(SpanvlaError, match='2 groups for 3 scenes'):
        score_scenes(scorers, plans[:2])


def test_ego_and_world_frames_agree(golden):
    scene = golden.scenes['syn_d037']
    scorer = Scorer(scene, 'v2', golden.reference('syn_d037', 'v2'))
    world = golden.plans('syn_d037')
    cos, sin = np.cos(scene.ego.yaw_rad), np.sin(scene.ego.yaw_rad)
    gap = world[..., :2] - [scene.ego.x_m, scene.ego.y_m]
    local = np.concatenate(
        [
            gap @ np.array([[cos, -sin], [sin, cos]]),
            wrap_angle(world[..., 2:] - scene.ego.yaw_rad),
        ],
        axis=-1,
    )
    np.testing.assert_allclose(
        values(scorer.score(world, frame='world')), values(scorer.score(local)), atol=1e-6
    )


@settings(max_examples=8)
@given(speed=st.floats(2.0, 14.0), gap=st.floats(15.0, 45.0))
def test_a_plan_into_a_stopped_car_never_beats_the_same_plan_without_it(speed, gap):
    clear = road()
    blocked = replace(clear, agents=(box(gap),))
    free, hit = one(clear, straight(speed)), one(blocked, straight(speed))
    assert hit.nc <= free.nc
    assert hit.ttc <= free.ttc
    assert hit.total <= free.total


def test_a_later_collision_cannot_beat_none():
    blocked = replace(road(), agents=(box(26.0),))
    braking = straight()
    braking[:, 0] = [3.5, 6.3, 8.4, 9.8, 10.5, 10.7, 10.8, 10.8]
    for version in ('v1', 'v2'):
        stops, hits = one(blocked, braking, version), one(blocked, straight(), version)
        assert stops.nc == 1.0
        assert (hits.nc, hits.total) == (0.0, 0.0)
        assert hits.collision_s is not None
        assert hits.ttc_infraction_s <= hits.collision_s
        assert stops.total > hits.total


def test_an_object_costs_half_and_an_onlooker_nothing():
    cone = replace(road(), agents=(box(20.0, kind='traffic_cone'),))
    assert one(cone, straight()).nc == 0.5
    beside = replace(road(width=10.0), agents=(box(20.0, y=6.0),))
    assert one(beside, straight()).nc == 1.0


def test_being_hit_from_behind_is_not_the_egos_fault():
    rammed = replace(road(), agents=(box(-12.0, vx=14.0),))
    scores = one(rammed, straight(4.0))
    assert scores.nc == 1.0
    assert scores.collision_s is None


def test_leaving_the_road_costs_everything():
    assert one(road(), straight(lateral=0.0)).dac == 1.0
    away = straight()
    away[:, 1], away[:, 2] = np.linspace(0.0, 12.0, 8), 0.4
    off = one(road(), away)
    assert (off.dac, off.total) == (0.0, 0.0)


def test_a_red_light_binds_only_v2_and_only_while_red():
    crossing = np.array([[20.0, -4.0], [30.0, -4.0], [30.0, 4.0], [20.0, 4.0]])
    line = np.array([[20.0, 0.0], [30.0, 0.0]])
    connector = SceneRoadblock('C', True, crossing, (SceneLane('c', line, crossing, None, ()),))
    scene = road()
    scene = replace(scene, map=SceneMap((*scene.map.roadblocks, connector)), route=('A', 'C'))
    red = replace(scene, red_lights=(SceneLight('c'),))
    early = replace(scene, red_lights=(SceneLight('c', to_s=0.4),))
    elsewhere = replace(red, route=('A',))
    assert one(red, straight()).tlc == 0.0
    assert one(early, straight()).tlc == 1.0
    assert one(elsewhere, straight()).tlc == 1.0
    assert one(red, straight(), 'v1').total == one(scene, straight(), 'v1').total


def test_lane_keeping_ends_after_two_seconds_beside_the_line():
    swerve = drift(0.3, 0.9, 1.2, 1.2, 1.2, 1.2, 1.2, 1.2)
    brief = drift(0.3, 0.9, 1.2, 0.6, 0.1, 0.0, 0.0, 0.0)
    assert one(road(), straight()).lk == 1.0
    assert one(road(), brief).lk == 1.0
    assert one(road(), swerve).lk == 0.0


def test_extended_comfort_compares_with_the_plan_before():
    scene = road()
    before = SceneEgo(-SPEED / 2.0, 0.0, 0.0, SPEED)
    same = PreviousPlan(before, straight() - [SPEED / 2.0, 0.0, 0.0])
    other = straight()
    other[:, 0] = [2.0, 3.0, 3.5, 3.6, 3.6, 3.6, 3.6, 3.6]
    agreed = one(scene, straight(), previous=same)
    changed = one(scene, straight(), previous=PreviousPlan(before, other))
    assert agreed.ec == 1.0
    assert changed.ec == 0.0
    assert agreed.total > changed.total
    assert one(scene, straight()).ec is None


def test_what_a_human_fails_is_forgiven():
    scene = road()
    away = straight()
    away[:, 1], away[:, 2] = np.linspace(0.0, 12.0, 8), 0.4
    lost = replace(scene, human=away)
    scores = one(lost, away)
    assert (scores.unfiltered.dac, scores.dac) == (0.0, 1.0)
    assert Scorer(lost, 'v2', reference(lost), human_filter=False).score(away[None])[0].dac == 0.0
    assert one(lost, away, 'v1').dac == 0.0


@pytest.mark.parametrize(
    ('plans', 'sentence'),
    [
        (np.full((1, 8, 3), np.nan), r'trajectories\[0\]: holds a number that is not finite'),
        (np.zeros((1, 7, 3)), 'shorter than 4 s'),
        (np.zeros((8, 3)), 'is not'),
    ],
)
def test_what_cannot_be_scored_is_refused_not_zero(plans, sentence):
    scorer = Scorer(road(), 'v1', reference(road()))
    with pytest.raises(SpanvlaError, match=sentence):
        scorer.score(plans)


def test_a_route_without_lanes_is_refused():
    scene = road()
    block = replace(scene.map.roadblocks[0], lanes=())
    with pytest.raises(SpanvlaError, match='its route has no lane'):
        Scorer(replace(scene, map=SceneMap((block,))))


def test_ten_pose_plans_score_like_their_first_four_seconds():
    scorer = Scorer(road(), 'v2', reference(road()))
    beyond = straight()[-2:] + np.array([8.0, 5.0, 0.0])
    longer = np.concatenate([straight(), beyond])
    assert scorer.score(longer[None]) == scorer.score(straight()[None])
