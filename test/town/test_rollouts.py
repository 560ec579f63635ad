"""Moments of a driver's own drives: where they come from, and what is left out."""

import numpy as np

from spanvla_ros.geometry import local_from_world
from spanvla_ros.model.config import ModelConfig
from spanvla_ros.town.driver import BlindRouteFollower, ReferenceDriver, reference_plan
from spanvla_ros.town.rollouts import FARTHEST_OFFSET_M, rollout_snapshots
from spanvla_ros.town.scenarios import make_world
from spanvla_ros.town.snapshots import sample_snapshots


class Diary:
    """A driver that writes down where it was asked."""

    def __init__(self, driver):
        self.driver, self.poses = driver, []

    def plan(self, observation):
        self.poses.append((observation.stamp_ns, observation.ego.pose))
        return self.driver.plan(observation)


def moments(driver_of, family='lane_keeping', seed=5, count=12):
    world = make_world(family, seed)
    diary = Diary(driver_of(world))
    rng = np.random.default_rng(0)
    return rollout_snapshots(world, diary, ModelConfig(), rng, count), diary


def test_pasts_are_the_way_that_was_driven():
    found, diary = moments(ReferenceDriver)
    assert len(found) == 12
    stamps = np.array([stamp for stamp, _ in diary.poses])
    xy = np.array([pose for _, pose in diary.poses])
    checked = 0
    for snapshot in found:
        at = int(np.argmin(np.linalg.norm(xy[:, :2] - snapshot.ego.pose[:2], axis=1)))
        for back_s, pose in zip((1.5, 1.0, 0.5), snapshot.history, strict=True):
            then = stamps[at] - back_s * 1e9
            if then < stamps[0]:
                continue
            # Plans are 0.2 s apart, so their places are interpolated.
            place = [np.interp(then, stamps, xy[:, axis]) for axis in (0, 1, 2)]
            expected = local_from_world(snapshot.ego.pose, np.array([place]))[0]
            np.testing.assert_allclose(pose[:2], expected[:2], atol=0.05)
            checked += 1
    assert checked > 20


def test_the_reference_says_what_it_would_do_from_there():
    for snapshot in moments(ReferenceDriver)[0]:
        np.testing.assert_array_equal(snapshot.plan.poses, reference_plan(snapshot.world).poses)
        assert snapshot.ego == snapshot.world.ego


def test_a_worse_driver_gives_moments_farther_off_the_line_but_none_beyond_telling():
    blind, _ = moments(lambda world: BlindRouteFollower(), count=40)
    seeing, _ = moments(ReferenceDriver, count=40)
    off = [np.abs([s.world.ego_d_m for s in some]) for some in (blind, seeing)]
    assert np.median(off[0]) > 1.3 * np.median(off[1])
    assert off[0].max() <= FARTHEST_OFFSET_M


def test_wide_moments_head_back_to_the_line_and_leave_the_others_as_they_were():
    plain = sample_snapshots('lane_keeping', 3, 8)
    wide = sample_snapshots('lane_keeping', 3, 8, wide_share=1.0)
    for one, other in zip(plain, wide, strict=True):
        assert one.world.ego_s_m - other.world.ego_s_m < 1.0
        if other.ego.speed_mps < 0.2 or abs(other.world.ego_d_m) < 0.3:
            continue
        road = other.world.corridor.place(other.world.ego_s_m, 0.0)[2]
        lean = np.sin(other.world.state.yaw_rad - road)
        assert lean * other.world.ego_d_m < 0.02
    assert max(abs(s.world.ego_d_m) for s in wide) > max(abs(s.world.ego_d_m) for s in plain)
