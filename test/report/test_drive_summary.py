"""The reader of a drive against numbers worked out by hand."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from report import drive_bag
from report.drive_bag import MS, START_NS, small_drive, straight, text

from spanvla_ros.report.drive_summary import route_completion, summarise, summary_of
from spanvla_ros.report.recording import read_recording
from spanvla_ros.types import SpanvlaError, Vehicle

# From the arrival of the first plan (60 ms) to that of the last odometry (4000 ms).
SECONDS = 3.94


@pytest.fixture(scope='module')
def summary(tmp_path_factory):
    return summarise(small_drive().write(tmp_path_factory.mktemp('drive') / 'bag'))


def test_rates(summary):
    assert summary['seconds'] == pytest.approx(SECONDS)
    assert summary['plans'] == 40
    assert summary['plan_hz'] == pytest.approx(39 / SECONDS, abs=1e-4)
    assert summary['vision_hz'] == pytest.approx(39 / SECONDS, abs=1e-4)
    assert summary['output_hz'] == pytest.approx(78 / SECONDS, abs=1e-4)
    assert summary['camera_hz'] == pytest.approx(10.0)


def test_gaps_and_ages(summary):
    # 76 gaps of 50 ms and one of 100: rank 0.99 * 76 = 75.24 lies 0.24 of the way to the last.
    assert summary['output_gap_ms'] == {'p50': 50.0, 'p99': 62.0, 'max': 100.0}
    assert summary['output_silence_at_end_ms'] == pytest.approx(20.0)
    # 39 plans at 60 ms, one at 70: rank 38.61.
    assert summary['kv_age_ms'] == {'p50': 60.0, 'p99': 66.1, 'max': 70.0}
    assert summary['output_kv_age_ms']['max'] == pytest.approx(230.0)
    assert summary['stage_ms']['vision'] == {'p50': 10.0, 'p99': 10.0}


def test_a_recorder_that_stood_still_stretches_arrivals_and_no_stamps(tmp_path):
    recording = read_recording(small_drive().write(tmp_path / 'bag'))
    # All that came from 1.0 to 1.3 s comes at 1.3 s.
    late = [
        replace(o, received_ns=max(o.received_ns, START_NS + 1300 * MS))
        if 1000 * MS <= o.received_ns - START_NS < 1300 * MS
        else o
        for o in recording.outputs
    ]
    found = summary_of(replace(recording, outputs=tuple(late)), Vehicle())
    # 980 ms, 1300, 1300, ...: the outputs are at 80 + 50 n.
    assert found['output_gap_ms']['max'] == 320.0
    assert found['output_stamp_gap_ms'] == {'p50': 50.0, 'p99': 62.0, 'max': 100.0}


def test_fresh_outputs_follow_a_young_plan_and_a_willing_guardian(summary):
    # 2130 ms comes 170 ms after the last plan; 3030 to 3180 are FALLBACK.
    assert summary['fresh_share'] == pytest.approx(73 / 78, abs=1e-4)


def test_states(summary):
    assert summary['states'] == pytest.approx(
        {'OK': 3740 / 3940, 'FALLBACK': 200 / 3940}, abs=1e-4
    )
    assert summary['degraded'] == {'camera_missing:front_left': 5}


def test_driving(summary):
    assert summary['distance_m'] == pytest.approx(8.0 * SECONDS)
    assert summary['route_completion'] == pytest.approx(31.5 / 49.0, abs=1e-4)
    assert summary['collisions'] == 1
    assert summary['offroad_m'] == 0.0
    assert summary['red_lights_run'] == 1


def test_words(summary):
    assert summary['reasoning'] == {
        'episodes': 2,
        'tokens_per_s': pytest.approx(8 / SECONDS, abs=1e-4),
        'last': 'accelerate , keep',
    }
    assert summary['agreement'] == pytest.approx(39 / 40)
    assert summary['slow_share'] == pytest.approx(0.5)


def test_labels(summary):
    assert (summary['scenario'], summary['seed']) == ('lane_keeping', 3)
    assert summary['scenario_ranges_sha256'] == 'f00'
    assert (summary['driver'], summary['backend'], summary['steps']) == (
        'model',
        'onnxruntime',
        '5',
    )
    assert summary['versions']['python'] == '.'.join(map(str, sys.version_info[:3]))


def test_all_outputs_are_valid_and_the_whole_is_json(summary):
    assert (summary['invalid_trajectories'], summary['invalid_reasons']) == (0, {})
    json.dumps(summary, allow_nan=False)


def test_a_light_that_turns_red_behind_the_bumper_is_not_run(tmp_path):
    # The bumper enters lane B0 at x = 30 - 4.049 m, that is at 3.244 s.
    late = summarise(small_drive(red_from_ms=3400).write(tmp_path / 'late'))
    assert late['red_lights_run'] == 0
    early = summarise(small_drive(red_from_ms=3200).write(tmp_path / 'early'))
    assert early['red_lights_run'] == 1


def test_no_agent_no_collision(tmp_path):
    assert summarise(small_drive(agents=()).write(tmp_path / 'bag'))['collisions'] == 0


def test_leaving_the_road_counts_the_way_driven_beside_it(tmp_path):
    bag = small_drive()
    for row in bag.rows:
        if row[1].endswith('town/scene'):
            row[3].data = row[3].data.replace('-4.0]', '-1.0]').replace(' 4.0]', ' 1.0]')
    # Scenes of the window lie at 100 .. 4000 ms, 0.8 m apart; the car is wider than 2 m.
    assert summarise(bag.write(tmp_path / 'bag'))['offroad_m'] == pytest.approx(39 * 0.8)


def test_an_impossible_output_is_found(tmp_path):
    bag = small_drive()
    at = next(i for i, row in enumerate(bag.rows) if row[1].endswith('output/trajectory'))
    poses = straight(0.64)
    poses[20:, 0] += 5.0
    when, topic, kind, _ = bag.rows[at]
    broken = drive_bag.trajectory(START_NS + 80 * MS, poses, 0.1, 8.0)
    bag.rows[at] = (when, topic, kind, broken)
    found = summarise(bag.write(tmp_path / 'bag'))
    assert found['invalid_trajectories'] == 1
    assert found['invalid_reasons'] == {'acceleration': 1, 'speed': 1, 'velocity': 1}


def test_a_route_that_crosses_itself_is_followed_in_order():
    loop = np.array([[0, 0], [40, 0], [40, 20], [20, 20], [20, -40]], dtype=float)
    before_crossing = np.stack([np.linspace(0, 20, 40), np.zeros(40)], axis=1)
    # 20 of 140 m are driven, though the end of the route passes the same place.
    assert route_completion(loop, before_crossing) == pytest.approx(20 / 139.5, abs=0.005)


def test_a_recording_without_a_drive_is_refused(tmp_path):
    bag = drive_bag.Bag()
    bag.add(0, 'plan', 'std_msgs/msg/String', drive_bag.text(drive_bag.plan(START_NS, 0.0, 0)))
    with pytest.raises(SpanvlaError, match='no drive'):
        read_recording(bag.write(tmp_path / 'bag'))
    with pytest.raises(SpanvlaError, match='no such bag'):
        read_recording(tmp_path / 'nothing')


def test_a_shadow_planner_is_measured_against_the_driven_plans(tmp_path):
    bag = small_drive()
    for number in range(10, 20):
        stamp = START_NS + number * 100 * MS
        told = drive_bag.plan(stamp, 0.8 * number, number)
        # Nobody drove these: they drift aside by 0.1 m for each half second.
        poses = told['trajectory']['poses']
        for k, pose in enumerate(poses):
            pose[1] = 0.1 * (k + 1)
        bag.add(number * 100 + 60, 'shadow/plan', 'std_msgs/msg/String', text(told))
    found = summarise(bag.write(tmp_path / 'bag'))
    shadow = found['shadow']
    assert (shadow['plans'], shadow['compared']) == (10, 10)
    assert shadow['mean_m']['p50'] == pytest.approx(0.55, abs=0.01)
    assert shadow['end_m']['p50'] == pytest.approx(1.0, abs=0.01)
    assert summarise(small_drive().write(tmp_path / 'plain'))['shadow'] is None
