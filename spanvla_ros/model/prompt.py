"""The prompt and the answer as token ids of a static layout.

The prompt is plain text through the `tokenizers` library: pictures first (their places never
move), then the ego state, past, route and command, then a slot for the last finished reasoning.
Text of changing length is padded inside its own part, and padding is masked, so that position P-1
is always the last prompt token. The tiny family has a word-level tokenizer with one word a number.

Paper: SpanVLA 3.1 (inputs: instruction, acceleration, history velocity and trajectory as text;
answer: reasoning, then one token that starts the action) and Fig. 4 (slow and fast templates).
Deviations: past speed is carried by the past poses; the last finished reasoning is an input.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from spanvla_ros.model.checkpoint import write_text
from spanvla_ros.model.config import ModelConfig
from spanvla_ros.types import COMMANDS, EgoState, MissingExtraError, Observation, SpanvlaError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE = 'backbone/tokenizer.json'
ACTION_WORDS = 256
NUMBER_LOW, NUMBER_HIGH, NUMBER_STEP = -80.0, 99.5, 0.5
UNKNOWN = '<unk>'
PADDING = '<|endoftext|>'
TURN_START, TURN_END = '<|im_start|>', '<|im_end|>'
IMAGE_START, IMAGE, IMAGE_END = '<|vision_start|>', '<|image_pad|>', '<|vision_end|>'
THINK, THINK_END, ACTION_START = '<think>', '</think>', '<action_start>'
# Without blanks, as it stays apart from the numbers a pretrained tokenizer has learned to read.
NUMBER_MARK = '<num_{}>'


@dataclass(frozen=True)
class Marks:
    """What a family's own prompts are made of, as text; each but `image_start` is one token."""

    padding: str = '<|endoftext|>'
    turn_start: str = '<|im_start|>'
    turn_end: str = '<|im_end|>'
    image_start: str = '<|vision_start|>'
    image: str = '<|image_pad|>'
    image_end: str = '<|vision_end|>'
    user: str = 'user\n'
    assistant: str = 'assistant\n'


# By family, as the chat templates and processors of the released models write them.
MARKS = {
    'qwen2_5_vl': Marks(),
    'qwen3_vl': Marks(),
    'internvl': Marks(image_start='<img>', image='<IMG_CONTEXT>', image_end='</img>'),
    'smolvlm': Marks(
        padding='<|im_end|>',
        turn_end='<end_of_utterance>',
        image_start='<fake_token_around_image><global-img>',
        image='<image>',
        image_end='<fake_token_around_image>',
        user='User:',
        assistant='Assistant:',
    ),
}
SPECIALS = (
    PADDING, UNKNOWN, TURN_START, TURN_END, IMAGE_START, IMAGE, IMAGE_END,
    THINK, THINK_END, ACTION_START,
)  # fmt: skip
# Around the text of an answer: think, think end, action start.
ANSWER_MARKS = 3
FAST_TEXT = 'directly predict the final action'
NONE_WORD = 'none'
WORDS = (
    'user assistant system speed accel turn past route command thought none '
    'front front_left front_right left right back back_left back_right rear side wide narrow '
    'follow straight stop '
    'lead vehicle pedestrian red green light curve m stopped braking steady crossing waiting '
    'ahead accelerate maintain decelerate keep lane change ; , because road clear '
    'directly predict the final action '
    'car truck bus bicycle cyclist motorcycle child cone barrier construction zone sign yellow '
    'intersection roundabout crosswalk marking parked oncoming merging cut in cutting out '
    'adjacent near far slow fast yield give way go wait overtake return lane bias drift '
    'blocked narrow wet night unprotected traffic emergency animal debris'
)


def action_word(index: int) -> str:
    """The word of one action token."""
    return f'<action_{index}>'


def number_word(value: float) -> str:
    """The word of a number: rounded to the 0.5 grid, clipped to its range."""
    steps = round(min(max(float(value), NUMBER_LOW), NUMBER_HIGH) / NUMBER_STEP)
    return f'{steps * NUMBER_STEP:g}' if steps else '0'


def number_form(tokenizer: Tokenizer) -> Callable[[float], str]:
    """How a tokenizer has numbers as one token: a word of the tiny family, or a mark."""

    def marked(value: float) -> str:
        return NUMBER_MARK.format(number_word(value))

    return number_word if tokenizer.token_to_id(marked(0.0)) is None else marked


def build_tokenizer(action_words: int = ACTION_WORDS) -> Tokenizer:
    """The word-level tokenizer of the tiny family: marks, actions, numbers, words."""
    tokenizers = _tokenizers()
    numbers = [number_word(value) for value in _number_values()]
    actions = [action_word(i) for i in range(action_words)]
    words = list(dict.fromkeys([*SPECIALS, *actions, *numbers, *WORDS.split()]))
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([*SPECIALS, *actions])
    return tokenizer


def write_tokenizer(model_dir: str | Path, tokenizer: Tokenizer) -> None:
    """Write the tokenizer into a model directory."""
    path = Path(model_dir) / TOKENIZER_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, tokenizer.to_str(pretty=True))


def load_tokenizer(model_dir: str | Path) -> Tokenizer:
    """Read the tokenizer of a (verified) model directory."""
    return read_tokenizer(Path(model_dir) / TOKENIZER_FILE)


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of one `tokenizer.json`."""
    try:
        return _tokenizers().Tokenizer.from_file(str(path))
    except Exception as error:
        raise SpanvlaError(f'{path}: not a readable tokenizer ({error})') from error


def number_tokens(tokenizer: Tokenizer) -> tuple[Int64[np.ndarray, 'n'], Float32[np.ndarray, 'n']]:
    """Ids and values of all number words, to start their embeddings from their values."""
    values, form = _number_values(), number_form(tokenizer)
    ids = [token_id(tokenizer, form(value)) for value in values]
    return np.array(ids, dtype=np.int64), values.astype(np.float32)


def _number_values() -> Float64[np.ndarray, 'n']:
    count = round((NUMBER_HIGH - NUMBER_LOW) / NUMBER_STEP) + 1
    return NUMBER_LOW + NUMBER_STEP * np.arange(count)


def extend_tokenizer(tokenizer: Tokenizer, actions: int) -> list[int]:
    """Give a pretrained tokenizer our marks, numbers and actions; returns the ids that are new.

    Numbers take the blank before them along, so that each is exactly one token of the prompt.
    """
    added = _tokenizers().AddedToken
    known = tokenizer.get_vocab(with_added_tokens=True)
    marks = [mark for mark in (THINK, THINK_END, ACTION_START) if mark not in known]
    words = [*marks, *(action_word(index) for index in range(actions))]
    numbers = [NUMBER_MARK.format(number_word(value)) for value in _number_values()]
    tokenizer.add_special_tokens([added(word, normalized=False, special=True) for word in words])
    tokenizer.add_special_tokens(
        [added(word, normalized=False, special=True, lstrip=True) for word in numbers]
    )
    every = tokenizer.get_vocab(with_added_tokens=True)
    return sorted(index for word, index in every.items() if word not in known)


def token_id(tokenizer: Tokenizer, word: str) -> int:
    """The id of one word; a tokenizer without it raises `SpanvlaError`."""
    index = tokenizer.token_to_id(word)
    if index is None:
        raise SpanvlaError(f'tokenizer: has no token {word}; add it before training')
    return int(index)


def _tokenizers() -> Any:
    try:
        import tokenizers
        import tokenizers.models
        import tokenizers.pre_tokenizers
    except ModuleNotFoundError as error:
        raise MissingExtraError('tokenizers', 'onnx') from error
    return tokenizers


class PromptLayout:
    """Where each token of the prompt stands, and the way from observations to ids and back."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        """Lay out the static parts; raises `SpanvlaError` where they do not fit P."""
        self.config = config
        self.tokenizer = tokenizer
        marks = MARKS[config.family]
        self.padding_id = token_id(tokenizer, marks.padding)
        self.think_id = token_id(tokenizer, THINK)
        self.think_end_id = token_id(tokenizer, THINK_END)
        self.action_start_id = token_id(tokenizer, ACTION_START)
        self.turn_end_id = token_id(tokenizer, marks.turn_end)
        self.action_ids = np.array(
            [token_id(tokenizer, action_word(i)) for i in range(config.action_tokens)], np.int64
        )
        self._number = number_form(tokenizer)
        pictures = '\n'.join(
            f'{name} {marks.image_start}{marks.image * config.image_tokens}{marks.image_end}'
            for name in config.camera_names
            for _ in range(config.frames_per_camera)
        )
        self._head = self._ids(f'{marks.turn_start}{marks.user}{pictures}')
        self._slot_head = self._ids('\nthought')
        self._tail = self._ids(f'{marks.turn_end}\n{marks.turn_start}{marks.assistant}')
        fixed = len(self._head) + len(self._slot_head) + config.reasoning_slot + len(self._tail)
        self._state_length = config.prompt_tokens - fixed
        if self._state_length < 1:
            raise SpanvlaError(
                f'prompt: its static parts take {fixed} tokens, prompt_tokens is '
                f'{config.prompt_tokens}; raise it in config.yaml'
            )
        image_id = token_id(tokenizer, marks.image)
        self.image_positions: Int64[np.ndarray, 'i'] = np.flatnonzero(self._head == image_id)
        wanted = len(config.cameras) * config.frames_per_camera * config.image_tokens
        if len(self.image_positions) != wanted:
            raise SpanvlaError(
                f'tokenizer: {marks.image} is not one token; add it as a special token'
            )

    @property
    def length(self) -> int:
        """Static prompt length P."""
        return self.config.prompt_tokens

    @property
    def slot(self) -> slice:
        """Where the last finished reasoning stands."""
        start = len(self._head) + self._state_length + len(self._slot_head)
        return slice(start, start + self.config.reasoning_slot)

    def encode(
        self, observation: Observation
    ) -> tuple[Int64[np.ndarray, 'p'], Bool[np.ndarray, 'p']]:
        """Ids of the prompt, and which of them may be attended.

        Masked are padding and the visual tokens of missing pictures; a missing past pose or route
        point is the word `none`. A reasoning longer than its slot loses its end (its trace).
        """
        ids = np.full(self.length, self.padding_id, dtype=np.int64)
        valid = np.zeros(self.length, dtype=np.bool_)
        state = self._ids(self._state_text(observation))
        if len(state) > self._state_length:
            raise SpanvlaError(
                f'prompt: the state takes {len(state)} tokens, {self._state_length} are free; '
                'raise prompt_tokens in config.yaml'
            )
        thought = self._ids(observation.reasoning)[: self.config.reasoning_slot]
        slot = self.slot
        for start, part in (
            (0, self._head),
            (len(self._head), state),
            (slot.start - len(self._slot_head), self._slot_head),
            (slot.start, thought),
            (slot.stop, self._tail),
        ):
            ids[start : start + len(part)] = part
            valid[start : start + len(part)] = True
        present = [frame is not None for camera in observation.frames for frame in camera]
        valid[self.image_positions] = np.repeat(present, self.config.image_tokens)
        return ids, valid

    def spare_tokens(self) -> int:
        """Tokens of the state's room that no state takes, not even one of missing parts."""
        config = self.config
        poses = np.zeros((config.history_poses, 3))
        taken = 0
        for known in (True, False):
            route = np.zeros((config.route_points, 2)) if known else None
            valid = np.full(config.history_poses, known)
            for command in COMMANDS:
                ego = EgoState(0, 0.0, 0.0, 0.0, 0.0)
                state = Observation(0, (), ego, poses, valid, route, command=command)
                taken = max(taken, len(self._ids(self._state_text(state))))
        return self._state_length - taken

    def _state_text(self, observation: Observation) -> str:
        ego, number = observation.ego, self._number
        words = [
            'speed', number(ego.speed_mps),
            'accel', number(ego.accel_mps2),
            'turn', number(np.degrees(ego.yaw_rate_radps)),
            'past',
        ]  # fmt: skip
        for pose, good in zip(observation.history, observation.history_valid, strict=True):
            x, y, yaw = pose
            row = [number(x), number(y), number(np.degrees(yaw))]
            words += row if good else [NONE_WORD] * 3
        words.append('route')
        if observation.route is None:
            words += [NONE_WORD] * (2 * self.config.route_points)
        else:
            words += [number(value) for value in observation.route.ravel()]
        if observation.command not in COMMANDS:
            raise SpanvlaError(
                f'command {observation.command!r} is not known; use {", ".join(COMMANDS)}'
            )
        return '\n' + ' '.join([*words, 'command', observation.command])

    def encode_answer(
        self, reasoning: str, thinking: str, actions: Sequence[int] | None = None
    ) -> Int64[np.ndarray, 'a']:
        """Ids of an answer, slow or fast; without actions it ends at the action start.

        Args:
            reasoning: the reasoning text of a slow answer.
            thinking: `slow` or `fast`.
            actions: action token indices.
        """
        text = reasoning if thinking == 'slow' else FAST_TEXT
        words = self._ids(text)[: self.config.answer_tokens - ANSWER_MARKS]
        ids = [self.think_id, *words, self.think_end_id, self.action_start_id]
        if actions is not None:
            ids += [int(self.action_ids[index]) for index in actions] + [self.turn_end_id]
        return np.array(ids, dtype=np.int64)

    def decode_answer(self, ids: Sequence[int] | Int64[np.ndarray, 'a']) -> str:
        """The reasoning text of generated ids: what stands between the marks of thinking."""
        text: list[int] = []
        for token in ids:
            if token in (self.think_end_id, self.action_start_id, self.turn_end_id):
                break
            if token != self.think_id:
                text.append(int(token))
        return str(self.tokenizer.decode(text, skip_special_tokens=True)).strip()

    def decode_actions(self, ids: Sequence[int] | Int64[np.ndarray, 'a']) -> list[int]:
        """Action token indices among generated ids, in order."""
        index_of = {int(token): index for index, token in enumerate(self.action_ids)}
        return [index_of[int(token)] for token in ids if int(token) in index_of]

    def encode_text(self, text: str) -> Int64[np.ndarray, 'a']:
        """Ids of plain text."""
        return self._ids(text)

    def decode_text(self, ids: Sequence[int]) -> str:
        """The text of ids, marks left out."""
        return str(self.tokenizer.decode([int(token) for token in ids], skip_special_tokens=True))

    @cached_property
    def text_ids(self) -> Int64[np.ndarray, 'v']:
        """All tokens that are plain text."""
        marks = self.reasoning_mask(self.tokenizer.get_vocab_size())
        marks[[self.think_end_id, self.action_start_id]] = False
        return np.flatnonzero(marks)

    def reasoning_mask(self, vocabulary: int) -> Bool[np.ndarray, 'v']:
        """Which tokens a reasoning may hold: text and its two ends, no action or picture marks."""
        mask = np.zeros(vocabulary, dtype=np.bool_)
        for word, index in self.tokenizer.get_vocab(with_added_tokens=True).items():
            if index < vocabulary:
                mask[index] = not (word.startswith('<') and word.endswith('>'))
        mask[[self.think_end_id, self.action_start_id]] = True
        return mask

    def _ids(self, text: str) -> Int64[np.ndarray, 'a']:
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)


def prompt_length(config: ModelConfig, tokenizer: Tokenizer) -> int:
    """The least `prompt_tokens` that holds every prompt of a configuration."""
    roomy = replace(config, prompt_tokens=sys.maxsize)
    layout = PromptLayout(roomy, tokenizer)
    return layout.length - layout.spare_tokens()
