"""Meters that one thread fills and another reads."""

import numpy as np

from spanvla_ros.ros import diagnostics
from spanvla_ros.ros.diagnostics import InputMeter, StageMeter


class Meanwhile(int):
    """A time that another message arrives at while it is looked at."""

    meter = InputMeter('input', 1.0)

    def __rsub__(self, other):
        self.meter.arrived(Meanwhile(self))
        return int(other) - int(self)


def test_a_message_may_arrive_while_its_input_is_told():
    meter = Meanwhile.meter
    meter.arrived(Meanwhile(10))
    meter.arrived(Meanwhile(20))
    line = meter.status(30)
    assert (line.message, meter.received) == ('ok', 5)
    assert {pair.key: pair.value for pair in line.values}['received'] == '4'


def test_a_stage_may_begin_while_they_are_told(monkeypatch):
    stages, percentile = StageMeter(), np.percentile

    def slow(durations_ms, shares):
        stages.add({'late_ms': 3.0})
        return percentile(durations_ms, shares)

    monkeypatch.setattr(diagnostics.np, 'percentile', slow)
    stages.add({'early_ms': 1.0})
    assert stages.values() == {'early_ms_p50': '1.0', 'early_ms_p99': '1.0'}
