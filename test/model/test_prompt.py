"""The prompt's static places, its masks, and text there and back."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spanvla_ros.model.config import ModelConfig, with_settings
from spanvla_ros.model.prompt import (
    FAST_TEXT,
    IMAGE,
    UNKNOWN,
    PromptLayout,
    build_tokenizer,
    load_tokenizer,
    number_tokens,
    number_word,
    token_id,
    write_tokenizer,
)
from spanvla_ros.types import CameraFrame, EgoState, Observation, SpanvlaError

CONFIG = ModelConfig()
TOKENIZER = build_tokenizer()
LAYOUT = PromptLayout(CONFIG, TOKENIZER)
IMAGE_PIXELS = np.zeros((112, 224, 3), np.uint8)


def observation(**changes):
    frames = tuple((CameraFrame(name, 0, IMAGE_PIXELS),) for name in CONFIG.camera_names)
    base = Observation(
        stamp_ns=0,
        frames=frames,
        ego=EgoState(0, 0.0, 0.0, 0.0, 7.3, -1.2, 0.1),
        history=np.array([[-9.0, 0.4, 0.1], [-6.0, 0.2, 0.05], [-3.0, 0.0, 0.0]]),
        history_valid=np.array([True, True, True]),
        route=np.array([[15.0, 1.0], [30.0, 2.0], [45.0, 4.0], [60.0, 7.0], [75.0, -90.0]]),
    )
    return replace(base, **changes)


def words_of(ids):
    return [TOKENIZER.id_to_token(int(i)) for i in ids]


def test_the_town_prompt_fills_its_length_exactly():
    ids, valid = LAYOUT.encode(observation(reasoning=' '.join(['stop'] * 24)))
    assert len(ids) == LAYOUT.length == CONFIG.prompt_tokens
    assert valid.all()
    assert UNKNOWN not in words_of(ids)


def test_pictures_stand_at_their_places_camera_by_camera():
    ids, _ = LAYOUT.encode(observation())
    assert (ids[LAYOUT.image_positions] == token_id(TOKENIZER, IMAGE)).all()
    assert (ids == token_id(TOKENIZER, IMAGE)).sum() == 96
    starts = LAYOUT.image_positions[::32]
    assert [words_of(ids[s - 2 : s])[0] for s in starts] == list(CONFIG.camera_names)


def test_the_state_is_written_as_numbers():
    words = ' '.join(words_of(LAYOUT.encode(observation())[0]))
    assert 'speed 7.5 accel -1 turn 5.5 past -9 0.5 5.5 -6 0 3 -3 0 0 ' in words
    assert 'route 15 1 30 2 45 4 60 7 75 -80 command follow' in words


def test_missing_parts_are_masked_or_said():
    frames = (*observation().frames[:1], (None,), *observation().frames[2:])
    seen = observation(
        frames=frames, route=None, history_valid=np.array([False, True, True]), command='left'
    )
    ids, valid = LAYOUT.encode(seen)
    pictures = valid[LAYOUT.image_positions].reshape(3, 32)
    assert pictures[0].all()
    assert pictures[2].all()
    assert not pictures[1].any()
    words = ' '.join(words_of(ids))
    assert 'past none none none -6' in words
    assert 'route' + ' none' * 10 + ' command left' in words
    assert not valid[LAYOUT.slot].any()
    assert valid.sum() == LAYOUT.length - 32 - 24


def test_the_last_token_never_moves():
    empty, _ = LAYOUT.encode(observation())
    full, _ = LAYOUT.encode(observation(reasoning='road clear ; stop , keep lane'))
    outside = np.ones(LAYOUT.length, bool)
    outside[LAYOUT.slot] = False
    assert np.array_equal(empty[outside], full[outside])
    assert words_of(full[-1:]) == ['assistant']


def test_a_long_reasoning_loses_its_end():
    text = ' '.join(['stop'] * 23 + ['red', 'green'])
    ids, valid = LAYOUT.encode(observation(reasoning=text))
    assert words_of(ids[LAYOUT.slot]) == ['stop'] * 23 + ['red']
    assert valid[LAYOUT.slot].all()


def test_a_prompt_that_does_not_fit_says_so():
    with pytest.raises(SpanvlaError, match='prompt_tokens'):
        PromptLayout(with_settings(CONFIG, prompt_tokens=130), TOKENIZER)
    with pytest.raises(SpanvlaError, match='prompt_tokens'):
        PromptLayout(with_settings(CONFIG, prompt_tokens=163), TOKENIZER).encode(observation())
    with pytest.raises(SpanvlaError, match='command'):
        LAYOUT.encode(observation(command='fly'))


def test_a_longer_bucket_pads_inside_and_masks_it():
    roomy = PromptLayout(with_settings(CONFIG, prompt_tokens=170), TOKENIZER)
    ids, valid = roomy.encode(observation())
    assert valid.sum() == LAYOUT.encode(observation())[1].sum()
    assert words_of(ids[-1:]) == ['assistant']
    assert valid[-1]


@given(st.floats(-1e6, 1e6))
def test_numbers_are_words_on_the_grid(value):
    word = number_word(value)
    assert TOKENIZER.token_to_id(word) is not None
    clipped = min(max(value, -80.0), 99.5)
    assert abs(float(word) - clipped) <= 0.25


def test_number_tokens_know_their_values():
    ids, values = number_tokens(TOKENIZER)
    assert [float(w) for w in words_of(ids)] == values.tolist()
    assert len(set(ids.tolist())) == 360


def test_answers_there_and_back():
    text = 'lead vehicle 15 m braking ; decelerate , keep lane ; because lead vehicle braking'
    slow = LAYOUT.encode_answer(text, 'slow', range(10))
    assert LAYOUT.decode_answer(slow) == text
    assert LAYOUT.decode_actions(slow) == list(range(10))
    assert words_of(slow)[0] == '<think>'
    assert words_of(slow)[-1] == '<|im_end|>'
    fast = LAYOUT.encode_answer(text, 'fast')
    assert LAYOUT.decode_answer(fast) == FAST_TEXT
    assert words_of(fast)[-2:] == ['</think>', '<action_start>']


def test_the_longest_reasoning_fits_the_answer():
    answer = LAYOUT.encode_answer(' '.join(['stop'] * 28), 'slow')
    assert len(answer) <= CONFIG.answer_tokens


def test_reasoning_may_hold_text_and_its_ends_only():
    mask = LAYOUT.reasoning_mask(800)
    assert not mask[LAYOUT.action_ids].any()
    assert not mask[[LAYOUT.padding_id, LAYOUT.think_id, LAYOUT.turn_end_id]].any()
    assert mask[[LAYOUT.think_end_id, LAYOUT.action_start_id]].all()
    assert mask[token_id(TOKENIZER, 'braking')]
    assert not mask[TOKENIZER.get_vocab_size() :].any()


def test_the_tokenizer_survives_its_file(tmp_path):
    write_tokenizer(tmp_path, TOKENIZER)
    again = PromptLayout(CONFIG, load_tokenizer(tmp_path))
    assert np.array_equal(again.encode(observation())[0], LAYOUT.encode(observation())[0])
    (tmp_path / 'backbone' / 'tokenizer.json').write_text('{')
    with pytest.raises(SpanvlaError, match='tokenizer'):
        load_tokenizer(tmp_path)
    with pytest.raises(SpanvlaError, match='no token'):
        token_id(TOKENIZER, '<action_999>')
