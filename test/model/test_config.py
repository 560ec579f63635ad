"""The configuration file is read strictly and written back unchanged."""

import math

import pytest
import yaml

from spanvla_ros.model.config import (
    TOWN_CAMERAS,
    ModelConfig,
    dump_config,
    load_config,
    parse_config,
    with_settings,
)
from spanvla_ros.types import SpanvlaError


def test_defaults_are_the_town_layout():
    config = ModelConfig()
    assert config.image_tokens == 32
    assert config.prompt_tokens <= 200
    assert config.sequence_tokens == config.prompt_tokens + 32
    assert config.history_times_s.tolist() == [-1.5, -1.0, -0.5]
    assert config.times_s.tolist() == [0.5 * i for i in range(1, 11)]
    assert config.camera_names == ('front', 'front_left', 'front_right')


def test_focal_length_spans_the_field_of_view():
    camera = TOWN_CAMERAS[0]
    assert math.degrees(2 * math.atan(112 / camera.focal_px)) == pytest.approx(60.0)


def test_a_file_read_is_the_file_written(tmp_path):
    config = with_settings(ModelConfig(), name='x', waypoints=50, steps=3, horizon_s=4.0)
    (tmp_path / 'config.yaml').write_text(dump_config(config))
    assert load_config(tmp_path) == config


def test_whole_numbers_serve_as_lengths_of_time():
    assert parse_config('horizon_s: 4').horizon_s == 4.0


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('colour: red', 'colour'),
        ('waypoints: 10.5', 'waypoints'),
        ('waypoints: true', 'waypoints'),
        ('steps: 0', 'steps'),
        ('horizon_s: .nan', 'horizon_s'),
        ('family: llama', 'family'),
        ('source: oracle', 'source'),
        ('schedule: never', 'schedule'),
        ('history_s: 1.4', 'history_step_s'),
        ('noise_std: -1', 'noise_std'),
        ('cameras: []', 'cameras'),
        ('cameras: [front]', r'cameras\[0\]'),
        ('cameras: [{name: a, width_px: 224}]', 'lacks'),
        ('- a', 'mapping'),
        ('a: [', 'YAML'),
        ('!!python/object/apply:os.system [ls]', 'YAML'),
    ],
)
def test_a_bad_file_is_one_sentence(text, words):
    with pytest.raises(SpanvlaError, match=words) as caught:
        parse_config(text, 'here.yaml')
    assert str(caught.value).startswith('here.yaml')
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({'name': 'front'}, 'share a name'),
        ({'width_px': 448}, 'one size'),
        ({'fov_deg': 180.0}, 'fov_deg'),
    ],
)
def test_cameras_are_checked_together(change, words):
    content = yaml.safe_load(dump_config(ModelConfig()))
    content['cameras'][1].update(change)
    with pytest.raises(SpanvlaError, match=words):
        parse_config(yaml.safe_dump(content))


def test_pictures_must_be_whole_cells():
    content = yaml.safe_load(dump_config(ModelConfig()))
    for camera in content['cameras']:
        camera['height_px'] = 120
    with pytest.raises(SpanvlaError, match='multiples of 28'):
        parse_config(yaml.safe_dump(content))


def test_no_model_directory_is_a_sentence(tmp_path):
    with pytest.raises(SpanvlaError, match='model directory'):
        load_config(tmp_path)
