"""`spanvla replay`: what a recorded drive would have become with this model, reproducibly.

Leaves `trajectories.jsonl` (a line an accepted plan), `summary.json` and `index.html`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from spanvla_ros import __version__
from spanvla_ros.model.checkpoint import shipped_model_dir, write_text
from spanvla_ros.replay.bag import (
    Topics,
    Wish,
    find_topics,
    messages_in_order,
    static_transforms,
)
from spanvla_ros.replay.drawing import DRAW_HZ, Drawing
from spanvla_ros.replay.page import write_replay_page
from spanvla_ros.replay.steps import TOKENS_PER_FRAME, Replay, Step, open_loop_error
from spanvla_ros.report.bags import Bag, open_bag
from spanvla_ros.runtime.planner import Planner
from spanvla_ros.safety.state import load_vehicle
from spanvla_ros.types import SCHEDULES, SpanvlaError


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `spanvla replay`."""
    parser.add_argument('bag', help='bag folder, .mcap or .db3 file of ROS 2')
    parser.add_argument(
        '--camera',
        action='append',
        default=[],
        metavar='NAME=TOPIC',
        help='image topic of one of the cameras of the model; repeatable',
    )
    parser.add_argument('--odometry', default='', help='topic of nav_msgs/Odometry')
    parser.add_argument('--route', default='', help='topic of nav_msgs/Path, the announced path')
    parser.add_argument('--model', help='model directory; default: the shipped town model')
    parser.add_argument('--backend', default='auto', help='auto, onnxruntime, torch or tensorrt')
    parser.add_argument('--schedule', choices=SCHEDULES, help='default: that of the model')
    parser.add_argument('--vehicle', default='', help='vehicle file; default: the built-in one')
    parser.add_argument(
        '--draw-cameras',
        metavar='MAP.xodr',
        help='draw the cameras from an OpenDRIVE map, for a bag that has none',
    )
    parser.add_argument(
        '--origin-ahead-m',
        type=float,
        default=0.0,
        help='how far what the odometry follows lies ahead of the rear axle; CARLA: about 1.4',
    )
    parser.add_argument('--out', required=True, help='folder for what the replay leaves')


def run(options: argparse.Namespace) -> int:
    """Replay a bag; 0 if at least one plan was accepted, else 1."""
    wish = Wish(_cameras(options.camera), options.odometry, options.route)
    vehicle = load_vehicle(options.vehicle)
    path = Path(options.bag)
    with open_bag(path) as bag:
        model_dir = Path(options.model) if options.model else shipped_model_dir()
        # A bag that lacks something is told before a model is loaded, whichever model it is.
        config_names = _camera_names(model_dir)
        map_file = Path(options.draw_cameras) if options.draw_cameras else None
        topics = find_topics(
            bag.connections, wish, config_names, str(path), drawn=map_file is not None
        )
        planner = Planner.open(model_dir, options.backend, schedule=options.schedule)
        drawing = None if map_file is None else Drawing(map_file, planner.config.cameras)
        replay = Replay(
            planner,
            topics,
            vehicle,
            static_transforms(bag),
            origin_ahead_m=options.origin_ahead_m,
            drawing=drawing,
        )
        with tqdm(
            total=_pictures(bag, topics, config_names[0]),
            desc='replay',
            unit='picture',
            leave=False,
        ) as bar:
            for topic, message in messages_in_order(bag, topics):
                replay.feed(topic, message)
                bar.n = len(replay.steps)
                bar.update(0)
        replay.finish()
    return _leave(replay, path, Path(options.out))


def _pictures(bag: Bag, topics: Topics, anchor: str) -> int:
    """How many pictures will be planned from, for the progress bar."""
    counts = {connection.topic: connection.msgcount for connection in bag.connections}
    drawn = round((bag.end_ns - bag.begin_ns) / 1e9 * DRAW_HZ)
    return counts.get(topics.images[anchor], drawn)


def _camera_names(model_dir: Path) -> tuple[str, ...]:
    from spanvla_ros.model.checkpoint import load_model_dir

    return tuple(camera.name for camera in load_model_dir(model_dir).config.cameras)


def _cameras(pairs: list[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        name, equals, topic = pair.partition('=')
        if not (name and equals and topic):
            raise SpanvlaError(f'--camera {pair}: write NAME=TOPIC, such as front=/camera/image')
        found[name] = topic
    return found


def trajectory_line(step: Step, frame_id: str) -> str:
    """One accepted plan as a line of `trajectories.jsonl`; poses to the micrometer."""
    plan = step.plan
    if plan is None:
        raise ValueError('a step without a plan has no line')
    return json.dumps(
        {
            'stamp_ns': step.stamp_ns,
            'frame_id': frame_id,
            'times_s': plan.trajectory.times_s.tolist(),
            'poses': np.round(plan.trajectory.poses, 6).tolist(),
            'state': step.state,
            'reasons': list(step.reasons),
        },
        allow_nan=False,
    )


def _leave(replay: Replay, bag: Path, out: Path) -> int:
    accepted = [step for step in replay.steps if step.accepted]
    text = ''.join(f'{trajectory_line(step, replay.odometry_frame)}\n' for step in accepted)
    summary = _summary(replay, bag, hashlib.sha256(text.encode()).hexdigest())
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / 'trajectories.jsonl', text)
    write_text(out / 'summary.json', json.dumps(summary, indent=2, allow_nan=False) + '\n')
    write_replay_page(out / 'index.html', replay, summary)
    ade = summary['ade_m']
    print(  # noqa: T201
        f'replay: {len(accepted)} of {len(replay.steps)} pictures planned, '
        f'{_counted(summary["states"])}, ADE '
        f'{"unknown" if ade is None else f"{ade:.2f} m"}, see {out / "index.html"}'
    )
    if replay.drawing is not None:
        print(f'replay: the pictures are {replay.drawing.source.label}')  # noqa: T201
    return 0 if accepted else 1


def _counted(counts: dict[str, int]) -> str:
    return ', '.join(f'{name} {count}' for name, count in counts.items()) or 'no state'


def _summary(replay: Replay, bag: Path, digest: str) -> dict[str, Any]:
    planner, topics = replay.planner, replay.topics
    accepted = [step for step in replay.steps if step.accepted]
    error = open_loop_error(replay.steps, replay.egos)
    return {
        'bag': bag.name,
        'topics': _topics_json(topics),
        'pictures': len(replay.steps),
        'pictures_drawn_from': None if replay.drawing is None else asdict(replay.drawing.source),
        'plans': len(accepted),
        'not_planned': dict(Counter(step.refusal for step in replay.steps if step.refusal)),
        'states': dict(Counter(step.state for step in accepted)),
        'reasons': dict(Counter(reason for step in accepted for reason in step.reasons)),
        'refused_inputs': dict(replay.refused),
        'trajectories_sha256': digest,
        'ade_m': error.ade_m,
        'fde_m': error.fde_m,
        'open_loop': asdict(error),
        'schedule': planner.schedule,
        'steps': planner.steps,
        'tokens_per_frame': TOKENS_PER_FRAME,
        'backend': planner.backend.name,
        'model_sha256': planner.model_sha256,
        'versions': {'spanvla_ros': __version__, 'numpy': np.__version__},
    }


def _topics_json(topics: Topics) -> dict[str, Any]:
    return {
        'images': dict(topics.images),
        'camera_info': dict(topics.infos),
        'odometry': topics.odometry,
        'route': topics.route,
    }
