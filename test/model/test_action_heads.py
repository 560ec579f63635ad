"""Each head's way from numbers or tokens to poses, against sums done by hand."""

import math

import numpy as np
import pytest
from scipy.cluster.vq import kmeans2

from spanvla_ros.model.action_heads import (
    HEADS,
    TRUNCATED_STEPS,
    AnswerError,
    ExpertHead,
    fit_anchors,
    head_of,
    kept_share,
    parse_waypoints,
    waypoint_text,
)
from spanvla_ros.model.action_tokens import ActionCodebook
from spanvla_ros.model.config import HEAD_KINDS, ModelConfig, bridged_layers, with_settings
from spanvla_ros.model.flow import Normalization
from spanvla_ros.model.prompt import PromptLayout, build_tokenizer
from spanvla_ros.types import PlanError

STD = np.tile([2.0, 0.5, 0.1], (10, 1))
SOURCES = np.cumsum(np.full((2, 10, 3), [4.0, 0.1, 0.01]), axis=1)


def config_of(head, **settings):
    return with_settings(ModelConfig(), head=head, **settings)


def plan(head, normalization, ask, steps=5, **settings):
    config = config_of(head, **settings)
    found = head_of(config)
    assert isinstance(found, ExpertHead)
    return found.plan(config, normalization, ask, steps, SOURCES)


def test_every_head_of_the_configuration_exists():
    assert set(HEADS) == set(HEAD_KINDS)


@pytest.mark.parametrize(
    ('interval', 'layers'), [(1, (0, 1, 2, 3, 4)), (2, (0, 2, 4)), (4, (0, 4)), (0, (4,))]
)
def test_bridged_layers(interval, layers):
    assert bridged_layers(5, interval) == layers


def test_the_flow_sums_its_velocities():
    seen = []

    def ask(x, at):
        seen.append((at, x.copy()))
        return np.full_like(x, 1.0 + at)

    poses = plan('flow', Normalization('history', STD), ask, steps=2)
    # Two half steps at velocities 1 and 1.5 end at 1.25 spreads beyond the source.
    np.testing.assert_allclose(poses, SOURCES + 1.25 * STD, rtol=1e-6)
    assert [at for at, _ in seen] == [0.0, 0.5]
    assert not seen[0][1].any()


def test_the_l1_head_is_asked_once_and_answers_the_trajectory():
    asked = []

    def ask(x, at):
        asked.append((at, float(np.abs(x).max())))
        return np.full_like(x, -0.5)

    poses = plan('l1', Normalization('history', STD), ask, steps=7, source='history')
    np.testing.assert_allclose(poses, SOURCES - 0.5 * STD, rtol=1e-6)
    assert asked == [(0.0, 0.0)]
    plan('l1', Normalization('gaussian', STD), ask, source='gaussian')
    assert asked[1] == (0.0, 0.0)


def test_diffusion_takes_the_best_scored_anchor_as_it_was_denoised_last():
    anchors = np.stack([np.full((10, 3), value) for value in (-1.0, 0.0, 2.0)])
    times = []

    def ask(x, at):
        times.append(at)
        clean = x + 0.25
        scores = np.broadcast_to(np.array([0.1, 0.3, 0.2])[:, None, None], (2, 3, 10, 1))
        return np.concatenate([clean, scores], -1).astype(np.float32)

    found = plan('diffusion', Normalization('history', STD, anchors), ask, steps=1, anchors=3)
    # One step: what was said of the noised second anchor, which is 0, plus 0.25.
    np.testing.assert_allclose(found, SOURCES + 0.25 * STD, rtol=1e-6)
    assert times == [0.0]
    times.clear()
    plan('diffusion', Normalization('history', STD, anchors), ask, steps=2, anchors=3)
    assert times == [0.0, 0.5]


def test_ddim_goes_straight_to_a_fixed_guess():
    """With the clean trajectory known, each step keeps the noise's direction and shrinks it."""
    anchors = np.full((1, 10, 3), 3.0)
    states = []

    def ask(x, at):
        states.append(float(x[0, 0, 0, 0]))
        return np.concatenate([np.full_like(x, 1.0), np.zeros_like(x[..., :1])], -1)

    found = plan('diffusion', Normalization('history', STD, anchors), ask, steps=2, anchors=1)
    np.testing.assert_allclose(found, SOURCES + STD, rtol=1e-6)
    whole, half = (float(kept_share(TRUNCATED_STEPS * part)) for part in (1.0, 0.5))
    start = math.sqrt(whole) * 3.0
    noise = (start - math.sqrt(whole)) / math.sqrt(1.0 - whole)
    middle = math.sqrt(half) + math.sqrt(1.0 - half) * noise
    np.testing.assert_allclose(states, [start, middle], rtol=1e-5)


def test_the_noise_schedule_is_the_product_of_what_each_step_leaves():
    betas = np.linspace(0.01, math.sqrt(0.02), 1000) ** 2
    kept = 1.0
    for beta in betas[:TRUNCATED_STEPS]:
        kept *= 1.0 - beta
    assert float(kept_share(TRUNCATED_STEPS)) == pytest.approx(kept)
    assert float(kept_share(0.0)) == 1.0
    assert math.sqrt(1.0 - kept) == pytest.approx(0.25, abs=0.01)


def test_anchors_are_as_good_as_scipys_clusters():
    rng = np.random.default_rng(0)
    centers = rng.normal(0, 3, (6, 10, 3))
    states = centers[rng.integers(0, 6, 600)] + 0.1 * rng.normal(size=(600, 10, 3))
    ours = fit_anchors(states, 6)
    theirs, _ = kmeans2(states.reshape(600, -1), centers.reshape(6, -1), minit='matrix')

    def loss(found):
        gaps = ((states.reshape(600, 1, -1) - found.reshape(1, 6, -1)) ** 2).sum(-1)
        return gaps.min(1).mean()

    assert loss(ours) == pytest.approx(loss(theirs), rel=1e-6)
    np.testing.assert_array_equal(ours, fit_anchors(states, 6))


def test_parallel_decoding_rolls_the_best_token_of_every_waypoint():
    book = ActionCodebook(np.array([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, math.pi / 2]]))
    said = [1, 1, 2, 1, 0, 0, 0, 0, 0, 0]

    def ask(x, at):
        logits = np.zeros((2, 1, 10, 3), np.float32)
        logits[:, 0, np.arange(10), said] = 1.0
        return logits

    found = plan('parallel', Normalization('history', STD, codebook=book), ask, action_tokens=3)
    np.testing.assert_allclose(found[0, 1], [4.0, 0.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(found[1, 9], [4.0, 2.0, math.pi / 2], atol=1e-12)


@pytest.fixture(scope='module')
def layout():
    return PromptLayout(config_of('text'), build_tokenizer())


def test_waypoints_come_back_from_their_words_on_the_grid(layout):
    poses = np.array([[3.76, -0.2, 0.05], [80.0, 12.3, -1.0]] * 5)
    text = waypoint_text(poses)
    assert text.startswith('4 0 3 ; 80 12.5 -57.5 ;')
    found = parse_waypoints(text, 10)
    assert np.abs(found - poses).max(0) == pytest.approx([0.24, 0.2, 0.0087], abs=0.02)
    head = HEADS['text']
    ids = head.encode(layout, Normalization('history', STD), poses)
    assert len(ids) == 40
    again = head.decode(layout, Normalization('history', STD), [*ids, layout.turn_end_id])
    np.testing.assert_array_equal(again, found)


GOOD = '1 2 3 ; ' * 10


@pytest.mark.parametrize(
    ('text', 'reason'),
    [
        ('', 'holds no waypoint'),
        ('stop', 'holds no waypoint'),
        ('1 2 3 ; ' * 9, '9 waypoints where 10'),
        ('1 2 3 ; ' * 11, '11 waypoints where 10'),
        (GOOD + '4 5', 'breaks off'),
        (GOOD.replace('1 2 3', '1 2', 1), 'not three numbers'),
        (GOOD.replace('1 2 3', '1 2 3 4', 1), 'not three numbers'),
        (GOOD.replace('1 2 3', '1 left 3', 1), 'not three numbers'),
        (GOOD.replace('1 2 3', '1 nan 3', 1), 'not finite'),
        (GOOD.replace('1 2 3', '1e999 2 3', 1), 'not finite'),
        (GOOD.replace('1 2 3', '', 1), 'not three numbers'),
    ],
)
def test_a_malformed_answer_is_a_typed_failure_with_its_reason(text, reason):
    with pytest.raises(AnswerError, match=reason) as caught:
        parse_waypoints(text, 10)
    assert reason in caught.value.reason
    assert isinstance(caught.value, PlanError)


def test_an_answer_of_tokens_holds_exactly_one_action_a_waypoint():
    layout = PromptLayout(config_of('tokens'), build_tokenizer())
    book = ActionCodebook(np.arange(256.0)[:, None] * [0.05, 0.0, 0.0])
    normalization = Normalization('history', STD, codebook=book)
    head = HEADS['tokens']
    poses = book.decode(np.array([40] * 10))
    ids = head.encode(layout, normalization, poses)
    assert layout.decode_actions(ids) == [40] * 10
    np.testing.assert_array_equal(head.decode(layout, normalization, ids), poses)
    assert set(head.allowed(layout, 9)) == set(layout.action_ids.tolist())
    assert head.allowed(layout, 10).tolist() == [layout.turn_end_id]
    for bad, reason in (
        (ids[:9], '9 actions'),
        ([*ids, ids[0]], '11 actions'),
        ([layout.think_id, *ids[1:]], 'no action'),
    ):
        with pytest.raises(AnswerError, match=reason):
            head.decode(layout, normalization, bad)


def test_the_room_for_a_spoken_action_is_added_to_the_sequence():
    assert config_of('flow').sequence_tokens == 164 + 32
    assert config_of('tokens').sequence_tokens == 164 + 32 + 10
    assert config_of('text', waypoints=50).sequence_tokens == 164 + 32 + 200
