"""NAVSIM's pickles, read without letting them run anything.

The logs and metric caches are pickles, a format that can name any function of any module and
call it. Here a name stands for something only if it is in the tables below, and what it stands
for is ours: a bag that holds what the pickle says was in the object. No class of NAVSIM, nuPlan or
scipy is imported. Every other name ends the reading.
"""

from __future__ import annotations

import lzma
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from spanvla_ros.types import SpanvlaError

MAX_BYTES = 2**31
_XZ_MAGIC = b'\xfd7zXZ\x00'


class Bag:
    """What a pickle says was in an object: the arguments of its constructor, its attributes."""

    def __init__(self, *args: Any) -> None:
        """Keep the arguments."""
        self.args = args
        self.held: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        """Keep the attributes; objects with slots bring them in a second mapping."""
        if not hasattr(self, 'held'):
            self.__init__()  # type: ignore[misc]
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if part is not None:
                self.held.update({str(name): value for name, value in dict(part).items()})

    def __getitem__(self, name: str) -> Any:
        """One attribute.

        Raises:
            SpanvlaError: the object has none of that name.
        """
        if name not in self.__dict__.get('held', {}):
            raise SpanvlaError(f'a {type(self).__name__} without {name}')
        return self.held[name]

    def argument(self, number: int) -> Any:
        """One argument of the constructor."""
        args = self.__dict__.get('args', ())
        if number >= len(args):
            raise SpanvlaError(f'a {type(self).__name__} made of {len(args)} things')
        return args[number]


_STATE = 'nuplan.common.actor_state'
_PDM = 'navsim.planning.simulation.planner.pdm_planner'
_TRAJECTORY = 'nuplan.planning.simulation.trajectory'
_BAGS = (
    ('navsim.planning.metric_caching.metric_cache', 'MetricCache'),
    ('navsim.planning.metric_caching.metric_cache', 'MapParameters'),
    ('navsim.common.dataclasses', 'Trajectory'),
    ('navsim.common.enums', 'SceneFrameType'),
    (f'{_PDM}.observation.pdm_observation', 'PDMObservation'),
    (f'{_PDM}.observation.pdm_occupancy_map', 'PDMOccupancyMap'),
    (f'{_PDM}.observation.pdm_occupancy_map', 'PDMDrivableMap'),
    (f'{_PDM}.utils.pdm_path', 'PDMPath'),
    (f'{_STATE}.ego_state', 'EgoState'),
    (f'{_STATE}.car_footprint', 'CarFootprint'),
    (f'{_STATE}.dynamic_car_state', 'DynamicCarState'),
    (f'{_STATE}.vehicle_parameters', 'VehicleParameters'),
    (f'{_STATE}.oriented_box', 'OrientedBox'),
    (f'{_STATE}.oriented_box', 'Dimension'),
    (f'{_STATE}.state_representation', 'Point2D'),
    (f'{_STATE}.state_representation', 'StateSE2'),
    (f'{_STATE}.state_representation', 'ProgressStateSE2'),
    (f'{_STATE}.state_representation', 'StateVector2D'),
    (f'{_STATE}.state_representation', 'TimePoint'),
    (f'{_STATE}.waypoint', 'Waypoint'),
    (f'{_STATE}.agent', 'Agent'),
    (f'{_STATE}.agent_state', 'AgentState'),
    (f'{_STATE}.static_object', 'StaticObject'),
    (f'{_STATE}.scene_object', 'SceneObjectMetadata'),
    (f'{_STATE}.tracked_objects', 'TrackedObjects'),
    (f'{_STATE}.tracked_objects_types', 'TrackedObjectType'),
    ('nuplan.common.maps.maps_datatypes', 'SemanticMapLayer'),
    ('nuplan.planning.simulation.observation.observation_type', 'DetectionsTracks'),
    (f'{_TRAJECTORY}.interpolated_trajectory', 'InterpolatedTrajectory'),
    (f'{_TRAJECTORY}.trajectory_sampling', 'TrajectorySampling'),
    ('pathlib', 'PosixPath'),
    ('numpy', 'ndarray'),
)


def _empty_array(*_: Any) -> np.ndarray:
    # What follows in the pickle sets its shape and content.
    array: np.ndarray = np.zeros(0).__reduce__()[0](np.ndarray, (0,), b'b')  # type: ignore[operator]
    return array


def _array_of(data: Any, code: np.dtype[Any], shape: Any, order: str) -> np.ndarray:
    found = np.frombuffer(data, dtype=code).reshape(shape, order=order)  # type: ignore[call-overload]
    return np.asarray(found)


def _number_of(code: np.dtype[Any], data: bytes) -> Any:
    if code.hasobject:
        raise SpanvlaError('a number of objects')
    return np.frombuffer(data, dtype=code, count=1)[0]


def _bytes_of(text: str, encoding: str) -> bytes:
    if encoding != 'latin1':
        raise SpanvlaError(f'bytes in {encoding!r:.40}')
    return text.encode('latin1')


def _geometry_of(data: bytes) -> Any:
    return shapely.from_wkb(data)


_MADE: dict[tuple[str, str], Callable[..., Any]] = {
    ('numpy', 'dtype'): np.dtype,
    ('_codecs', 'encode'): _bytes_of,
    ('shapely.io', 'from_wkb'): _geometry_of,
    ('shapely', 'from_wkb'): _geometry_of,
    **{
        (f'numpy.{core}.{module}', name): make
        for core in ('core', '_core')
        for module, name, make in (
            ('multiarray', '_reconstruct', _empty_array),
            ('multiarray', 'scalar', _number_of),
            ('numeric', '_frombuffer', _array_of),
        )
    },
    **{key: type(key[1], (Bag,), {}) for key in _BAGS},
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """What a name of the pickle stands for; a name that is in no table is refused."""
        if (module, name) not in _MADE:
            raise SpanvlaError(f"names {module:.80}.{name:.80}, which is none of NAVSIM's data")
        return _MADE[module, name]


def read_pickle(path: Path) -> Any:
    """The content of one pickle, unpacked first where it is xz-compressed.

    Raises:
        SpanvlaError: the file cannot be read, is too large, or names what is not in the tables.
    """
    try:
        with open(path, 'rb') as raw:
            packed = raw.read(len(_XZ_MAGIC)) == _XZ_MAGIC
        with lzma.open(path) if packed else open(path, 'rb') as file:
            if not packed and path.stat().st_size > MAX_BYTES:
                raise SpanvlaError(f'is over {MAX_BYTES} bytes')
            return _Reader(_Limited(file)).load()
    except SpanvlaError as error:
        raise SpanvlaError(f'{path}: {error}; refused') from error
    except Exception as error:
        # A damaged pickle fails in as many ways as there are opcodes.
        words = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SpanvlaError(f'{path}: is no readable pickle ({words:.120})') from error


class _Limited:
    """A file of which at most `MAX_BYTES` can be read: xz unpacks to any size."""

    def __init__(self, file: Any) -> None:
        self._file, self._left = file, MAX_BYTES

    def _taken(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise SpanvlaError(f'unpacks to over {MAX_BYTES} bytes')
        return data

    def read(self, size: int) -> bytes:
        return self._taken(self._file.read(min(size, self._left + 1)))

    def readline(self) -> bytes:
        return self._taken(self._file.readline(self._left + 1))
