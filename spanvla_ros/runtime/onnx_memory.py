"""Inputs and outputs of an ONNX Runtime session in memory that is made once and stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_KINDS = {'tensor(float)': np.float32, 'tensor(int64)': np.int64}


class BoundSession:
    """One session with an array for each input and output, bound on the session's device.

    On a CPU the arrays are the tensors themselves. On a GPU each has a twin there: `put` brings
    over what changed, and what did not change stays.
    """

    def __init__(self, session: Any, outputs: Sequence[str], device: str) -> None:
        """Bind all inputs of `session` and the named outputs; `device` is `cpu` or `cuda`."""
        from onnxruntime import OrtValue

        self._session, self._device = session, device
        self._binding = session.io_binding()
        self._arrays: dict[str, np.ndarray] = {}
        self._values: dict[str, Any] = {}
        wanted = [v for v in session.get_outputs() if v.name in outputs]
        for value in (*session.get_inputs(), *wanted):
            array = np.zeros(value.shape, _KINDS[value.type])
            self._arrays[value.name] = array
            self._values[value.name] = OrtValue.ortvalue_from_numpy(array, device, 0)
        for value in session.get_inputs():
            self._binding.bind_ortvalue_input(value.name, self._values[value.name])
        for value in wanted:
            self._binding.bind_ortvalue_output(value.name, self._values[value.name])

    def put(self, name: str, array: np.ndarray) -> None:
        """Set the front of an input along each axis; what lies behind stays as it is."""
        host = self._arrays[name]
        host[tuple(slice(size) for size in array.shape)] = array
        if self._device != 'cpu':
            self._values[name].update_inplace(host)

    def run(self) -> None:
        """Compute the outputs from the inputs as they are."""
        self._session.run_with_iobinding(self._binding)

    def get(self, name: str) -> np.ndarray:
        """An output; on a CPU it is overwritten by the next `run`."""
        if self._device == 'cpu':
            return self._arrays[name]
        found: np.ndarray = self._values[name].numpy()
        return found
