"""Cameras for a bag that has none: what the model's cameras would see of a map, drawn by us.

Roads and their lines only, from an OpenDRIVE file, at the recorded poses. Nothing that moves is
in such a file, so such a replay says nothing about reacting to others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from spanvla_ros.model.config import CameraSpec
from spanvla_ros.town.bodies import Paint
from spanvla_ros.town.camera import Renderer
from spanvla_ros.town.elements import GroundPolygon, Tint
from spanvla_ros.town.opendrive import load_opendrive
from spanvla_ros.town.opendrive_ground import paint_map
from spanvla_ros.types import CameraFrame, EgoState

DRAW_HZ = 10.0
PERIOD_NS = round(1e9 / DRAW_HZ)


@dataclass(frozen=True)
class DrawnFrom:
    """What stands in every result of such a replay."""

    map: str
    map_sha256: str

    @property
    def label(self) -> str:
        """The words that go with every picture."""
        return f'drawn by spanvla_ros from {self.map}, not recorded'


class Drawing:
    """Draws pictures for ego states, at most `DRAW_HZ` a second of the recording."""

    def __init__(self, path: Path, cameras: Sequence[CameraSpec]) -> None:
        """Read the map.

        Raises:
            SpanvlaError: not a map that can be drawn right.
        """
        self._ground: tuple[GroundPolygon, ...] = paint_map(load_opendrive(path), Paint())
        self._renderer = Renderer(cameras)
        self._due_ns: int | None = None
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.source = DrawnFrom(path.name, digest)

    def pictures(self, ego: EgoState) -> Iterator[CameraFrame]:
        """The pictures of this instant, the anchor's last; none before the next one is due.

        The anchor's picture asks for the plan, so its neighbors are there before it.
        """
        due_ns = self._due_ns
        # Farther ahead it is no due time of this clock, which has run back.
        if due_ns is not None and 0 < due_ns - ego.stamp_ns <= PERIOD_NS:
            return
        on_time = due_ns is not None and 0 <= ego.stamp_ns - due_ns < PERIOD_NS
        self._due_ns = PERIOD_NS + (due_ns if due_ns is not None and on_time else ego.stamp_ns)
        pictures = self._renderer.draw(self._ground, (), Tint(), ego.pose)
        frames = [
            CameraFrame(camera.name, ego.stamp_ns, picture)
            for camera, picture in zip(self._renderer.cameras, pictures, strict=True)
        ]
        yield from reversed(frames)
