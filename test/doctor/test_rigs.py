"""The doctor on recorded rigs: mis-set ones are named, right ones left in peace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from drives import scaled, town_drive
from rigs import MIS_SET, random_faults, random_rig, record, write
from rosbags.rosbag2 import StoragePlugin

from spanvla_ros.doctor.command import check_rig, rig_of_bag
from spanvla_ros.doctor.findings import CATALOG, Finding
from spanvla_ros.model.config import TOWN_CAMERAS

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / 'shared' / 'real'
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason='../shared is not here')


def judged(bag: Path) -> list[Finding]:
    return check_rig(rig_of_bag(str(bag), TOWN_CAMERAS))


def above_info(findings: list[Finding]) -> dict[str, str]:
    return {f.id: f.what for f in findings if f.severity != 'info'}


@pytest.fixture(autouse=True)
def default_shared_memory(monkeypatch):
    for name in ('FASTDDS_DEFAULT_PROFILES_FILE', 'RMW_IMPLEMENTATION'):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope='module')
def drive():
    return town_drive('turns', 3, scaled(TOWN_CAMERAS, 2))


@pytest.mark.parametrize('storage', [StoragePlugin.MCAP, StoragePlugin.SQLITE3])
def test_a_right_rig_is_left_in_peace(drive, tmp_path, storage):
    assert above_info(judged(write(record(drive), tmp_path / 'bag', storage))) == {}


@pytest.mark.parametrize('name', MIS_SET)
def test_each_mis_set_rig_of_the_list_is_named(drive, tmp_path, name):
    plant, finding_id = MIS_SET[name]
    bag = write(plant(drive, np.random.default_rng(1)), tmp_path / 'bag')
    findings = {f.id: f for f in judged(bag)}
    assert finding_id in findings
    assert findings[finding_id].severity in ('warn', 'block')
    assert '{' not in findings[finding_id].fix
    # One fault is not told as many: at most one more finding hangs on it.
    assert len(above_info(list(findings.values()))) <= 2


def test_a_route_that_nobody_gets(drive, tmp_path):
    rig = record(drive)
    rig.offers['/route'] = (False, False)
    assert set(above_info(judged(write(rig, tmp_path / 'a')))) == {'qos_route'}
    rig.offers['/route'] = (True, False)
    assert set(above_info(judged(write(rig, tmp_path / 'b')))) == {'route_not_latched'}


def test_a_mirrored_route_is_told_from_a_mirrored_odometry(drive, tmp_path):
    bag = write(record(drive, route_points=drive.route * [1.0, -1.0]), tmp_path / 'bag')
    assert set(above_info(judged(bag))) == {'route_mirrored'}


def test_large_raw_pictures_need_the_shipped_profile(drive, tmp_path, monkeypatch):
    bag = write(record(drive, raw=True, row_padding=1600), tmp_path / 'bag')
    findings = {f.id: f for f in judged(bag)}
    assert set(above_info(list(findings.values()))) == {'picture_size_shm'}
    profile = ROOT / 'config' / 'fastdds_shm.xml'
    assert str(profile) in findings['picture_size_shm'].fix
    monkeypatch.setenv('FASTDDS_DEFAULT_PROFILES_FILE', str(profile))
    assert above_info(judged(bag)) == {}


def test_silent_slow_black_and_frozen_topics(drive, tmp_path):
    rig = record(drive, spoil_picture=lambda name, p: p * 0 if name == 'front' else
                 drive.pictures[0, 1])  # fmt: skip
    odometry = rig.of('/odom')
    rig.events = [e for e in rig.events if e.topic != '/odom'] + odometry[::25]
    for event in rig.of('front_left/camera_info'):
        event.stamp_s = 0.0
    seen = above_info(judged(write(rig, tmp_path / 'bag')))
    assert {'rate_low', 'picture_black'} <= set(seen)
    assert 'front/' in seen['picture_black']


def test_messages_that_contradict_themselves_block(drive, tmp_path):
    def spoil(fields):
        fields.x = float('nan')

    findings = {
        f.id: f for f in judged(write(record(drive, spoil_odometry=spoil), tmp_path / 'b'))
    }
    assert findings['message_refused'].severity == 'block'
    assert 'position holds a number that is not finite' in findings['message_refused'].what


@needs_real
def test_a_real_drive_has_no_finding_above_info(monkeypatch):
    findings = judged(REAL / 'kitti_drive')
    assert above_info(findings) == {}
    assert 'no_motion' not in {f.id for f in findings}


@needs_real
def test_a_real_simulator_recording_lacks_its_cameras_only():
    assert set(above_info(judged(REAL / 'carla_town01_recording'))) == {'camera_missing'}


@pytest.mark.slow
def test_twenty_right_rigs_drawn_at_random_have_no_finding_above_info(tmp_path):
    for seed in range(20):
        rig = random_rig(np.random.default_rng([11, seed]))
        assert above_info(judged(write(rig, tmp_path / str(seed)))) == {}, seed


@pytest.mark.slow
def test_nine_of_ten_rigs_composed_at_random_are_named_whole(tmp_path):
    named = []
    for seed in range(10):
        rng = np.random.default_rng([13, seed])
        faults = random_faults(rng)
        seen = above_info(judged(write(random_rig(rng, faults), tmp_path / str(seed))))
        named.append({MIS_SET[fault][1] for fault in faults} <= set(seen))
    assert sum(named) >= 9, named


def test_the_list_is_twelve_and_in_the_catalog():
    assert len(MIS_SET) == 12
    assert {finding_id for _, finding_id in MIS_SET.values()} <= set(CATALOG)
