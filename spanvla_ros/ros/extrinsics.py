"""Where the rig's cameras stand: as the model's, out of a rig file, or from `/tf_static`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

from spanvla_ros.model.config import CameraSpec
from spanvla_ros.ros.parameters import PlannerSettings
from spanvla_ros.runtime.virtual_camera import FrameTree, Mount, check_rig, read_rig
from spanvla_ros.types import SpanvlaError

# Several broadcasters latch one message each; a shallow queue would lose some of them.
STATIC = QoSProfile(
    depth=100,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)


class Extrinsics:
    """Answers for each camera where it stands, from the one source that was chosen."""

    def __init__(
        self, node: Node, settings: PlannerSettings, cameras: tuple[CameraSpec, ...]
    ) -> None:
        """Read the rig file, or listen to `/tf_static`.

        Raises:
            SpanvlaError: a rig file that does not fit the model, or tf2_msgs asked for and absent.
        """
        self._base_frame = settings.base_frame
        self._rig: Mapping[str, Mount] | None = None
        self._tree: FrameTree | None = None
        self._node, self._subscription = node, None
        if settings.extrinsics == 'file':
            self._rig = read_rig(settings.rig_file)
            check_rig(self._rig, cameras, settings.rig_file)
        if settings.extrinsics == 'tf':
            self._tree = FrameTree()
            self._subscription = node.create_subscription(
                _transforms_type(), '/tf_static', self._tree.add, STATIC
            )

    def mount(self, camera: str, optical_frame: str) -> tuple[Mount | None, str]:
        """The mount of a camera, None for that of the model; and what is in doubt about it.

        Args:
            camera: its name in the model.
            optical_frame: frame of its `camera_info`.
        """
        if self._rig is not None:
            return self._rig[camera], ''
        if self._tree is None:
            return None, ''
        mount = self._tree.mount(self._base_frame, optical_frame)
        if mount is None:
            return None, (
                f'no chain from {self._base_frame} to {optical_frame!r:.40} on /tf_static; taken '
                'to look where the camera of the model does'
            )
        return mount, ''

    def close(self) -> None:
        """End the subscription."""
        if self._subscription is not None:
            self._node.destroy_subscription(self._subscription)


def _transforms_type() -> Any:
    try:
        from tf2_msgs.msg import TFMessage
    except ImportError as error:
        raise SpanvlaError(
            'extrinsics tf: tf2_msgs is not installed; install ros-$ROS_DISTRO-tf2-msgs, or set '
            'extrinsics to file and rig_file to a file of mounts'
        ) from error
    return TFMessage
