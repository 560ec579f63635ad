"""Boxes as the faces a camera sees of them, in an order in which they may be painted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int64

from spanvla_ros.town.elements import Box
from spanvla_ros.town.polygons import Polygons

FACES = ('rear', 'right', 'front', 'left', 'top', 'bottom')
# Left and right faces are equally bright, else a mirrored world would look different.
SHADE = np.array([1.0, 0.8, 0.9, 0.8, 1.1, 0.55])
_TOUCH_M = 1e-6
# Corners rear-left, rear-right, front-right, front-left, as signs of the half length and width.
_SIGNS = np.array([[-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [1.0, 1.0]])
# For each face, its four corners: an index into `_SIGNS` and 0 for the base, 1 for the top.
_FACE_CORNER = np.array(
    [[0, 1, 1, 0], [1, 2, 2, 1], [2, 3, 3, 2], [3, 0, 0, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
)
_FACE_LEVEL = np.array([[0, 0, 1, 1]] * 4 + [[1, 1, 1, 1], [0, 0, 0, 0]])


class Solids:
    """The boxes of one moment, ready to be seen from any point."""

    def __init__(self, boxes: Sequence[Box]) -> None:
        """Gather the boxes and their patches into arrays."""
        shape = [
            (b.x_m, b.y_m, b.yaw_rad, b.length_m, b.width_m, b.base_m, b.base_m + b.height_m)
            for b in boxes
        ]
        table = np.array(shape, dtype=np.float64).reshape(-1, 7)
        self._center = table[:, :2]
        self._cos, self._sin = np.cos(table[:, 2]), np.sin(table[:, 2])
        self._half = 0.5 * table[:, 3:5]
        self._level = table[:, 5:7]
        self._colors = np.array([b.color for b in boxes], dtype=np.float64).reshape(-1, 3)
        self._ids = np.array([b.class_id for b in boxes], dtype=np.int64)
        self._corners = self._world(self._half[:, None] * _SIGNS)
        self._gather_patches(boxes)

    def faces_towards(self, eye: Float64[np.ndarray, '3']) -> Polygons:
        """Faces and patches turned to `eye`, hidden ones before those that hide them."""
        visible = self._visible(eye)
        rank = np.empty(len(self._ids), dtype=np.int64)
        rank[self._order(eye, visible)] = np.arange(len(rank))
        box, face = np.nonzero(visible)
        patch = np.flatnonzero(visible[self._patch_box, self._patch_face])
        owner = self._patch_box[patch]
        order = np.argsort(np.concatenate([2 * rank[box], 2 * rank[owner] + 1]), kind='stable')
        corners = np.concatenate([self._face_corners(box, face), self._patch_corners[patch]])
        colors = [self._colors[box] * SHADE[face][:, None], self._patch_colors[patch]]
        count = len(order)
        return Polygons(
            corners[order].reshape(-1, 3),
            4 * np.arange(count),
            np.concatenate(colors)[order],
            np.concatenate([self._ids[box], self._patch_ids[patch]])[order],
            np.ones(count, dtype=bool),
            np.concatenate([np.zeros(len(box), dtype=bool), self._patch_lit[patch]])[order],
        )

    def _gather_patches(self, boxes: Sequence[Box]) -> None:
        rows = [
            (i, FACES.index(p.face), p.left_m, p.right_m, p.bottom_m, p.top_m, p.class_id, p.lit)
            for i, box in enumerate(boxes)
            for p in box.patches
        ]
        table = np.array(rows, dtype=np.float64).reshape(-1, 8)
        owner, face = table[:, 0].astype(np.int64), table[:, 1].astype(np.int64)
        colors = [p.color for box in boxes for p in box.patches]
        half = self._half[owner]
        # Rear and front patches run across the box, left and right ones along it.
        across = (face == FACES.index('rear')) | (face == FACES.index('front'))
        sign = np.where((face == FACES.index('rear')) | (face == FACES.index('right')), -1.0, 1.0)
        ends = table[:, 2:4]
        local = np.empty((len(table), 2, 2))
        local[..., 0] = np.where(across[:, None], (sign * half[:, 0])[:, None], ends)
        local[..., 1] = np.where(across[:, None], ends, (sign * half[:, 1])[:, None])
        world = self._world(local, owner)
        self._patch_box, self._patch_face = owner, face
        self._patch_corners = np.concatenate(
            [world[:, [0, 1, 1, 0]], table[:, [4, 4, 5, 5], None]], axis=2
        )
        self._patch_colors = np.array(colors, dtype=np.float64).reshape(-1, 3)
        self._patch_ids = table[:, 6].astype(np.int64)
        self._patch_lit = table[:, 7] > 0.5

    def _world(
        self, local: Float64[np.ndarray, 'n k 2'], owner: Int64[np.ndarray, ' n'] | None = None
    ) -> Float64[np.ndarray, 'n k 2']:
        index = slice(None) if owner is None else owner
        cos, sin = self._cos[index, None], self._sin[index, None]
        corners: np.ndarray = self._center[index, None] + np.stack(
            [cos * local[..., 0] - sin * local[..., 1], sin * local[..., 0] + cos * local[..., 1]],
            axis=-1,
        )
        return corners

    def _face_corners(self, box: np.ndarray, face: np.ndarray) -> np.ndarray:
        ground = self._corners[box[:, None], _FACE_CORNER[face]]
        level = self._level[box[:, None], _FACE_LEVEL[face]]
        return np.concatenate([ground, level[..., None]], axis=2)

    def _visible(self, eye: Float64[np.ndarray, '3']) -> Bool[np.ndarray, 'n 6']:
        dx, dy = (eye[:2] - self._center).T
        along, left = self._cos * dx + self._sin * dy, self._cos * dy - self._sin * dx
        length, width = self._half.T
        return np.stack(
            [
                along < -length,
                left < -width,
                along > length,
                left > width,
                eye[2] > self._level[:, 1],
                eye[2] < self._level[:, 0],
            ],
            axis=1,
        )

    def _order(
        self, eye: Float64[np.ndarray, '3'], visible: Bool[np.ndarray, 'n 6']
    ) -> Int64[np.ndarray, ' n']:
        """Farthest first, mended where a box would be painted over one that hides it."""
        middle = np.column_stack([self._center, self._level.mean(axis=1)])
        order = np.argsort(-((middle - eye) ** 2).sum(axis=1), kind='stable')
        before = self._hidden_by(eye, visible)[np.ix_(order, order)]
        if not np.tril(before).any():
            return order
        waiting = before.sum(axis=0)
        left = np.ones(len(order), dtype=bool)
        picked = []
        for _ in range(len(order)):
            free = np.flatnonzero(left & (waiting == 0))
            # A ring of boxes hiding one another has no right order; then the farthest goes first.
            pick = int(free[0]) if len(free) else int(np.flatnonzero(left)[0])
            left[pick] = False
            waiting = waiting - before[pick]
            picked.append(pick)
        return order[picked]

    def _hidden_by(
        self, eye: Float64[np.ndarray, '3'], visible: Bool[np.ndarray, 'n 6']
    ) -> Bool[np.ndarray, 'n n']:
        """True at [i, j] where box j may hide box i, so that i must be painted first.

        A face plane of one box with the other wholly beyond it settles the pair: the box on the
        far side of the plane as seen from the eye cannot hide the other.
        """
        beyond = self._beyond()
        cannot_hide = (
            (beyond & visible.T[:, :, None]) | (beyond.transpose(0, 2, 1) & ~visible.T[:, None])
        ).any(axis=0)
        may_hide = ~cannot_hide & self._same_direction(eye)
        may_hide &= ~np.eye(len(may_hide), dtype=bool)
        # Boxes that run into each other hide each other in part: no order can be right.
        return np.asarray(may_hide.T & ~may_hide)

    def _beyond(self) -> Bool[np.ndarray, '6 n n']:
        """True at [f, i, j] where box j lies wholly on the outer side of face f of box i."""
        dx, dy = (self._center[None] - self._center[:, None]).transpose(2, 0, 1)
        cos, sin = self._cos[:, None], self._sin[:, None]
        along, left = cos * dx + sin * dy, cos * dy - sin * dx
        # How far box j reaches from its center along the axes of box i.
        turn_cos = np.abs(cos * self._cos + sin * self._sin)
        turn_sin = np.abs(cos * self._sin - sin * self._cos)
        length, width = self._half.T
        gap_along = np.abs(along) - (turn_cos * length + turn_sin * width) - length[:, None]
        gap_left = np.abs(left) - (turn_sin * length + turn_cos * width) - width[:, None]
        apart_along, apart_left = gap_along >= -_TOUCH_M, gap_left >= -_TOUCH_M
        base, top = self._level.T
        return np.stack(
            [
                apart_along & (along < 0.0),
                apart_left & (left < 0.0),
                apart_along & (along > 0.0),
                apart_left & (left > 0.0),
                base[None] >= top[:, None] - _TOUCH_M,
                top[None] <= base[:, None] + _TOUCH_M,
            ]
        )

    def _same_direction(self, eye: Float64[np.ndarray, '3']) -> Bool[np.ndarray, 'n n']:
        """True where two boxes overlap in direction from the eye, so that one can hide one."""
        to_center = self._center - eye[:2]
        azimuth = np.arctan2(to_center[:, 1], to_center[:, 0])
        to_corner = self._corners - eye[:2]
        x = to_center[:, None, 0] * to_corner[..., 0] + to_center[:, None, 1] * to_corner[..., 1]
        y = to_center[:, None, 0] * to_corner[..., 1] - to_center[:, None, 1] * to_corner[..., 0]
        spread = np.abs(np.arctan2(y, x)).max(axis=1)
        apart = np.abs((azimuth[:, None] - azimuth + np.pi) % (2 * np.pi) - np.pi)
        return np.asarray(apart < spread[:, None] + spread)
