"""What the drawn town knows of a moment beyond its pictures: targets for the knowledge stage.

Which classes show in the cell of each visual token, and fourteen facts. A light or pedestrian that
shows in no picture is taken out of the facts: nobody could read it off the pictures.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from spanvla_ros.model.reasoning import Component, Decision
from spanvla_ros.town.elements import CLASSES, GREEN, PEDESTRIAN, RED

CELL_PX = 28
LEAD_CLOSE_M = 30.0
# Columns of `town.snapshots.facts` that hang on a class being in the picture.
_LIGHT_FACTS = slice(3, 6)
_PEDESTRIAN_FACTS = slice(6, 8)


def presence(classes: UInt8[np.ndarray, 'c h w']) -> Bool[np.ndarray, 'tokens 7']:
    """Whether each class but `other` shows in the 28 x 28 pixels of each visual token.

    Tokens run camera by camera, then row by row, as in the prompt.

    Raises:
        ValueError: the pictures do not divide into whole cells.
    """
    count, height, width = classes.shape
    if height % CELL_PX or width % CELL_PX:
        raise ValueError(f'pictures of {width}x{height} do not divide into {CELL_PX} px cells')
    rows, columns = height // CELL_PX, width // CELL_PX
    # One bit a class, gathered over each cell: far cheaper than a comparison for every class.
    bits = np.left_shift(np.uint8(1), classes)
    bits = bits.reshape(count, rows, CELL_PX, columns, CELL_PX)
    cells = np.bitwise_or.reduce(np.bitwise_or.reduce(bits, axis=2), axis=3).reshape(-1, 1)
    return (cells >> np.arange(1, len(CLASSES), dtype=np.uint8)) & 1 == 1


def visible_facts(
    facts: Float32[np.ndarray, '14'], shown: Bool[np.ndarray, 'tokens 7']
) -> Float32[np.ndarray, '14']:
    """The facts without a light or pedestrian that is in no picture.

    Args:
        facts: from `town.snapshots.facts`.
        shown: from `presence`, of the same moment.
    """
    visible = np.asarray(shown.any(axis=0))
    kept = facts.copy()
    if not (visible[RED - 1] or visible[GREEN - 1]):
        kept[_LIGHT_FACTS] = 0.0
    if not visible[PEDESTRIAN - 1]:
        kept[_PEDESTRIAN_FACTS] = 0.0
    return kept


def needs_thought(components: tuple[Component, ...], decision: Decision) -> bool:
    """Whether a moment is worth slow thinking: a hazard near, braking, or leaving the lane."""
    if decision.longitudinal in ('decelerate', 'stop') or decision.lateral != 'keep lane':
        return True
    return any(_is_hazard(component) for component in components)


def _is_hazard(component: Component) -> bool:
    if component.kind == 'lead vehicle':
        return component.distance_m < LEAD_CLOSE_M or component.behaviour != 'steady'
    return component.kind != 'green light'
