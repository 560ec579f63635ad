"""The numeric inputs of the graphs: pictures and ego features."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, UInt8

from spanvla_ros.types import COMMANDS, Observation, SpanvlaError

SPEED_SCALE_MPS = 8.0
ACCEL_SCALE_MPS2 = 3.0
POSITION_SCALE_M = 8.0
YAW_GAIN = 3.0


def pixels(
    image: UInt8[np.ndarray, 'h w 3'],
    height_px: int | None = None,
    width_px: int | None = None,
) -> Float32[np.ndarray, '1 3 H W']:
    """An RGB picture as the vision graph takes it, values in 0..1.

    A picture of another size is cut to the wanted shape around its middle, then scaled; the
    field of view is the camera's own.

    Args:
        image: the picture.
        height_px: wanted height, the picture's own if None.
        width_px: wanted width, the picture's own if None.
    """
    image = fitted(image, height_px or image.shape[0], width_px or image.shape[1])
    planes = np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32)
    planes *= np.float32(1.0 / 255.0)
    return planes[None]


def fitted(
    image: UInt8[np.ndarray, 'h w 3'], height: int, width: int
) -> UInt8[np.ndarray, 'H W 3']:
    """A picture cut to the shape of `height` x `width` around its middle, then scaled to it."""
    if image.shape[:2] == (height, width):
        return image
    import cv2

    rows, columns = image.shape[:2]
    if rows < 2 or columns < 2:
        raise SpanvlaError(f'camera picture of {columns}x{rows} px is too small to plan from')
    scale = min(rows / height, columns / width)
    cut_rows = min(rows, max(1, round(height * scale)))
    cut_columns = min(columns, max(1, round(width * scale)))
    top, left = (rows - cut_rows) // 2, (columns - cut_columns) // 2
    cut = image[top : top + cut_rows, left : left + cut_columns]
    kind = cv2.INTER_AREA if scale >= 1.0 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(cut, (width, height), interpolation=kind))


def ego_features(observation: Observation) -> Float32[np.ndarray, 'm']:
    """Motion, past and command for the expert, each around one in size.

    Layout: speed/8 - 1, acceleration/3, yaw rate; past poses oldest first as x/8, y/8, 3 yaw,
    zero where not valid; their validity; the command one-hot in the order of `types.COMMANDS`.
    """
    ego = observation.ego
    past = observation.history / POSITION_SCALE_M
    past[:, 2] = observation.history[:, 2] * YAW_GAIN
    past[~observation.history_valid] = 0.0
    motion = (
        ego.speed_mps / SPEED_SCALE_MPS - 1.0,
        ego.accel_mps2 / ACCEL_SCALE_MPS2,
        ego.yaw_rate_radps,
    )
    command = [float(observation.command == name) for name in COMMANDS]
    return np.concatenate([motion, past.ravel(), observation.history_valid, command]).astype(
        np.float32
    )
