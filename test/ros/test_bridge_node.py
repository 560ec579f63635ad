"""The stand-in's synchronous ticks over real DDS: bridge, carla, guardian and follower."""

import numpy as np
import pytest
from geometry_msgs.msg import Twist
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image

RELIABLE = QoSProfile(depth=50, reliability=ReliabilityPolicy.RELIABLE)
WAIT_S = 120.0


@pytest.mark.slow
def test_each_command_is_one_tick(bus, launch, long_road):
    """ros-bridge e9063d9, bridge.py: after each tick the bridge waits for a control of every ego
    vehicle, at most `VEHICLE_CONTROL_TIMEOUT = 1.`
    """
    clocks = bus.listen('/clock', Clock, RELIABLE)
    twists = bus.listen('/carla/hero/twist_cmd', Twist, RELIABLE)
    images = bus.listen('/carla/hero/front/image', Image, RELIABLE)
    launch('bridge', map=str(long_road), role_name='hero', route_m=200.0)
    frame = {'output_frame': 'map', 'use_sim_time': True}
    launch('carla', role_name='hero', use_sim_time=True)
    launch('guardian', **frame)
    follower = launch('follower', trigger='odometry', **frame)

    def hand_on():
        # Where launch files remap, this test carries.
        while hand_on.sent < len(commands):
            bus.publish('/carla/hero/twist_cmd', commands[hand_on.sent], RELIABLE)
            hand_on.sent += 1

    hand_on.sent = 0
    commands = bus.listen('output/twist', Twist, RELIABLE)
    line = 'spanvla/bridge: world'

    def counted(name):
        values = {entry.key: entry.value for entry in bus.lines[line].values}
        return int(values[name])

    bus.wait(
        lambda: line in bus.lines and counted('ticks') > 60 and len(commands) > 40,
        hand_on,
        WAIT_S,
    )
    assert follower.exit_status is None
    assert counted('timeouts') < counted('ticks') / 2
    stamps = [message.clock.sec + message.clock.nanosec / 1e9 for message in clocks]
    assert np.diff(stamps) == pytest.approx(0.05, abs=1e-6)
    assert images[0].encoding == 'bgra8'
    assert len(twists) == hand_on.sent
