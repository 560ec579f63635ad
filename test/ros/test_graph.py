"""The doctor on a running graph, over real DDS: what it hears and what it makes of it."""

from __future__ import annotations

import threading

from nav_msgs.msg import Odometry
from nav_msgs.msg import Path as PathMessage
from rclpy.qos import QoSProfile, ReliabilityPolicy

from spanvla_ros.doctor.findings import CATALOG
from spanvla_ros.doctor.graph import check_graph
from spanvla_ros.doctor.rig import LOOKED_AT, empty_rig, gather
from spanvla_ros.doctor.streams import check_streams
from spanvla_ros.model.config import TOWN_CAMERAS
from spanvla_ros.replay.observed import Offer, SeenTopic
from spanvla_ros.ros.graph import hear

BEST_EFFORT = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)


def test_topics_offers_rates_and_clocks_of_a_running_graph(bus, monkeypatch):
    monkeypatch.setenv('ROS_DOMAIN_ID', str(bus.domain))
    done = []
    listener = threading.Thread(target=lambda: done.append(hear(1.5, LOOKED_AT)), daemon=True)
    bus.publish('/odom', bus.odometry(speed_mps=1.0))
    bus.publish('/route', bus.route([(0.0, 0.0), (20.0, 0.0)]), BEST_EFFORT)
    listener.start()

    def both() -> None:
        bus.publish('/odom', bus.odometry(speed_mps=1.0))
        bus.publish('/route', bus.route([(0.0, 0.0), (20.0, 0.0)]), BEST_EFFORT)

    bus.wait(lambda: bool(done), both, seconds=40.0)
    (heard,) = done
    topics = {topic.name: topic for topic in heard.topics}
    assert topics['/odom'] == SeenTopic('/odom', 'nav_msgs/msg/Odometry', (Offer(True, False),))
    assert topics['/route'].offers == (Offer(False, False),)
    assert {type(m.message) for m in heard.messages} == {Odometry, PathMessage}
    assert heard.sim_time == {'/spanvla/test': False}
    rig = gather(empty_rig(heard.topics, TOWN_CAMERAS, live=True), heard.messages, heard.seconds)
    found = {f.id for f in check_streams(rig, {})}
    assert {'qos_route', 'camera_missing'} <= found
    assert 'clock_far' not in found


def test_clocks_types_and_twins():
    clock = SeenTopic('/clock', 'rosgraph_msgs/msg/Clock')

    def ids(nodes=(), topics=(), sim_time=None, types=None):
        return [f.id for f in check_graph(nodes, topics, sim_time or {}, types or {})]

    ours, theirs = '/spanvla/planner', '/driver'
    assert ids((ours,), (), {ours: False}) == []
    assert ids((ours,), (), {ours: True}) == ['clock_missing']
    assert ids((ours,), (clock,), {ours: True, theirs: True}) == []
    assert ids((ours,), (clock,), {ours: False, theirs: True}) == ['sim_time_mismatch']
    assert ids((ours,), (clock,), {ours: False}) == ['sim_time_mismatch']
    assert ids((ours, '/b/planner')) == ['nodes_twice']
    assert ids(types={'/odom': ('a/msg/A', 'b/msg/B')}) == ['type_mismatch']
    assert {'clock_missing', 'sim_time_mismatch', 'nodes_twice', 'type_mismatch'} <= set(CATALOG)
