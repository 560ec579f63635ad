"""Scenes in, scenes out, and refusals that name the field."""

from __future__ import annotations

import contextlib
import copy
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spanvla_ros.scoring.scene import poses_from_json, scene_from_json, scene_to_json
from spanvla_ros.types import SpanvlaError


@pytest.fixture
def raw(golden):
    return copy.deepcopy(golden.raw_scenes['syn_d037'])


def square(x: float = 0.0, size: float = 10.0) -> list[list[float]]:
    return [[x, 0.0], [x + size, 0.0], [x + size, size], [x, size]]


def tiny_scene() -> dict:
    lane = {
        'id': 'a',
        'centerline': [[0.0, 5.0], [10.0, 5.0]],
        'polygon': square(),
        'speed_limit': None,
        'successors': [],
    }
    return {
        'scene': 'tiny',
        'ego': {'x': 1.0, 'y': 5.0, 'heading': 0.0, 'vx': 1.0},
        'route': ['A'],
        'map': {
            'roadblocks': [{'id': 'A', 'type': 'ROADBLOCK', 'polygon': square(), 'lanes': [lane]}]
        },
        'agents': [],
    }


def agent(name: str = 'x', **fields: object) -> dict:
    state = {'x': 1.0, 'y': 2.0, 'heading': 0.0, 'vx': 0.0, 'vy': 0.0}
    made = {'id': name, 'type': 'vehicle', 'length': 4.0, 'width': 2.0, 'height': 1.5}
    return {**made, 'states': [state], **fields}


def test_writing_and_reading_keep_everything(golden):
    for raw in list(golden.raw_scenes.values())[:3]:
        scene = scene_from_json(raw)
        again = scene_from_json(json.loads(json.dumps(scene_to_json(scene))))
        assert scene_to_json(again) == scene_to_json(scene)
        assert len(again.agents) == len(raw['agents'])
        assert again.route == tuple(raw['route'])
        assert len(again.ego_history) == len(raw.get('ego_history', []))


def test_a_human_in_the_ego_frame_is_moved_to_the_world(raw):
    if 'human_trajectory' not in raw:
        raw['human_trajectory'] = {'hz': 2, 'frame': 'ego', 'poses': [[1.0, 2.0, 0.1]] * 8}
    raw['human_trajectory']['poses'][0] = [3.0, 1.0, 0.2]
    ego, human = raw['ego'], scene_from_json(raw).human
    c, s = math.cos(ego['heading']), math.sin(ego['heading'])
    assert human[0] == pytest.approx(
        [ego['x'] + 3.0 * c - s, ego['y'] + 3.0 * s + c, ego['heading'] + 0.2]
    )


BOWTIE = [[0.0, 0.0], [10.0, 10.0], [10.0, 0.0], [0.0, 10.0]]
REFUSALS = {
    'ego.x: nan': lambda s: s['ego'].update(x=math.nan),
    'ego.vx: is missing': lambda s: s['ego'].pop('vx'),
    "ego.heading: 'north' is not a number": lambda s: s['ego'].update(heading='north'),
    'map.roadblocks: is empty': lambda s: s['map'].update(roadblocks=[]),
    'map.roadblocks[0].lanes: is empty': lambda s: s['map']['roadblocks'][0].update(lanes=[]),
    'map: is missing': lambda s: s.pop('map'),
    'map.roadblocks[0].polygon: the polygon crosses itself': lambda s: s['map']['roadblocks'][
        0
    ].update(polygon=BOWTIE),
    'map.roadblocks[0].lanes[0].polygon: the polygon crosses itself': lambda s: s['map'][
        'roadblocks'
    ][0]['lanes'][0].update(polygon=BOWTIE),
    'map.intersections[0]: the polygon crosses itself': lambda s: s['map'].update(
        intersections=[BOWTIE]
    ),
    'map.carparks[0]: a polygon needs three distinct points': lambda s: s['map'].update(
        carparks=[[[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]]
    ),
    'map.carparks[0]: the polygon has no area': lambda s: s['map'].update(
        carparks=[[[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]]
    ),
    'map.roadblocks[0].lanes[0].centerline: needs two': lambda s: s['map']['roadblocks'][0][
        'lanes'
    ][0].update(centerline=[[1.0, 1.0], [1.0, 1.0]]),
    "map.roadblocks: roadblock id 'A' is there twice": lambda s: s['map']['roadblocks'].append(
        s['map']['roadblocks'][0]
    ),
    "lane id 'a' is there twice": lambda s: s['map']['roadblocks'].append(
        {**s['map']['roadblocks'][0], 'id': 'B'}
    ),
    "route[0]: 'nowhere' is no roadblock": lambda s: s.update(route=['nowhere']),
    'route: is empty': lambda s: s.update(route=[]),
    "agents[0].type: 'ufo' is an unknown agent type": lambda s: s.update(
        agents=[agent(type='ufo')]
    ),
    "agents: agent id 'x' is there twice": lambda s: s.update(agents=[agent(), agent()]),
    'agents: 10000 items are more than': lambda s: s.update(
        agents=[agent(str(at)) for at in range(10_000)]
    ),
    'agents[0].width: must be positive': lambda s: s.update(agents=[agent(width=0.0)]),
    'agents[0].states: is empty': lambda s: s.update(agents=[agent(states=[])]),
    'agents[0].states[1].t: is missing': lambda s: s.update(
        agents=[agent(states=[{**agent()['states'][0], 't': 0.0}, agent()['states'][0]])]
    ),
    'agents[0].states: t must rise strictly': lambda s: s.update(
        agents=[agent(states=[{**agent()['states'][0], 't': 0.0}] * 2)]
    ),
    'agents[1].states[0].y: inf': lambda s: s.update(
        agents=[agent('a'), agent('b', states=[{**agent()['states'][0], 'y': math.inf}])]
    ),
    "red_lights[0].lane_id: 'z' is no lane": lambda s: s.update(red_lights=[{'lane_id': 'z'}]),
    'ego_history: must hold': lambda s: s.update(ego_history=[s['ego']]),
    'human_trajectory.poses: 3 poses at 2 Hz are shorter': lambda s: s.update(
        human_trajectory={'hz': 2, 'frame': 'ego', 'poses': [[0.0, 0.0, 0.0]] * 3}
    ),
}


@pytest.mark.parametrize('sentence', REFUSALS)
def test_a_fault_is_one_sentence_that_names_the_field(sentence):
    raw = tiny_scene()
    assert scene_from_json(copy.deepcopy(raw)).name == 'tiny'
    REFUSALS[sentence](raw)
    with pytest.raises(SpanvlaError) as refused:
        scene_from_json(raw)
    assert sentence in str(refused.value)
    assert '\n' not in str(refused.value)


def test_a_ring_that_touches_itself_within_rounding_is_repaired():
    raw = tiny_scene()
    ring = [
        [0.0, 0.0],
        [5.0, 0.0],
        [5.0, 1e-9],
        [10.0, 0.0],
        [10.0, 10.0],
        [5.0, 0.0],
        [0.0, 10.0],
    ]
    raw['map']['intersections'] = [ring]
    assert len(scene_from_json(raw).map.intersections) == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@given(
    field=st.sampled_from(['scene', 'ego', 'route', 'map', 'agents', 'red_lights', 'ego_history']),
    value=json_values,
)
def test_any_wrong_value_is_refused_or_read_but_never_crashes(field, value):
    raw = tiny_scene()
    raw[field] = value
    with contextlib.suppress(SpanvlaError):
        ego = scene_from_json(raw).ego
        assert np.isfinite([ego.x_m, ego.y_m, ego.yaw_rad]).all()


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        ({'hz': 3}, 'trajectory.hz: 3 is not one of'),
        ({'hz': True}, 'trajectory.hz'),
        ({'frame': 'map'}, "trajectory.frame: 'map' is neither"),
        ({'poses': [[0.0, 0.0, 0.0]] * 7}, 'trajectory.poses: 7 poses at 2 Hz are shorter than 4'),
        ({'poses': [[0.0, math.nan, 0.0]] * 8}, 'trajectory.poses[0][1]: nan'),
        ({'poses': [[0.0, 0.0]] * 8}, 'trajectory.poses[0]: must be a list of 3 numbers'),
        ({'poses': [[0.0, 0.0, 10**400]] * 8}, 'trajectory.poses[0][2]'),
    ],
)
def test_a_bad_trajectory_is_refused(change, sentence):
    raw = {'hz': 2, 'frame': 'ego', 'poses': [[1.0, 0.0, 0.0]] * 8, **change}
    ego = scene_from_json(tiny_scene()).ego
    with pytest.raises(SpanvlaError) as refused:
        poses_from_json(raw, 'trajectory', ego, (2, 10))
    assert sentence in str(refused.value)
