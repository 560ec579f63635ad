"""The planner on a clock that jumps, in a frame that is not `odom`."""

import pytest
from rosgraph_msgs.msg import Clock
from std_msgs.msg import String

from spanvla_ros.types import Plan


@pytest.fixture(scope='module')
def drive(bus, launch, toy_model):
    """A planner on simulated time in frame `map`, its plans, and the function that feeds it."""
    planner = launch(
        'planner',
        model_dir=str(toy_model),
        backend='onnxruntime',
        output_frame='map',
        use_sim_time=True,
    )
    plans = bus.listen('plan', String)

    def feed(frame_id='map'):
        bus.publish('/clock', Clock(clock=bus.stamp()), 1)
        bus.spin(0.01)
        for topic, message, depth in (
            ('input/odometry', bus.odometry(), 50),
            ('input/route', bus.route([(float(x), 0.0) for x in range(0, 200, 15)]), 1),
        ):
            message.header.frame_id = frame_id
            bus.publish(topic, message, depth)
        bus.publish('input/front/image', bus.image(), 5)

    bus.wait(lambda: len(plans) > 3, feed, seconds=60.0)
    yield plans, feed
    assert planner.exit_status is None


def test_plans_are_in_the_output_frame(drive):
    plan = Plan.from_json(drive[0][-1].data)
    assert plan.trajectory.frame_id == 'map'
    assert 'route_missing' not in plan.degraded


@pytest.mark.parametrize('source', ['odometry', 'route'])
def test_another_frame_is_reported(bus, drive, source):
    plans, feed = drive
    sentence = f"{source}: frame 'odom' is not output_frame 'map'"
    bus.wait(lambda: bus.shows(f'planner: input/{source}', sentence), lambda: feed('odom'))
    bus.spin(0.5)
    before = len(plans)
    bus.wait(lambda: len(plans) > before + 2, feed)
    assert Plan.from_json(plans[-1].data).trajectory.frame_id == 'map'


@pytest.mark.parametrize(
    ('shift_s', 'reason'), [(-0.3, 'clock_backwards'), (30.0, 'clock_gap'), (0.0, 'backwards')]
)
def test_after_a_jump_of_its_clock_it_starts_anew(bus, drive, shift_s, reason):
    plans, feed = drive
    bus.shift_ns = round(shift_s * 1e9)
    bus.wait(lambda: bus.shows('planner: clock', reason), feed)
    jumped_ns, before = bus.now_ns, len(plans)
    bus.wait(lambda: len(plans) > before + 2, feed)
    stamps = [Plan.from_json(message.data).trajectory.stamp_ns for message in plans[-2:]]
    assert all(abs(stamp - jumped_ns) < 5e9 for stamp in stamps)
