"""A rig of large raw cameras, each part as a process of its own, and a model that wants them.

`python camera_load.py MODEL SECONDS` waits for the subscriptions, says `begin`, publishes pictures
of all cameras of a model at once and the odometry of a car that stands, and prints as JSON how
many pictures of each camera were sent. `python camera_load.py listen` hears plans and diagnostics
until its input ends and prints them as JSON.
"""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

WIDTH_PX, HEIGHT_PX, CAMERA_HZ, ODOMETRY_HZ = 1600, 900, 10.0, 50.0
NAMESPACE = '/spanvla'


def four_camera_model(folder: Path) -> Path:
    """A model of the town's size with a fourth camera, to the rear; its weights are random."""
    from spanvla_ros.model.action_tokens import ActionCodebook
    from spanvla_ros.model.config import TOWN_CAMERAS, ModelConfig
    from spanvla_ros.model.flow import Normalization
    from spanvla_ros.model.policy import new_policy, save_policy
    from spanvla_ros.runtime.export import export_model

    cameras = (*TOWN_CAMERAS, replace(TOWN_CAMERAS[0], name='rear', yaw_deg=180.0))
    policy = new_policy(ModelConfig(cameras=cameras, prompt_tokens=200), seed=0)
    policy.normalization = Normalization('history', np.ones((10, 3)))
    policy.codebook = ActionCodebook(np.zeros((256, 3)))
    save_policy(policy, folder / 'trained', {'stages': []})
    export_model(folder / 'trained', folder / 'model')
    return folder / 'model'


def main(model: str, seconds: float) -> None:
    """Publish for a while."""
    import rclpy
    from nav_msgs.msg import Odometry
    from rclpy.qos import qos_profile_sensor_data
    from rclpy.serialization import serialize_message
    from sensor_msgs.msg import CameraInfo, Image

    from spanvla_ros.model.config import load_config

    rclpy.init()
    node = rclpy.create_node('cameras', namespace=NAMESPACE)
    cameras = load_config(model).cameras
    odometry = node.create_publisher(Odometry, 'input/odometry', 50)
    images, infos, heads, bodies = {}, {}, {}, {}
    for camera in cameras:
        base = f'input/{camera.name}'
        images[camera.name] = node.create_publisher(
            Image, f'{base}/image', qos_profile_sensor_data
        )
        infos[camera.name] = node.create_publisher(CameraInfo, f'{base}/camera_info', 5)
        picture = Image(width=WIDTH_PX, height=HEIGHT_PX, encoding='rgb8', step=3 * WIDTH_PX)
        picture.header.frame_id = f'{camera.name}_optical_frame'
        pixels = np.random.default_rng(1).integers(0, 255, (HEIGHT_PX, WIDTH_PX, 3), np.uint8)
        picture.data.frombytes(pixels.tobytes())
        # A driver in C++ copies a picture once; so does this one, past Python's message objects.
        content = serialize_message(picture)
        heads[camera.name], bodies[camera.name] = content[:4], content[12:]

    ego = Odometry(child_frame_id='base_link')
    ego.header.frame_id = 'odom'
    ego.pose.pose.orientation.w = 1.0
    while any(not image.get_subscription_count() for image in images.values()):
        time.sleep(0.1)
    # What is sent before both sides know of each other is nobody's loss.
    time.sleep(1.0)
    print('begin', flush=True)  # noqa: T201
    begin_s, exposures = time.monotonic(), 0
    focal_px = 0.5 * WIDTH_PX / math.tan(math.radians(45.0))
    for step in range(round(seconds * ODOMETRY_HZ)):
        time.sleep(max(begin_s + step / ODOMETRY_HZ - time.monotonic(), 0.0))
        stamp = node.get_clock().now().to_msg()
        ego.header.stamp = stamp
        odometry.publish(ego)
        if step % round(ODOMETRY_HZ / CAMERA_HZ):
            continue
        exposures += 1
        when = np.array([stamp.sec, stamp.nanosec], '<u4').tobytes()
        for name in images:
            info = CameraInfo(width=WIDTH_PX, height=HEIGHT_PX, distortion_model='plumb_bob')
            info.header.stamp, info.header.frame_id = stamp, f'{name}_optical_frame'
            k = [focal_px, 0.0, WIDTH_PX / 2, 0.0, focal_px, HEIGHT_PX / 2, 0.0, 0.0, 1.0]
            info.k, info.d = k, [0.0] * 5
            infos[name].publish(info)
            images[name].publish(b''.join((heads[name], when, bodies[name])))
    print(json.dumps(dict.fromkeys(images, exposures)), flush=True)  # noqa: T201
    node.destroy_node()
    rclpy.shutdown()


def listen() -> None:
    """Hear plans and the newest diagnostics until the input ends, a second longer for the last."""
    import rclpy
    from diagnostic_msgs.msg import DiagnosticArray
    from std_msgs.msg import String

    rclpy.init()
    node = rclpy.create_node('ear', namespace=NAMESPACE)
    lines: dict[str, dict[str, str]] = {}
    stamps: set[int] = set()

    def on_diagnostics(message: DiagnosticArray) -> None:
        for line in message.status:
            lines[line.name] = {entry.key: entry.value for entry in line.values}

    def on_plan(message: String) -> None:
        stamps.add(json.loads(message.data)['trajectory']['stamp_ns'])

    node.create_subscription(DiagnosticArray, '/diagnostics', on_diagnostics, 50)
    node.create_subscription(String, 'plan', on_plan, 50)
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), ended.set()), daemon=True).start()
    while not ended.is_set():
        rclpy.spin_once(node, timeout_sec=0.1)
    end_s = time.monotonic() + 2.5
    while time.monotonic() < end_s:
        rclpy.spin_once(node, timeout_sec=0.1)
    print(json.dumps({**lines, 'plans': len(stamps)}), flush=True)  # noqa: T201
    node.destroy_node()
    rclpy.shutdown()


if __name__ == '__main__':
    if sys.argv[1:] == ['listen']:
        listen()
    else:
        main(sys.argv[1], float(sys.argv[2]))
