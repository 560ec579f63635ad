"""What the shipped model says, token by token, on every engine: held-out moments of the town."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

from spanvla_ros.model.action_heads import HEADS  # noqa: E402
from spanvla_ros.model.checkpoint import load_model_dir, shipped_model_dir  # noqa: E402
from spanvla_ros.model.inputs import pixels  # noqa: E402
from spanvla_ros.model.prompt import PromptLayout, load_tokenizer  # noqa: E402
from spanvla_ros.runtime.backend import open_backend  # noqa: E402
from spanvla_ros.runtime.precision import convert_model  # noqa: E402
from spanvla_ros.runtime.reasoner import Prompt, Reasoner  # noqa: E402
from spanvla_ros.runtime.torch_cuda import TorchCudaBackend  # noqa: E402
from spanvla_ros.runtime.torch_graphs import plain  # noqa: E402
from spanvla_ros.town.ranges import load_ranges  # noqa: E402
from spanvla_ros.town.scenarios import HELD_OUT_SEED, MIX  # noqa: E402
from spanvla_ros.town.snapshots import sample_snapshots  # noqa: E402
from spanvla_ros.training.calibration import ROWS, record_inputs  # noqa: E402
from spanvla_ros.training.data.rows import RowMaker, observe  # noqa: E402
from spanvla_ros.training.data.scenes import SceneRequest, draw_scenes  # noqa: E402

FAMILIES = ('lane_keeping', 'lead_vehicle', 'pedestrian', 'red_light', 'turns')
SCENES_PER_DRIVE = 4


@dataclass(frozen=True)
class Spoken:
    """All tokens of one moment: a reasoning with its marks, and action tokens without one."""

    reasoning: tuple[int, ...]
    actions: tuple[int, ...]
    text: str


@pytest.fixture(scope='module')
def shipped():
    return load_model_dir(shipped_model_dir())


@pytest.fixture(scope='module')
def layout(shipped):
    return PromptLayout(shipped.config, load_tokenizer(shipped.path))


def moments(config, drives, families=FAMILIES):
    """Held-out observations of so many drives a family, up to four of each."""
    maker = RowMaker(config)
    return [
        observe(config, snapshot, maker.draw(snapshot)[0])
        for family in families
        for drive in range(drives)
        for snapshot in sample_snapshots(family, HELD_OUT_SEED + drive, SCENES_PER_DRIVE)
    ]


def spoken(backend, layout, observations):
    """What an engine decodes, greedily, from its own eyes on."""
    heard, decode = [], backend.decode

    def listening(token, *cache):
        heard.append(int(token[0, 0]))
        return decode(token, *cache)

    backend.decode = listening
    reasoner, found = Reasoner(backend, layout), []
    for seen in observations:
        ids, valid = layout.encode(seen)
        height, width = backend.config.height_px, backend.config.width_px
        pictures = (frame for camera in seen.frames for frame in camera)
        embeds = [backend.vision(pixels(picture.image, height, width)) for picture in pictures]
        prompt = Prompt(
            seen.stamp_ns, ids[None], np.concatenate(embeds), valid[None].astype(np.float32)
        )
        heard.clear()
        reasoning, _ = reasoner.run(prompt)
        said = tuple(heard)
        # Behind a long reasoning a model with a flow has no room for them.
        actions = reasoner.without_thought(prompt).say(HEADS['tokens'], layout)
        found.append(Spoken(said, tuple(actions), reasoning.text))
    return found


def test_torch_and_onnx_runtime_say_the_same_tokens(shipped, layout):
    seen = moments(shipped.config, 1, ('pedestrian',))
    engines = [open_backend(shipped, name) for name in ('onnxruntime', 'torch')]
    ours, theirs = (spoken(engine, layout, seen) for engine in engines)
    assert ours == theirs
    # Something was said, and not always the same.
    assert len({scene.text for scene in ours}) >= 2
    assert all(len(scene.actions) == shipped.config.waypoints + 1 for scene in ours)


@pytest.mark.slow
def test_engines_agree_on_forty_held_out_moments(shipped, layout):
    seen = moments(shipped.config, 2)
    assert len(seen) == 40
    wanted = spoken(open_backend(shipped, 'torch'), layout, seen)
    assert spoken(open_backend(shipped, 'onnxruntime'), layout, seen) == wanted
    in_place = TorchCudaBackend(shipped, device='cpu', record=plain)
    assert spoken(in_place, layout, seen) == wanted


# Of 40 moments: reasonings that are the same to the last token, and all action tokens.
LEAST_EQUAL = {'fp16': (0.9, 0.95), 'int8': (0.4, 0.5)}


@pytest.mark.slow
@pytest.mark.parametrize('precision', LEAST_EQUAL)
def test_lower_precisions_mostly_say_the_same(shipped, layout, tmp_path, precision):
    calibration = None
    if precision == 'int8':
        request = SceneRequest(ROWS, 0, 0, (*FAMILIES, MIX), load_ranges(), shipped.config)
        draw_scenes(request, tmp_path / 'scenes')
        calibration = record_inputs(shipped, tmp_path / 'scenes')
    convert_model(shipped, tmp_path / 'model', precision, calibration)
    seen = moments(shipped.config, 2)
    wanted = spoken(open_backend(shipped, 'onnxruntime'), layout, seen)
    found = spoken(open_backend(tmp_path / 'model', f'onnxruntime:{precision}'), layout, seen)
    pairs = list(zip(found, wanted, strict=True))
    reasonings = np.mean([ours.reasoning == theirs.reasoning for ours, theirs in pairs])
    actions = np.mean([np.equal(ours.actions, theirs.actions) for ours, theirs in pairs])
    print(f'{precision}: reasonings {reasonings:.3f}, action tokens {actions:.3f}')  # noqa: T201
    assert reasonings >= LEAST_EQUAL[precision][0]
    assert actions >= LEAST_EQUAL[precision][1]
