"""The replay node over real DDS: recorded bytes, restored QoS, clock, remaps, loops."""

from pathlib import Path

import numpy as np
import pytest
from foreign_messages import TYPES, empty
from nav_msgs.msg import Odometry
from nav_msgs.msg import Path as PathMessage
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rosbags.interfaces import (
    Connection,
    ConnectionExtRosbag2,
    Qos,
    QosDurability,
    QosHistory,
    QosLiveliness,
    QosReliability,
    QosTime,
)
from rosbags.rosbag2 import StoragePlugin, Writer
from rosgraph_msgs.msg import Clock

from spanvla_ros.ros.replay_node import Pace, offered_qos

LATCHED = QoSProfile(
    depth=1,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)
DEEP = QoSProfile(depth=500, reliability=ReliabilityPolicy.RELIABLE)
NEVER = QosTime(9223372036, 854775807)
BEGIN_NS = 5_000_000_000
COUNT = 20
WAIT_S = 90.0


def recorded(durability: QosDurability, reliability: QosReliability, depth: int) -> Qos:
    return Qos(
        QosHistory.KEEP_LAST, depth, reliability, durability, NEVER, NEVER,
        QosLiveliness.AUTOMATIC, NEVER, avoid_ros_namespace_conventions=False,
    )  # fmt: skip


def write_bag(folder: Path, plugin: StoragePlugin) -> Path:
    latched = recorded(QosDurability.TRANSIENT_LOCAL, QosReliability.RELIABLE, 1)
    path = empty('nav_msgs/msg/Path')
    path.header.frame_id = 'map'
    path.poses = [empty('geometry_msgs/msg/PoseStamped') for _ in range(3)]
    with Writer(folder, version=9, storage_plugin=plugin) as writer:
        kinds = {
            '/route': ('nav_msgs/msg/Path', (latched,)),
            '/odom': ('nav_msgs/msg/Odometry', ()),
            '/foreign': ('carla_msgs/msg/CarlaEgoVehicleControl', ()),
        }
        connections = {
            topic: writer.add_connection(topic, kind, typestore=TYPES, offered_qos_profiles=qos)
            for topic, (kind, qos) in kinds.items()
        }

        def write(topic, at_ns, message):
            data = TYPES.serialize_cdr(message, kinds[topic][0])
            writer.write(connections[topic], at_ns, data)

        write('/route', BEGIN_NS, path)
        write('/foreign', BEGIN_NS, empty('carla_msgs/msg/CarlaEgoVehicleControl'))
        for k in range(COUNT):
            odometry = empty('nav_msgs/msg/Odometry')
            odometry.pose.covariance = odometry.twist.covariance = np.arange(36.0)
            odometry.pose.pose.position.x = float(k)
            write('/odom', BEGIN_NS + k * 50_000_000, odometry)
    return folder


@pytest.fixture(scope='module')
def clocks(bus):
    return bus.listen('/clock', Clock, DEEP)


@pytest.mark.parametrize('plugin', [StoragePlugin.MCAP, StoragePlugin.SQLITE3])
def test_a_bag_plays_on_a_live_graph(bus, launch, clocks, tmp_path, plugin):
    bag = write_bag(tmp_path / 'bag', plugin)
    odometries = bus.listen(f'moved_{plugin.name}', Odometry, DEEP)
    clocks.clear()
    replay = launch(
        'replay',
        bag=str(bag),
        rate=0.5,
        wait_s=3.0,
        at_end='stay',
        remaps=[f'/odom:=/spanvla/moved_{plugin.name}', f'/route:=/spanvla/late_{plugin.name}'],
    )
    bus.wait(lambda: len(odometries) == COUNT, lambda: None, WAIT_S)
    assert [message.pose.pose.position.x for message in odometries] == list(range(COUNT))
    assert odometries[3].twist.covariance.tolist() == list(range(36))
    times = [message.clock.sec * 10**9 + message.clock.nanosec for message in clocks]
    assert times == sorted(times)
    assert times[0] >= BEGIN_NS
    assert times[-1] <= BEGIN_NS + (COUNT - 1) * 50_000_000
    # More ticks than messages: the clock runs between them.
    assert len(set(times)) > COUNT
    # Whoever comes after the end still gets what was latched when it was recorded.
    late = bus.listen(f'late_{plugin.name}', PathMessage, LATCHED)
    bus.wait(lambda: late, lambda: None, WAIT_S)
    assert late[0].header.frame_id == 'map'
    assert len(late[0].poses) == 3
    line = 'spanvla/replay: bag'
    bus.wait(lambda: line in bus.lines and bus.lines[line].message == 'finished', lambda: None)
    values = {entry.key: entry.value for entry in bus.lines[line].values}
    assert values['sent'] == str(COUNT + 1)
    assert values['left_out'] == '/foreign (carla_msgs/msg/CarlaEgoVehicleControl)'
    replay.interrupt()
    replay.wait(20.0)
    assert replay.exit_status == 0


def test_it_loops_and_skips_to_a_place(bus, launch, tmp_path):
    bag = write_bag(tmp_path / 'bag', StoragePlugin.MCAP)
    odometries = bus.listen('looped', Odometry, DEEP)
    routes = bus.listen('looped_route', PathMessage, LATCHED)
    remaps = ['/odom:=/spanvla/looped', '/route:=/spanvla/looped_route']
    replay = launch('replay', bag=str(bag), loop=True, start_s=0.5, rate=5.0, remaps=remaps)
    bus.wait(lambda: len(odometries) > 25, lambda: None, WAIT_S)
    places = [message.pose.pose.position.x for message in odometries]
    assert min(places) == 10.0
    assert places[places.index(19.0) + 1] == 10.0
    # Latched before the place where the replay begins, and yet there.
    assert routes
    replay.interrupt()
    replay.wait(20.0)


def test_it_ends_by_itself_and_names_what_it_cannot_read(launch, tmp_path):
    bag = write_bag(tmp_path / 'bag', StoragePlugin.MCAP)
    process = launch('replay', bag=str(bag), rate=100.0, wait_s=0.0)
    process.wait(WAIT_S)
    assert process.exit_status == 0
    for words, said in (
        ({}, 'give the parameter bag'),
        ({'bag': str(tmp_path / 'nowhere')}, 'no such bag'),
        ({'bag': str(bag), 'remaps': ['/odom']}, 'recorded:=published'),
        ({'bag': str(bag), 'topics': ['/nothing']}, 'no topic /nothing'),
    ):
        process = launch('replay', **words)
        process.wait(WAIT_S)
        assert process.exit_status == 2
        assert said in process.last_line()


def connection(topic: str, count: int, *qos: Qos) -> Connection:
    return Connection(
        1,
        topic,
        'nav_msgs/msg/Path',
        None,
        '',
        count,
        ConnectionExtRosbag2('cdr', list(qos)),
        None,
    )


@pytest.mark.parametrize(
    ('found', 'stays', 'reliable'),
    [
        (connection('/a', 9, recorded(QosDurability.TRANSIENT_LOCAL, QosReliability.RELIABLE, 1)),
         True, True),
        (connection('/a', 9, recorded(QosDurability.VOLATILE, QosReliability.BEST_EFFORT, 5)),
         False, False),
        # Two publishers of one topic: the stronger offer serves all subscribers.
        (connection('/a', 9, recorded(QosDurability.VOLATILE, QosReliability.BEST_EFFORT, 5),
                    recorded(QosDurability.VOLATILE, QosReliability.RELIABLE, 5)), False, True),
        (connection('/tf_static', 4), True, True),
        (connection('/route', 1), True, True),
        (connection('/odom', 500), False, True),
        (connection('/map', 500), True, True),
    ],
)  # fmt: skip
def test_the_qos_is_the_recorded_one_or_a_guess(found, stays, reliable):
    profile = offered_qos(found, frozenset({'/map'}))
    assert (profile.durability == DurabilityPolicy.TRANSIENT_LOCAL) == stays
    assert (profile.reliability == ReliabilityPolicy.RELIABLE) == reliable


def test_a_pace_is_linear_and_pauses_move_it():
    pace = Pace(1_000_000_000, 2.0, 100.0)
    assert pace.due_s(5_000_000_000) == 102.0
    assert pace.moment_ns(101.0) == 3_000_000_000
    pace.postpone(10.0)
    assert pace.due_s(5_000_000_000) == 112.0
