"""What a model is fed and what it gives: read from `config.yaml` of its directory.

Everything the weights depend on stands here, beside the weights: cameras and their mounts, the
spacing of history, route and waypoints, the source of the flow, the static token layout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Float64

from spanvla_ros.types import SCHEDULES, SpanvlaError

FAMILIES = ('qwen2_5_vl', 'internvl', 'qwen3_vl', 'smolvlm')
SOURCES = ('history', 'constant_velocity', 'gaussian')
HEAD_KINDS = ('flow', 'l1', 'diffusion', 'parallel', 'tokens', 'text')
# A waypoint in words: x, y, yaw, and the mark that parts it from the next.
WAYPOINT_WORDS = 4
CONFIG_FILE = 'config.yaml'


@dataclass(frozen=True)
class CameraSpec:
    """One camera: picture size, horizontal field of view, and its mount in `base_link`.

    Yaw turns left (positive) of straight ahead, pitch tilts down (positive). The principal point
    is the middle of the picture.
    """

    name: str
    width_px: int
    height_px: int
    fov_deg: float
    x_m: float
    y_m: float
    z_m: float
    yaw_deg: float
    pitch_deg: float = 0.0

    @property
    def focal_px(self) -> float:
        """Focal length of the pinhole camera, the same along both picture axes."""
        return 0.5 * self.width_px / math.tan(math.radians(0.5 * self.fov_deg))


TOWN_CAMERAS = (
    CameraSpec('front', 224, 112, 60.0, 1.5, 0.0, 1.5, 0.0),
    CameraSpec('front_left', 224, 112, 60.0, 1.5, 0.0, 1.5, 55.0),
    CameraSpec('front_right', 224, 112, 60.0, 1.5, 0.0, 1.5, -55.0),
)


@dataclass(frozen=True)
class ModelConfig:
    """Inputs, horizon and token layout of one model; the defaults are the town model's.

    `prompt_tokens` is the static length P of the prompt, `reasoning_slot` the room in it for the
    last finished reasoning, `answer_tokens` the longest generated reasoning R with its marks.
    Every `interval`-th layer is bridged, from the first; 0 bridges the last alone. `steps` is the
    default of Euler steps. `head` names one of `model.action_heads.HEADS`, `anchors` the number of
    trajectories its `diffusion` starts from.
    """

    name: str = 'town'
    family: str = 'qwen2_5_vl'
    cameras: tuple[CameraSpec, ...] = TOWN_CAMERAS
    frames_per_camera: int = 1
    frame_lag_s: float = 0.5
    history_s: float = 1.5
    history_step_s: float = 0.5
    horizon_s: float = 5.0
    waypoints: int = 10
    route_points: int = 5
    route_step_m: float = 15.0
    interval: int = 2
    head: str = 'flow'
    anchors: int = 20
    source: str = 'history'
    steps: int = 5
    noise_std: float = 0.3
    reasoning_slot: int = 24
    answer_tokens: int = 32
    schedule: str = 'concurrent'
    kv_max_age_s: float = 0.3
    action_tokens: int = 256
    expert_width: int = 160
    prompt_tokens: int = 164
    patch_px: int = 14
    patch_merge: int = 2

    @property
    def camera_names(self) -> tuple[str, ...]:
        """Names in model order; the first camera is the anchor."""
        return tuple(camera.name for camera in self.cameras)

    @property
    def height_px(self) -> int:
        """Height of every picture the vision graph takes."""
        return self.cameras[0].height_px

    @property
    def width_px(self) -> int:
        """Width of every picture the vision graph takes."""
        return self.cameras[0].width_px

    @property
    def image_tokens(self) -> int:
        """Visual tokens of one picture, row-major over the merged patch grid."""
        cell_px = self.patch_px * self.patch_merge
        return (self.height_px // cell_px) * (self.width_px // cell_px)

    @property
    def history_poses(self) -> int:
        """Number of past poses, the present excluded."""
        return round(self.history_s / self.history_step_s)

    @property
    def history_times_s(self) -> Float64[np.ndarray, 'h']:
        """Times of the past poses, oldest first, such as -1.5, -1.0, -0.5."""
        return -self.history_step_s * np.arange(self.history_poses, 0, -1, dtype=np.float64)

    @property
    def times_s(self) -> Float64[np.ndarray, 't']:
        """Times of the waypoints after the anchor image."""
        return self.horizon_s / self.waypoints * np.arange(1.0, self.waypoints + 1.0)

    @property
    def action_room(self) -> int:
        """Tokens of an action that the language model says itself; 0 where an expert plans."""
        words = {'tokens': 1, 'text': WAYPOINT_WORDS}
        return self.waypoints * words.get(self.head, 0)

    @property
    def expert_graph(self) -> str:
        """The graph of the expert: `propose` where it is not one state in, one velocity out."""
        return 'propose' if self.head in ('diffusion', 'parallel') else 'step'

    @property
    def answer_room(self) -> int:
        """Slots after the prompt: the reasoning with its marks, then a spoken action."""
        return self.answer_tokens + self.action_room

    @property
    def sequence_tokens(self) -> int:
        """Static length S = P + R of the prompt and of what may be generated."""
        return self.prompt_tokens + self.answer_room


def bridged_layers(layers: int, interval: int) -> tuple[int, ...]:
    """The bridged ones of `layers`: every `interval`-th from the first, or with 0 the last."""
    return tuple(range(0, layers, interval)) if interval else (layers - 1,)


def load_config(model_dir: str | Path) -> ModelConfig:
    """Read `config.yaml` of a model directory, or a file of the same kind.

    Anything odd is one sentence of `SpanvlaError`.
    """
    path = Path(model_dir)
    if path.suffix != '.yaml':
        path /= CONFIG_FILE
    try:
        text = path.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise SpanvlaError(f'{path}: cannot be read ({error}); name a model directory') from error
    return parse_config(text, str(path))


def parse_config(text: str, where: str = CONFIG_FILE) -> ModelConfig:
    """The configuration in a YAML text; `where` names the text in errors."""
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        line = str(error).splitlines()[0]
        raise SpanvlaError(f'{where}: not valid YAML ({line}); mend that line') from error
    if not isinstance(raw, dict):
        raise SpanvlaError(f'{where}: must be a mapping of model settings, not {raw!r:.40}')
    values = _typed_fields(ModelConfig, {k: v for k, v in raw.items() if k != 'cameras'}, where)
    cameras = raw.get('cameras')
    if cameras is not None:
        if not isinstance(cameras, list) or not cameras:
            raise SpanvlaError(f'{where}: cameras must be a list with at least one camera')
        values['cameras'] = tuple(
            _camera(entry, f'{where}: cameras[{i}]') for i, entry in enumerate(cameras)
        )
    config = ModelConfig(**values)
    _check(config, where)
    return config


def dump_config(config: ModelConfig) -> str:
    """The configuration as the YAML text `parse_config` reads."""
    _check(config, CONFIG_FILE)
    content = asdict(config)
    content['cameras'] = [asdict(camera) for camera in config.cameras]
    return yaml.safe_dump(content, sort_keys=False)


def with_settings(config: ModelConfig, **settings: Any) -> ModelConfig:
    """The configuration with some fields replaced, checked like a file."""
    changed = replace(config, **settings)
    _check(changed, 'model settings')
    return changed


def typed_settings(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Some settings of a model by name, each of its type, for `with_settings`."""
    return _typed_fields(ModelConfig, dict(raw), where)


def _camera(entry: object, where: str) -> CameraSpec:
    if not isinstance(entry, dict):
        raise SpanvlaError(f'{where}: must be a mapping, not {entry!r:.40}')
    values = _typed_fields(CameraSpec, entry, where)
    missing = [f.name for f in fields(CameraSpec) if f.default is MISSING and f.name not in values]
    if missing:
        raise SpanvlaError(f'{where}: lacks {", ".join(missing)}; add it')
    return CameraSpec(**values)


def _typed_fields(kind: type, raw: dict[Any, Any], where: str) -> dict[str, Any]:
    wanted = {field.name: str(field.type) for field in fields(kind) if field.name != 'cameras'}
    values: dict[str, Any] = {}
    for name, value in raw.items():
        if name not in wanted:
            raise SpanvlaError(f'{where}: {name!r} is not a setting; use {sorted(wanted)}')
        good: object
        if wanted[name] == 'str':
            good = isinstance(value, str)
        elif wanted[name] == 'int':
            good = isinstance(value, int) and not isinstance(value, bool)
        else:
            good = isinstance(value, int | float) and not isinstance(value, bool)
            good = good and math.isfinite(value)
        if not good:
            raise SpanvlaError(
                f'{where}: {name} must be of type {wanted[name]}, not {value!r:.40}'
            )
        values[name] = float(value) if wanted[name] == 'float' else value
    return values


def _check(config: ModelConfig, where: str) -> None:
    for name, allowed in (
        ('family', FAMILIES),
        ('source', SOURCES),
        ('head', HEAD_KINDS),
        ('schedule', SCHEDULES),
    ):
        if getattr(config, name) not in allowed:
            raise SpanvlaError(
                f'{where}: {name} is {getattr(config, name)!r}; use one of {", ".join(allowed)}'
            )
    for field in fields(ModelConfig):
        value = getattr(config, field.name)
        if (
            isinstance(value, int | float)
            and value <= 0
            and field.name not in ('noise_std', 'reasoning_slot', 'interval')
        ):
            raise SpanvlaError(f'{where}: {field.name} is {value}; it must be above zero')
    if min(config.noise_std, config.reasoning_slot, config.interval) < 0:
        raise SpanvlaError(f'{where}: noise_std, reasoning_slot and interval must not be negative')
    if abs(config.history_poses * config.history_step_s - config.history_s) > 1e-6:
        raise SpanvlaError(f'{where}: history_s must be a multiple of history_step_s')
    if len(set(config.camera_names)) != len(config.cameras):
        raise SpanvlaError(f'{where}: two cameras share a name; rename one')
    cell_px = config.patch_px * config.patch_merge
    for camera in config.cameras:
        if (camera.width_px, camera.height_px) != (config.width_px, config.height_px):
            raise SpanvlaError(f'{where}: camera {camera.name} differs in size; give all one size')
        if not 0 < camera.fov_deg < 180:
            raise SpanvlaError(f'{where}: camera {camera.name}: fov_deg must lie in 0..180')
    if (
        min(config.width_px, config.height_px) <= 0
        or config.width_px % cell_px
        or (config.height_px % cell_px)
    ):
        raise SpanvlaError(f'{where}: picture sizes must be multiples of {cell_px} px')
