"""The guardian's trajectory in Autoware's own types, where those are installed and asked for."""

from __future__ import annotations

import importlib
import uuid
from typing import Any

import numpy as np
from rclpy.node import Node
from rclpy.qos import QoSProfile

from spanvla_ros.autoware import MAP_FRAME, Motion, fill_candidates, fill_trajectory
from spanvla_ros.safety.state import GuardianOutput
from spanvla_ros.types import SpanvlaError


def autoware_class(asker: str, package: str, name: str) -> Any:
    """A message class of Autoware.

    Raises:
        SpanvlaError: its package is not installed.
    """
    try:
        return getattr(importlib.import_module(f'{package}.msg'), name)
    except ImportError as error:
        raise SpanvlaError(
            f'{asker} needs {package}, which is not installed; source the Autoware workspace'
        ) from error


class AutowareTrajectory:
    """Publishes `output/autoware_trajectory`, and `output/autoware_candidates` where asked for.

    Candidates name their generator, so that a selector can tell this planner's from another's.
    """

    def __init__(self, node: Node, profile: QoSProfile) -> None:
        """Open the topics.

        Raises:
            SpanvlaError: a message package is not installed, or the output is not in `map`.
        """
        frame = node.get_parameter('output_frame').value
        if frame != MAP_FRAME:
            raise SpanvlaError(
                f'guardian: autoware plans in {MAP_FRAME}, output_frame is {frame}; set it to '
                f'{MAP_FRAME} or autoware to false'
            )
        self._generator = str(node.get_parameter('autoware_generator').value)
        planning, internal = 'autoware_planning_msgs', 'autoware_internal_planning_msgs'
        asker = 'guardian: autoware'
        self._kind = autoware_class(asker, planning, 'Trajectory')
        self._point = autoware_class(asker, planning, 'TrajectoryPoint')
        self._publisher = node.create_publisher(self._kind, 'output/autoware_trajectory', profile)
        self._candidates: Any = None
        if self._generator:
            asker = 'guardian: autoware_generator'
            self._kinds = [
                autoware_class(asker, internal, name)
                for name in ('CandidateTrajectories', 'CandidateTrajectory', 'GeneratorInfo')
            ]
            # The same name is the same generator, also after a restart.
            number = uuid.uuid5(uuid.NAMESPACE_URL, f'spanvla_ros:{self._generator}')
            self._number = np.frombuffer(number.bytes, np.uint8)
            self._candidates = node.create_publisher(
                self._kinds[0], 'output/autoware_candidates', profile
            )

    def publish(self, output: GuardianOutput) -> None:
        """Send one output."""
        motion = Motion(
            output.trajectory, output.speeds_mps, output.accels_mps2, output.yaw_rates_radps
        )
        self._publisher.publish(fill_trajectory(self._kind(), self._point, motion))
        if self._candidates is None:
            return
        message, candidate, info = (kind() for kind in self._kinds)
        fill_trajectory(candidate, self._point, motion)
        fill_candidates(message, candidate, info, self._generator, self._number)
        self._candidates.publish(message)
