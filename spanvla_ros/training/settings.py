"""What one training stage is told: a flat YAML file, checked field by field."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from spanvla_ros.model.config import typed_settings
from spanvla_ros.types import SpanvlaError

ROLLOUT_POLICIES = ('tokens', 'flow', 'plan')
LABELS = ('positive', 'negative', 'recovery')
PRECISIONS = ('fp32', 'bf16')
DEVICES = ('cpu', 'cuda')
SHARDINGS = ('none', 'fsdp')
TIME_SAMPLERS = ('uniform', 'beta', 'logit_normal')
MODEL_SETTINGS = (
    'head', 'interval', 'source', 'waypoints', 'anchors', 'noise_std', 'expert_width',
    'frames_per_camera', 'action_tokens', 'prompt_tokens', 'answer_tokens',
)  # fmt: skip


@dataclass(frozen=True)
class TrainSettings:
    """All settings of a stage; a stage reads those it needs.

    Length: `steps` above zero trains that many; else `minutes` of wall time, evaluations
    included, and the schedule follows the share of time used (then a resumed run is not
    bit-exact). `stop_after` ends this call early with its state saved; the schedule ignores it.

    `model_config` names a YAML file like a model directory's `config.yaml`: cameras, horizon,
    bridge and widths of a model that this run starts, fresh or from a Hugging Face folder.

    `batch` is the number of rows over all processes; a step takes the mean gradient of
    `accumulate` batches, one after the other. Rates: warm-up, then cosine down to
    `final_rate` of `learning_rate`; `vision_rate` scales the vision tower's.

    `model` changes the configuration of the model that is trained; in a file and in overrides its
    names stand beside the others (`head`, `interval`, `source`, `waypoints`, ...). A changed model
    keeps its backbone and starts from a fresh expert; with `fresh_expert` so does an unchanged
    one. Other `frames_per_camera` keep the expert, too, and make the prompt as long as it has to
    be.

    `cache` names a folder for the K/V of `cache_rows` rows (0 takes all), for what trains the
    expert alone, action-expert and grpo on the flow: `training.kv_cache`.

    `lora_rank` above zero trains low-rank adapters on `lora_targets` of the language model in
    place of the backbone's own weights; with `lora_embeddings` the token vectors train along,
    without which new tokens stay as drawn.

    With `gradient_checkpointing` a backward pass computes every block of the backbone once more in
    place of keeping what it found. `sharding: fsdp` gives each process its part of all weights,
    gradients and moments (`training.sharding`); `none` gives it all of them. `vision_rate` 0
    leaves the eyes of `sft` as they are.

    `device` is `cpu` or `cuda`, then a GPU a process. Batches are made by `feeders` processes
    ahead of their use (0: by the training process itself), rewards of GRPO by `scorers` processes;
    the batches are the same whoever makes them.

    Rows are drawn with weight 1 + the three class weights where the row has the class; those
    whose label is not among `labels` never: supervised stages must not learn negatives.

    GRPO: `group` answers a row of `rollout_policy` (`tokens` at `temperature`, `flow` with
    `flow_noise`, or `plan` with deviations of `plan_along_m` and `plan_across_m` at 4 s),
    `updates` steps a batch (clipped by `ratio_clip` if more than one), `kl` to the reference,
    adapters of `lora_rank`. An advantage is in units of the deviation of its group's rewards, or
    of `advantage_unit` where that is above zero. Each `reward_NAME` is the weight of a term of
    `rewards.REWARDS`; `reward_scale` multiplies their sum, `reward_radius_m` is where nearness to
    a negative or recovery ends.
    """

    data: str = ''
    model_config: str = ''
    heldout: str = ''
    steps: int = 0
    minutes: float = 0.0
    stop_after: int = 0
    batch: int = 16
    accumulate: int = 1
    processes: int = 1
    threads: int = 1
    precision: str = 'fp32'
    compiled: bool = False
    seed: int = 0
    learning_rate: float = 1.5e-3
    vision_rate: float = 1.0
    warmup_steps: int = 60
    final_rate: float = 0.03
    decay: float = 0.03
    clip: float = 1.0
    weight_pedestrian: float = 2.5
    weight_light: float = 0.8
    weight_lead: float = 0.3
    evaluate_every_s: float = 90.0
    save_every_s: float = 180.0
    heldout_rows: int = 240
    tensorboard: bool = False
    blind: bool = False
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_targets: str = 'q_proj k_proj v_proj o_proj'
    lora_embeddings: bool = True
    auxiliary_weight: float = 0.5
    reasoning_weight: float = 1.0
    action_weight: float = 1.0
    flow_weight: float = 1.0
    draws: int = 4
    detach_bridge: bool = True
    end_to_end: bool = False
    camera_drop: float = 0.08
    history_drop: float = 0.10
    route_drop: float = 0.03
    route_noise_m: float = 0.3
    history_noise_m: float = 0.03
    slot_empty: float = 0.5
    slot_foreign: float = 0.15
    answer_seen: float = 0.5
    fresh_expert: bool = False
    cache: str = ''
    cache_rows: int = 0
    time_sampler: str = 'uniform'
    time_shift: float = -0.5
    labels: str = 'positive recovery'
    rollout_policy: str = 'tokens'
    group: int = 8
    updates: int = 1
    ratio_clip: float = 0.2
    kl: float = 0.04
    temperature: float = 1.0
    flow_noise: float = 0.3
    plan_along_m: float = 1.5
    plan_across_m: float = 0.3
    advantage_unit: float = 0.0
    reward_scale: float = 10.0
    reward_pdms: float = 0.0
    reward_epdms: float = 1.0
    reward_negative: float = 0.5
    reward_recovery: float = 0.5
    reward_cot_length: float = 0.1
    reward_say_do: float = 0.2
    reward_format: float = 0.1
    reward_goal: float = 0.0
    reward_radius_m: float = 1.7
    cot_center: float = 160.0
    cot_slope: float = 0.03
    lint_rows: int = 32
    gradient_checkpointing: bool = False
    sharding: str = 'none'
    device: str = 'cpu'
    feeders: int = 0
    scorers: int = 0
    model: Mapping[str, Any] = field(default_factory=dict)


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> TrainSettings:
    """Read a stage's YAML file and apply `name=value` overrides.

    Raises:
        SpanvlaError: unreadable file, unknown setting, wrong type, value out of range.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding='utf-8'))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        line = str(error).splitlines()[0]
        raise SpanvlaError(f'{path}: cannot be read ({line}); name a training file') from error
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise SpanvlaError(f'{path}: must be a mapping of training settings')
    for override in overrides:
        name, equals, value = override.partition('=')
        if not equals:
            raise SpanvlaError(f'--set {override}: write it as name=value')
        try:
            raw[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SpanvlaError(f'--set {override}: {value!r} is no YAML value; mend it') from error
    return _checked(raw, str(path))


def _checked(raw: dict[Any, Any], where: str) -> TrainSettings:
    kinds = {f.name: str(f.type) for f in fields(TrainSettings) if f.name != 'model'}
    values: dict[str, Any] = {}
    changes = dict(raw.pop('model', None) or {})
    changes |= {name: raw[name] for name in MODEL_SETTINGS if name in raw}
    values['model'] = typed_settings(changes, where)
    for name, value in raw.items():
        if name in MODEL_SETTINGS:
            continue
        if name not in kinds:
            raise SpanvlaError(f'{where}: {name!r} is no training setting; use {sorted(kinds)}')
        kind = kinds[name]
        if (
            kind == 'float'
            and isinstance(value, int | float | str)
            and not isinstance(value, bool)
        ):
            try:
                value = float(value)
            except ValueError:
                value = None
        good = {
            'float': isinstance(value, float) and math.isfinite(value),
            'int': isinstance(value, int) and not isinstance(value, bool),
            'bool': isinstance(value, bool),
            'str': isinstance(value, str),
        }[kind]
        if not good:
            raise SpanvlaError(f'{where}: {name} must be of type {kind}, not {raw[name]!r:.40}')
        values[name] = value
    settings = TrainSettings(**values)
    _check_ranges(settings, where)
    return settings


def _check_ranges(settings: TrainSettings, where: str) -> None:
    for name in (f.name for f in fields(TrainSettings) if f.name != 'time_shift'):
        value = getattr(settings, name)
        if isinstance(value, int | float) and not isinstance(value, bool) and value < 0:
            raise SpanvlaError(f'{where}: {name} is {value}; it must not be negative')
    for name in ('camera_drop', 'history_drop', 'route_drop', 'answer_seen', 'final_rate'):
        if getattr(settings, name) > 1:
            raise SpanvlaError(f'{where}: {name} is a share; it must lie in 0..1')
    if settings.slot_empty + settings.slot_foreign > 1:
        raise SpanvlaError(f'{where}: slot_empty and slot_foreign add up to more than 1')
    if (settings.steps == 0) == (settings.minutes == 0):
        raise SpanvlaError(f'{where}: give either steps or minutes, above zero')
    if settings.precision not in PRECISIONS:
        raise SpanvlaError(f'{where}: precision must be one of {", ".join(PRECISIONS)}')
    if settings.device not in DEVICES:
        raise SpanvlaError(f'{where}: device must be one of {", ".join(DEVICES)}')
    if settings.sharding not in SHARDINGS:
        raise SpanvlaError(f'{where}: sharding must be one of {", ".join(SHARDINGS)}')
    if settings.sharding == 'fsdp' and settings.processes < 2:
        raise SpanvlaError(f'{where}: sharding fsdp needs processes of 2 or more')
    if settings.compiled and (settings.gradient_checkpointing or settings.sharding == 'fsdp'):
        raise SpanvlaError(f'{where}: compiled goes with neither gradient_checkpointing nor fsdp')
    if settings.cache and (settings.processes > 1 or settings.end_to_end):
        raise SpanvlaError(f'{where}: cache needs processes 1 and end_to_end false')
    if settings.time_sampler not in TIME_SAMPLERS:
        raise SpanvlaError(f'{where}: time_sampler must be one of {", ".join(TIME_SAMPLERS)}')
    if min(settings.processes, settings.threads, settings.batch, settings.draws) < 1:
        raise SpanvlaError(f'{where}: processes, threads, batch and draws must be at least 1')
    if min(settings.group, settings.updates, settings.accumulate) < 1:
        raise SpanvlaError(f'{where}: group, updates and accumulate must be at least 1')
    if min(settings.temperature, settings.reward_radius_m, settings.reward_scale) <= 0:
        raise SpanvlaError(f'{where}: temperature, reward_radius_m, reward_scale must be above 0')
    if settings.rollout_policy not in ROLLOUT_POLICIES:
        raise SpanvlaError(f'{where}: rollout_policy must be one of {", ".join(ROLLOUT_POLICIES)}')
    if not settings.labels.split() or not set(settings.labels.split()) <= set(LABELS):
        raise SpanvlaError(f'{where}: labels must name some of {", ".join(LABELS)}')
    if settings.batch % settings.processes:
        raise SpanvlaError(
            f'{where}: batch {settings.batch} does not divide among {settings.processes} processes'
        )
