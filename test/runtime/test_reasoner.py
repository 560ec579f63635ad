"""Greedy, constrained, sliced decoding through real decode graphs."""

import numpy as np
import pytest

from spanvla_ros.model.action_heads import HEADS
from spanvla_ros.model.action_tokens import ActionCodebook
from spanvla_ros.model.config import ModelConfig, with_settings
from spanvla_ros.model.flow import Normalization
from spanvla_ros.runtime.backend import open_backend
from spanvla_ros.runtime.reasoner import Prompt, Reasoner
from spanvla_ros.runtime.thinking import Reasoning, ThinkLimits, ThinkMeter
from spanvla_ros.types import SpanvlaError

from .conftest import SAID, build_toy

WORDS = ' '.join(SAID.split()[1:-1])


def prompt_of(toy, stamp_ns=7):
    length = toy.layout.length
    embeds = np.zeros((len(toy.layout.image_positions), 4), np.float32)
    ids = np.arange(length, dtype=np.int64)[None]
    return Prompt(stamp_ns, ids, embeds, np.ones((1, length), np.float32))


def reasoner_of(toy):
    return Reasoner(open_backend(toy.path, 'onnxruntime'), toy.layout)


def test_one_slice_or_many_give_the_same_reasoning(toy):
    whole, sliced = reasoner_of(toy), reasoner_of(toy)
    whole.start(prompt_of(toy))
    expected = whole.advance(float('inf'))
    sliced.start(prompt_of(toy))
    said, slices = None, 0
    while said is None:
        said = sliced.advance(0.0)
        slices += 1
    assert said == expected
    assert (said.text, said.thinking, said.stamp_ns) == (WORDS, 'slow', 7)
    assert slices == len(SAID.split()) + 1
    assert not sliced.busy


def test_action_tokens_are_never_said_however_loud(toy):
    reasoner = reasoner_of(toy)
    reasoner.start(prompt_of(toy))
    assert '<action' not in reasoner.advance(float('inf')).text


def test_the_cache_of_a_whole_episode_holds_every_token_at_its_place(toy):
    reasoner = reasoner_of(toy)
    said, answer = reasoner.run(prompt_of(toy))
    cache, answer = answer.cache, toy.layout.encode_answer(said.text, 'slow')
    start = toy.config.prompt_tokens
    np.testing.assert_allclose(
        cache.keys[1, 0, 0, start : start + len(answer), 1], answer * 1e-3, rtol=1e-6
    )
    # The toy's values add (position - attended tokens): the masked reasoning slot, always.
    off = cache.values[0, 0, 0, start : start + len(answer), 0] - answer * 1e-3
    np.testing.assert_allclose(off, toy.config.reasoning_slot, rtol=1e-4)
    assert cache.valid[0, start:].sum() == len(answer)
    assert not cache.valid[0, toy.layout.slot].any()


def test_fast_thinking_is_known_by_its_words_and_leaves_no_text(tmp_path):
    toy = build_toy(tmp_path / 'fast', said='<think> directly predict the final action </think>')
    reasoner = reasoner_of(toy)
    reasoner.start(prompt_of(toy))
    said = reasoner.advance(float('inf'))
    assert (said.text, said.thinking, said.tokens) == ('', 'fast', 2)
    whole, answer = reasoner_of(toy).run(prompt_of(toy))
    assert (whole.text, whole.thinking) == ('', 'fast')
    assert answer.cache.valid[0, toy.config.prompt_tokens :].sum() == answer.length == 8
    assert (reasoner.meter.fast, reasoner.meter.slow) == (1, 0)
    assert reasoner.meter.tokens_per_s > 0


@pytest.mark.parametrize('ends', ['</think>', '<action_start>'])
def test_an_endless_reasoning_is_closed_within_the_answer_room(tmp_path, ends):
    said = '<think> lead vehicle lead' if ends == '</think>' else '<think> stop <action_start>'
    toy = build_toy(tmp_path / 'endless', said=said)
    reasoner = reasoner_of(toy)
    spoken, answer = reasoner.run(prompt_of(toy))
    used = int(answer.cache.valid[0, toy.config.prompt_tokens :].sum())
    assert used <= toy.config.answer_tokens
    assert spoken.text.split()[0] in ('lead', 'stop')
    if ends == '</think>':
        assert used == toy.config.answer_tokens


def test_a_new_start_drops_the_episode_under_way(toy):
    reasoner = reasoner_of(toy)
    reasoner.start(prompt_of(toy, 1))
    reasoner.advance(float('inf'), tokens=5)
    reasoner.start(prompt_of(toy, 2))
    assert reasoner.advance(float('inf')).stamp_ns == 2


@pytest.mark.parametrize(
    'samples', [20, pytest.param(10_000, marks=pytest.mark.slow)], ids=['few', 'many']
)
def test_drawn_answers_hold_no_invalid_one(tmp_path, samples):
    """The toy would rather say words; drawn at a high temperature it says all actions."""
    toy = build_toy(tmp_path / 'spoken', with_settings(ModelConfig(), head='tokens'))
    answer = reasoner_of(toy).without_thought(prompt_of(toy))
    motions = np.random.default_rng(1).normal(size=(toy.config.action_tokens, 3))
    normalization = Normalization('history', toy.std, codebook=ActionCodebook(motions))
    rng, said = np.random.default_rng(0), set()
    for _ in range(samples):
        tokens = answer.say(HEADS['tokens'], toy.layout, rng, temperature=3.0)
        poses = HEADS['tokens'].decode(toy.layout, normalization, tokens)
        assert len(tokens) == toy.config.waypoints + 1
        assert np.isfinite(poses).all()
        said |= set(tokens)
    assert answer.length == len(toy.layout.encode_answer('', 'fast'))
    assert said <= {*toy.layout.action_ids.tolist(), toy.layout.turn_end_id}
    assert len(said) > min(samples, 256)


def test_a_reasoning_ends_at_its_own_budget(toy):
    limits = ThinkLimits(reasoning_tokens=5)
    reasoner = Reasoner(open_backend(toy.path, 'onnxruntime'), toy.layout, limits)
    reasoner.start(prompt_of(toy))
    said = reasoner.advance(float('inf'))
    assert said.text == ' '.join(WORDS.split()[:5])
    assert (said.thinking, said.forced) == ('slow', False)


def test_a_spent_drive_thinks_fast_without_asking_the_model(toy):
    limits = ThinkLimits(drive_tokens=12)
    reasoner = Reasoner(open_backend(toy.path, 'onnxruntime'), toy.layout, limits)
    first, second, third = (_said(reasoner, toy) for _ in range(3))
    # Eleven tokens with the end mark are one whole reasoning; one word more is all that is left.
    assert first.text == WORDS
    assert second.text == WORDS.split()[0]
    assert reasoner.meter.drive_tokens >= 12
    spent = reasoner.meter.tokens
    assert (third.thinking, third.forced, third.tokens) == ('fast', True, 0)
    assert reasoner.meter.tokens == spent
    assert 'tokens are spent' in reasoner.meter.alarm
    whole, answer = reasoner.run(prompt_of(toy))
    assert (whole.text, whole.thinking, whole.forced) == ('', 'fast', True)
    fast = toy.layout.encode_answer('', 'fast')
    start = toy.config.prompt_tokens
    np.testing.assert_allclose(
        answer.cache.keys[1, 0, 0, start : start + len(fast), 1], fast * 1e-3, rtol=1e-6
    )
    reasoner.meter.new_drive()
    assert _said(reasoner, toy).text == WORDS


def _said(reasoner, toy):
    reasoner.start(prompt_of(toy))
    return reasoner.advance(float('inf'))


def test_the_meter_looks_back_on_a_window_and_tells_when_slow_thinking_has_died_out():
    meter = ThinkMeter(ThinkLimits(window=4))
    assert meter.slow_rate is None
    assert meter.alarm == ''
    for thinking in ('slow', 'fast', 'fast'):
        meter.count(Reasoning(0, '', thinking, 3))
    assert meter.slow_rate == pytest.approx(1 / 3)
    for _ in range(2):
        meter.count(Reasoning(0, '', 'fast', 3))
    # The slow one has left the window of four; what was forced never was in it.
    assert meter.slow_rate == 0.0
    assert meter.slow_share == pytest.approx(1 / 5)
    assert meter.alarm == 'slow thinking has died out: none in the last 4'
    meter.count(Reasoning(0, '', 'fast', 0, forced=True))
    assert (meter.fast, meter.forced) == (4, 1)
    meter.count(Reasoning(0, 'red light', 'slow', 3))
    assert meter.alarm == ''
    with pytest.raises(SpanvlaError, match='window at least 1'):
        ThinkLimits(window=0)
