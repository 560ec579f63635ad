"""The scoring row of a sample: the scene its plans are scored in, as bytes in a shard.

Zlib'd JSON in the layout that `spanvla score` reads, so a row can be taken out and scored by
hand. Meters and radians are kept to a tenth of a millimeter: that halves the bytes.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

from spanvla_ros.scoring.scene import scene_from_json, scene_to_json
from spanvla_ros.types import Scene, SpanvlaError

DECIMALS = 4
MAX_BYTES = 64 * 2**20
_LEVEL = 6


def pack_scene(scene: Scene) -> bytes:
    """A scene as it stands in a shard."""
    text = json.dumps(_rounded(scene_to_json(scene)), separators=(',', ':'), allow_nan=False)
    return zlib.compress(text.encode(), _LEVEL)


def unpack_scene(data: bytes) -> Scene:
    """The scene of a scoring row.

    Raises:
        SpanvlaError: the bytes are damaged, too many, or no scene.
    """
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(data, MAX_BYTES)
        if unpacker.unconsumed_tail or not unpacker.eof:
            raise SpanvlaError(f'scoring row: is cut off or over {MAX_BYTES} bytes')
        return scene_from_json(json.loads(text))
    except (zlib.error, ValueError, RecursionError) as error:
        raise SpanvlaError(f'scoring row: is damaged ({error})') from error


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DECIMALS)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
