"""The codebook covers what cars do, and rolling keeps its error from adding up."""

import numpy as np
import pytest

from spanvla_ros.geometry import world_from_local
from spanvla_ros.model.action_tokens import (
    ActionCodebook,
    fit_codebook,
    load_codebook,
    segments_of,
    write_codebook,
)
from spanvla_ros.model.checkpoint import write_tensors
from spanvla_ros.model.flow import arc
from spanvla_ros.town.driver import STEP_S
from spanvla_ros.town.scenarios import FAMILIES, HELD_OUT_SEED
from spanvla_ros.town.snapshots import sample_snapshots
from spanvla_ros.types import SpanvlaError

TIMES = np.arange(0.5, 5.1, 0.5)


def motions(count, seed):
    rng = np.random.default_rng(seed)
    speed = np.maximum(0, rng.normal(5, 4, count))
    curvature = rng.normal(0, 0.03, count)
    step = np.array([0.5])
    return np.concatenate([arc(v, k, step) for v, k in zip(speed, curvature, strict=True)])


@pytest.fixture(scope='module')
def codebook():
    return fit_codebook(motions(3000, 0), 256)


def test_a_codebook_has_its_size_and_stands_still_first(codebook):
    assert codebook.motions.shape == (256, 3)
    assert not codebook.motions[0].any()
    assert len(np.unique(codebook.motions, axis=0)) == 256


def test_it_covers_motions_it_has_not_seen(codebook):
    fresh = motions(500, 1)
    reach = np.abs(fresh[:, None] - codebook.motions[None]) @ [1.0, 1.0, 2.6]
    assert np.quantile(reach.min(axis=1), 0.99) < 0.6


@pytest.mark.parametrize(('speed', 'curvature'), [(0.0, 0.0), (3.0, 0.05), (8.0, -0.03), (12, 0)])
def test_rolled_tokens_stay_on_the_path(codebook, speed, curvature):
    poses = arc(float(speed), float(curvature), TIMES)
    tokens = codebook.encode(poses)
    assert tokens.dtype == np.int64
    decoded = codebook.decode(tokens)
    assert np.linalg.norm(decoded[:, :2] - poses[:, :2], axis=1).max() < 0.6
    if speed == 0:
        assert not tokens.any()


def test_what_was_decoded_encodes_to_the_same_poses(codebook):
    tokens = np.random.default_rng(5).integers(0, 256, 10)
    poses = codebook.decode(tokens)
    np.testing.assert_allclose(codebook.decode(codebook.encode(poses)), poses, atol=1e-9)


def test_segments_put_together_are_the_trajectory():
    poses = arc(7.0, 0.04, TIMES)
    state = np.zeros(3)
    for segment, pose in zip(segments_of(poses), poses, strict=True):
        state = world_from_local(state, segment)
        np.testing.assert_allclose(state, pose, atol=1e-9)


def test_rare_large_motions_keep_their_own_token():
    crowd = motions(2000, 2)
    rare = np.array([[1.0, 0.3, 0.9]])
    book = fit_codebook(np.concatenate([crowd, rare]), 256)
    assert np.abs(book.motions - rare).sum(-1).min() < 0.3


def test_the_file_and_its_faults(tmp_path, codebook):
    write_codebook(tmp_path, codebook)
    np.testing.assert_allclose(load_codebook(tmp_path).motions, codebook.motions, atol=1e-6)
    path = tmp_path / 'action_codebook.safetensors'
    write_tensors(path, {'motions': np.full((4, 3), np.nan)})
    with pytest.raises(SpanvlaError, match='finite'):
        load_codebook(tmp_path)
    write_tensors(path, {'other': np.zeros(3)})
    with pytest.raises(SpanvlaError, match='no tensor'):
        load_codebook(tmp_path)
    path.write_bytes(b'\xff' * 40)
    with pytest.raises(SpanvlaError, match='safetensors'):
        load_codebook(tmp_path)


def test_too_few_segments_are_refused():
    with pytest.raises(SpanvlaError, match='at least 256'):
        fit_codebook(np.zeros((10, 3)))
    assert ActionCodebook(np.zeros((1, 3))).decode(np.zeros(2, np.int64)).shape == (2, 3)


def town_futures(first_seed, drives):
    """Futures over 5 s of the reference driver, as training rows hold them."""
    at = np.rint(TIMES / STEP_S).astype(int) - 1
    return [
        snapshot.plan.poses[at]
        for index in range(drives)
        for snapshot in sample_snapshots(FAMILIES[index % len(FAMILIES)], first_seed + index, 8)
    ]


@pytest.mark.slow
def test_held_out_town_trajectories_come_back_within_fifteen_centimetres():
    segments = np.concatenate([segments_of(poses) for poses in town_futures(0, 150)])
    held_out = town_futures(HELD_OUT_SEED, 30)
    errors = []
    for size in (256, 512):
        book = fit_codebook(segments, size)
        gaps = [book.decode(book.encode(poses)) - poses for poses in held_out]
        errors.append(np.linalg.norm(np.stack(gaps)[..., :2], axis=-1).mean())
    # The whole figure, to 2048 tokens, is in docs/action_heads.md.
    assert errors[1] < errors[0] <= 0.15
