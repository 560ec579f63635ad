"""Every planted hack is found by its own check and by no other; honest models pass."""

from dataclasses import replace

import numpy as np
import pytest

from spanvla_ros.training.lint import CHECKS, Behaviour, lint

TIMES_S = 0.5 * np.arange(1, 11)
ROWS, GROUP = 40, 6


@pytest.fixture
def honest():
    rng = np.random.default_rng(0)
    speeds = np.maximum(rng.normal(7.0, 1.0, (ROWS, GROUP)), 2.0)
    poses = np.zeros((ROWS, GROUP, 10, 3))
    poses[..., 0] = speeds[..., None] * TIMES_S
    reference = np.zeros((ROWS, 10, 3))
    reference[..., 0] = 7.0 * TIMES_S
    one = np.ones((ROWS, GROUP))
    slow = np.zeros((ROWS, GROUP), bool)
    slow[:, :2] = True
    good = np.where(rng.random((ROWS, GROUP)) < 0.95, 1.0, 0.0)
    return Behaviour(TIMES_S, poses, one.astype(bool), slow, good, one, 0.85 * one, one, reference)


def reverses(x):
    poses = x.poses.copy()
    poses[:, 0, -2:, 0] = poses[:, 0, -3:-2, 0] - [0.4, 0.8]
    return replace(x, poses=poses)


def stands(x):
    poses = x.poses.copy()
    poses[: ROWS // 4] = 0.0
    return replace(x, poses=poses + 1e-6 * np.random.default_rng(1).normal(size=poses.shape))


def shakes(x):
    comfort = x.comfort.copy()
    comfort[: ROWS // 4] = 0.0
    return replace(x, comfort=comfort)


def rushes(x):
    nc = x.nc.copy()
    nc[: ROWS // 5] = 0.0
    return replace(x, nc=nc, ep=x.ep + 0.1)


def stops_thinking(x):
    return replace(x, slow=np.zeros_like(x.slow))


def says_one_thing(x):
    poses = x.poses.copy()
    poses[:] = poses.mean(axis=1, keepdims=True)
    return replace(x, poses=poses)


HACKS = {
    'reversal': reverses,
    'standing': stands,
    'comfort_collapse': shakes,
    'progress_inflation': rushes,
    'think_collapse': stops_thinking,
    'diversity_loss': says_one_thing,
}


@pytest.mark.parametrize('name', HACKS)
def test_a_planted_hack_is_found_and_told(honest, name):
    found = lint(honest, HACKS[name](honest))
    assert [one.check for one in found] == [name]
    assert any(letter.isdigit() for letter in found[0].why)


def test_every_check_has_a_planted_hack():
    assert set(HACKS) == set(CHECKS)


def test_an_honest_model_passes_whatever_it_improves(honest):
    assert lint(honest, honest) == []
    better = replace(honest, ep=honest.ep + 0.1, nc=np.ones_like(honest.nc))
    assert lint(honest, better) == []
    # What was bad before is not the checkpoint's doing.
    for hack in HACKS.values():
        assert lint(hack(honest), hack(honest)) == []


def test_a_stop_that_the_reference_makes_too_is_no_hack(honest):
    poses, reference = honest.poses.copy(), honest.reference.copy()
    poses[:10], reference[:10] = 0.0, 0.0
    still = replace(honest, poses=poses, reference=reference)
    assert 'standing' not in [f.check for f in lint(honest, still)]


def test_answers_that_are_no_trajectory_are_left_out(honest):
    broken = reverses(honest)
    valid = broken.valid.copy()
    valid[:, 0] = False
    assert lint(honest, replace(broken, valid=valid)) == []


def test_progress_is_no_hack_where_the_loss_of_safety_is_noise(honest):
    nc = honest.nc.copy()
    nc[3, :] = 0.0
    found = lint(honest, replace(honest, nc=nc, ep=honest.ep + 0.1))
    assert found == []
