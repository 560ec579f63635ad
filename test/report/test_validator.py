"""The independent validator: each fault is found, a sound trajectory is left alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spanvla_ros.geometry import box_corners
from spanvla_ros.report.recording import OutputRecord, Recording
from spanvla_ros.report.validator import boxes_overlap, faults_of, inside
from spanvla_ros.types import Vehicle

TIMES_S = 0.1 * np.arange(51)
NOW_NS = 1_700_000_000_000_000_000


def recording(speed_mps: float = 5.0) -> Recording:
    stamps = NOW_NS + 20_000_000 * np.arange(-5, 6)
    rows = np.zeros((11, 5))
    rows[:, 0] = speed_mps * (stamps - NOW_NS) * 1e-9
    rows[:, 3] = speed_mps
    return Recording((), (), (), (), stamps, stamps, rows, None, (), None, {}, {})


def arc(speed_mps: float, curvature_1pm: float, accel_mps2: float = 0.0) -> OutputRecord:
    """Exact poses of constant curvature and acceleration, from the origin."""
    stop_s = speed_mps / -accel_mps2 if accel_mps2 < 0 else np.inf
    t = np.minimum(TIMES_S, stop_s)
    s = speed_mps * t + 0.5 * accel_mps2 * t**2
    yaw = curvature_1pm * s
    if curvature_1pm:
        xy = np.stack([np.sin(yaw), 1.0 - np.cos(yaw)], axis=1) / curvature_1pm
    else:
        xy = np.stack([s, np.zeros_like(s)], axis=1)
    speeds = np.maximum(speed_mps + accel_mps2 * TIMES_S, 0.0)
    return OutputRecord(NOW_NS, NOW_NS, 'odom', TIMES_S, np.column_stack([xy, yaw]), speeds, 0.0)


@given(
    speed_mps=st.floats(0.0, 12.0),
    lateral=st.floats(-4.0, 4.0),
    accel_mps2=st.floats(-6.5, 1.5),
)
def test_what_the_vehicle_can_do_is_valid(speed_mps, lateral, accel_mps2):
    fastest = speed_mps + max(accel_mps2, 0.0) * 5.0
    curvature = np.clip(lateral / max(fastest, 1.0) ** 2, -0.2, 0.2)
    made = arc(speed_mps, float(curvature), accel_mps2)
    assert faults_of(made, None, recording(speed_mps), Vehicle()) == []


def broken(**changes) -> OutputRecord:
    return replace(arc(5.0, 0.0), **changes)


def moved(column: int, rows: slice, by: float) -> OutputRecord:
    poses = arc(5.0, 0.0).poses.copy()
    poses[rows, column] += by
    return broken(poses=poses)


@pytest.mark.parametrize(
    ('output', 'fault'),
    [
        (moved(0, slice(3, 4), np.nan), 'not_finite'),
        (broken(times_s=TIMES_S[::-1].copy()), 'times'),
        (broken(times_s=0.05 * np.arange(51)), 'horizon'),
        (broken(frame_id=''), 'frame'),
        (broken(tilt=0.1), 'quaternion'),
        (broken(stamp_ns=NOW_NS + 5_000_000_000), 'stamp'),
        (moved(0, slice(None), 1.0), 'start_position'),
        (moved(2, slice(None), 0.3), 'start_heading'),
        (moved(0, slice(30, None), -3.0), 'reversal'),
        (moved(1, slice(30, None), 0.5), 'sideways'),
        (arc(5.0, 0.4), 'curvature'),
        (arc(12.0, 0.1), 'lateral_acceleration'),
        (arc(5.0, 0.0, 5.0), 'acceleration'),
        (arc(5.0, 0.0, -9.0), 'acceleration'),
        (arc(18.0, 0.0, 2.0), 'speed'),
        (broken(speeds_mps=np.full(51, 7.0)), 'velocity'),
    ],
)
def test_each_fault_is_found(output, fault):
    assert fault in faults_of(output, None, recording(), Vehicle())


def test_a_jump_between_two_outputs_is_found():
    first = arc(5.0, 0.0)
    later = replace(moved(1, slice(None), 2.0), stamp_ns=NOW_NS + 50_000_000)
    assert 'jump' in faults_of(later, first, recording(), Vehicle())
    calm = replace(moved(0, slice(None), 0.25), stamp_ns=NOW_NS + 50_000_000)
    assert faults_of(calm, first, recording(), Vehicle()) == []


def test_leaving_the_announced_path_is_found():
    beside = np.array([[0.0, 0.0], [5.0, 0.0], [5.0, 60.0]])
    output = arc(5.0, 0.0)
    assert faults_of(output, None, replace(recording(), route=beside), Vehicle()) == ['corridor']
    along = np.array([[0.0, 1.0], [60.0, 1.0]])
    assert faults_of(output, None, replace(recording(), route=along), Vehicle()) == []


def test_inside_counts_a_concave_ring_right():
    ring = np.array([[0, 0], [4, 0], [4, 4], [2, 1], [0, 4]], dtype=float)
    assert inside(np.array([0.5, 2.0]), ring)
    assert inside(np.array([3.5, 2.0]), ring)
    assert not inside(np.array([2.0, 2.0]), ring)
    assert not inside(np.array([5.0, 1.0]), ring)


def test_boxes_overlap_where_one_corner_pokes_in():
    here = box_corners(np.array([0.0, 0.0, 0.0]), 4.0, 2.0)
    turned = np.array([2.0 + np.sqrt(2.0) - 0.05, 0.0, np.pi / 4])
    assert boxes_overlap(here, box_corners(turned, 2.0, 2.0))
    turned[0] += 0.1
    assert not boxes_overlap(here, box_corners(turned, 2.0, 2.0))
    # Both coordinate ranges overlap, the boxes do not: only a turned axis tells them apart.
    diagonal = box_corners(np.array([2.6, 1.9, -np.pi / 4]), 4.0, 0.4)
    assert not boxes_overlap(here, diagonal)
    diagonal -= 0.8
    assert boxes_overlap(here, diagonal)
