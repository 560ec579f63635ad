"""Two loops on one device: neither waits for the other, and one that hangs is one sentence.

The loops themselves run here on the CPU. For what only a GPU has, streams and pinned memory, a
stand-in writes down who asked for what and when; no stream ran.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

from spanvla_ros.runtime import torch_drive  # noqa: E402
from spanvla_ros.runtime.torch_drive import (  # noqa: E402
    Drive,
    HungError,
    Lane,
    drive_beside,
    lane,
)
from spanvla_ros.types import SpanvlaError  # noqa: E402

CPU, CUDA = torch.device('cpu'), torch.device('cuda')
COUNT = 3
WAYPOINTS = 4


def frame_on(device):
    config = SimpleNamespace(waypoints=WAYPOINTS)
    images = torch.zeros((1, 2, 2, 3), dtype=torch.uint8)
    return SimpleNamespace(device=device, images=images, policy=SimpleNamespace(config=config))


def drive_of(replay=lambda: None, state=0.5, device=CPU):
    outputs = (torch.full((1, 1, WAYPOINTS, 3), state),)
    return Drive(frame_on(device), (outputs, replay))


def test_both_loops_run_and_are_counted():
    seen, thought = [], threading.Event()
    frames = drive_of(lambda: (thought.wait(10), seen.append(1)))
    timing, thoughts_per_s = drive_beside(frames, COUNT, thought.set, lane(CPU), lane(CPU))
    assert frames.done == len(seen) == COUNT + torch_drive.WARM
    assert timing.max_ms >= timing.p50_ms > 0
    assert thoughts_per_s > 0


@pytest.mark.parametrize(('hangs', 'says'), [('token', 'no token'), ('frame', 'no frame')])
def test_a_loop_that_hangs_is_one_sentence(hangs, says):
    never = threading.Event()
    stuck = {'token': (lambda: None, never.wait), 'frame': (never.wait, lambda: None)}[hangs]
    replay, think = stuck
    slowly = threading.Event()
    # The other loop goes on meanwhile.
    frames = drive_of(replay if hangs == 'frame' else lambda: slowly.wait(0.01))
    with pytest.raises(HungError, match=f'{says} for 0.3 s after .* frames and .* tokens'):
        drive_beside(frames, 10_000, think, lane(CPU), lane(CPU), limit_s=0.3)
    never.set()


def test_what_fails_in_a_loop_is_raised_where_it_was_started():
    def fails():
        raise RuntimeError('CUDA error: out of memory')

    with pytest.raises(RuntimeError, match='out of memory'):
        drive_beside(drive_of(), COUNT, fails, lane(CPU), lane(CPU))
    with pytest.raises(SpanvlaError, match='not finite'):
        drive_beside(drive_of(state=float('nan')), COUNT, lambda: None, lane(CPU), lane(CPU))


class Device:
    """What was asked of a GPU, by whom; nothing runs."""

    def __init__(self, monkeypatch):
        self.log, device = [], self
        self.lock = threading.Lock()

        class Stream:
            def __init__(self, priority=0):
                self.name = f'priority {priority}'
                device.note('stream', self.name)

            def wait_stream(self, _other):
                device.note('wait_stream', self.name)

            def synchronize(self):
                device.note('wait', self.name)

        class Taken:
            def __init__(self, stream):
                self.stream = stream

            def __enter__(self):
                device.note('take', self.stream.name)

            def __exit__(self, *_):
                device.note('leave', self.stream.name)

        class Graph(Taken):
            def __init__(self, _graph, stream=None, capture_error_mode='global'):
                super().__init__(stream)
                device.note('record', stream.name)
                assert capture_error_mode == 'thread_local'

        class CUDAGraph:
            def replay(self):
                device.note('replay', '')

        for name, stand_in in (
            ('Stream', Stream), ('stream', Taken), ('graph', Graph), ('CUDAGraph', CUDAGraph),
            ('current_stream', lambda: SimpleNamespace(wait_stream=lambda _: None)),
            ('synchronize', lambda: device.note('wait for all', '')),
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, stand_in)

        def pinned(tensor):
            device.note('pin', '')
            return tensor

        monkeypatch.setattr(torch.Tensor, 'pin_memory', pinned)

    def note(self, what, stream):
        with self.lock:
            self.log.append((what, stream, threading.current_thread().name))


def test_what_stops_a_whole_device_is_done_before_the_loops_start(monkeypatch):
    device = Device(monkeypatch)
    state = torch.zeros(1, 1, WAYPOINTS, 3)
    fast, slow = lane(CUDA, priority=-1), lane(CUDA)
    run = fast.record(lambda: (state,))
    think = slow.record(lambda: (state,))[1]
    frames = Drive(frame_on(CUDA), run)
    before = len(device.log)
    drive_beside(frames, COUNT, think, fast, slow)
    made = [entry[:2] for entry in device.log[:before]]
    # Each graph on the lane it is replayed on, and the lanes are two.
    assert [stream for what, stream in made if what == 'record'] == ['priority -1', 'priority 0']
    assert made.count(('pin', '')) == torch_drive.PICTURE_SETS + 1
    beside = device.log[before:]
    assert {what for what, *_ in beside} == {'take', 'replay', 'wait', 'leave'}
    # A thread takes and waits for its own lane alone.
    lanes = {(thread, stream) for what, stream, thread in beside if what != 'replay'}
    assert lanes == {('frame', 'priority -1'), ('token', 'priority 0')}
    waited = sum(entry[0] == 'wait' and entry[2] == 'frame' for entry in beside)
    assert waited == COUNT + torch_drive.WARM


def test_a_lane_on_the_cpu_records_nothing():
    outputs, replay = Lane(None).record(lambda: (torch.ones(2),))
    outputs[0].zero_()
    replay()
    assert outputs[0].tolist() == [1.0, 1.0]
