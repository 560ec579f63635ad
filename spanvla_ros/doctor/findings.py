"""What the doctor can find: one line a finding, with what it means and the line that mends it."""

from __future__ import annotations

from dataclasses import dataclass

INFO, WARN, BLOCK = 'info', 'warn', 'block'
SEVERITIES = (BLOCK, WARN, INFO)


@dataclass(frozen=True)
class Finding:
    """One thing to know: `what` was seen and where, `fix` is the one line that mends it."""

    id: str
    severity: str
    what: str
    fix: str


@dataclass(frozen=True)
class Advice:
    """An entry of the catalog: the severity, what it means, the fix with `{names}` to fill in."""

    severity: str
    meaning: str
    fix: str


def found(finding_id: str, what: str, *, severity: str = '', **names: object) -> Finding:
    """A finding of the catalog; `names` fill in its fix, `severity` replaces its own."""
    advice = CATALOG[finding_id]
    return Finding(finding_id, severity or advice.severity, what, advice.fix.format(**names))


def sorted_findings(findings: list[Finding]) -> list[Finding]:
    """The worst first, else in the order given, none twice."""
    once = list(dict.fromkeys(findings))
    return sorted(once, key=lambda finding: SEVERITIES.index(finding.severity))


MACHINE = {
    'python_version': Advice(
        BLOCK,
        'this Python is older or newer than the package supports',
        'use Python 3.10 to 3.13; beside ROS from apt, the Python of that ROS',
    ),
    'package_missing': Advice(
        BLOCK, 'a library every command needs is not installed', 'pip install {pip}{apt}'
    ),
    'package_optional': Advice(
        INFO, 'a library of one use only is not installed', 'pip install {pip}{apt}'
    ),
    'no_backend': Advice(
        BLOCK,
        'nothing that could run a model: no ONNX Runtime, no torch, no TensorRT',
        "pip install onnxruntime (on a Jetson: NVIDIA's own wheel)",
    ),
    'ros_missing': Advice(
        WARN,
        'no rclpy or a message package is missing: replay and training run, the nodes do not',
        "sudo apt install {apt}, or without apt: pip install 'spanvla_ros[ros]'",
    ),
    'ros_python': Advice(
        BLOCK,
        'a ROS environment is sourced, but its rclpy does not load in this Python',
        'start with the Python of that ROS ({wanted}), or open a shell that has not sourced it',
    ),
    'cv_bridge_numpy': Advice(
        WARN,
        'cv_bridge is installed and its compiled part does not load, mostly because of numpy 2',
        "pip install 'numpy<2', or leave planner.use_cv_bridge at false",
    ),
    'model_broken': Advice(
        BLOCK,
        'the model directory is missing or differs from its manifest',
        'copy the model directory again, or name another one with --model DIR',
    ),
    'model_no_graphs': Advice(
        WARN,
        'the model directory holds no ONNX graphs, so only the torch backend can run it',
        'spanvla export --model {model} --target onnxruntime',
    ),
    'no_gpu': Advice(
        INFO,
        'no NVIDIA GPU is visible: the model runs on the CPU',
        'nothing to do for the town model; for a large one see docs/engines.md',
    ),
    'gpu_unused': Advice(
        INFO,
        'a GPU is visible, but neither TensorRT nor ONNX Runtime would use it',
        "pip install 'spanvla_ros[gpu]' (on a Jetson they come with JetPack)",
    ),
    'threads': Advice(
        INFO,
        'numeric libraries may start a thread a core; the launch files and drive set one',
        'export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1',
    ),
    'few_cores': Advice(
        WARN,
        'one core only: planner, guardian and follower need two to keep their rates',
        'give the container or machine at least two cores (docker run --cpus=2)',
    ),
    'disk_low': Advice(
        WARN, 'a recording would soon fill the disk', 'free space, or record to another disk'
    ),
    'rmw_missing': Advice(
        BLOCK,
        'RMW_IMPLEMENTATION names a middleware that is not installed',
        'unset RMW_IMPLEMENTATION, or sudo apt install ros-$ROS_DISTRO-{rmw}',
    ),
    'rmw_other': Advice(
        INFO,
        'another middleware than Fast DDS: ours was not run on it, the Fast DDS profile is unused',
        'unset RMW_IMPLEMENTATION, or enlarge the buffers of {rmw} by its own configuration',
    ),
    'dds_profile_unset': Advice(
        INFO,
        'no Fast DDS profile: most raw pictures above 0.4 MB would be lost (launch files set one)',
        'export FASTDDS_DEFAULT_PROFILES_FILE={profile}',
    ),
    'dds_profile_missing': Advice(
        BLOCK,
        'the Fast DDS profile named in the environment is not there or no XML',
        'export FASTDDS_DEFAULT_PROFILES_FILE={profile}',
    ),
    'shm_small': Advice(
        WARN,
        '/dev/shm is smaller than one shared-memory segment of the Fast DDS profile',
        'docker run --shm-size=1g (or --ipc=host); on a host: mount -o remount,size=1g /dev/shm',
    ),
    'domain_invalid': Advice(
        BLOCK, 'ROS_DOMAIN_ID is no number from 0 to 232', 'export ROS_DOMAIN_ID=0'
    ),
    'domain_high': Advice(
        INFO,
        'ports of a domain above 101 may meet those the kernel hands out by itself',
        'export ROS_DOMAIN_ID=N with N from 0 to 101',
    ),
    'discovery_off': Advice(
        WARN,
        'discovery is off: no node of this machine finds another',
        'export ROS_AUTOMATIC_DISCOVERY_RANGE=LOCALHOST (one machine) or SUBNET (several)',
    ),
    'discovery_local': Advice(
        INFO,
        'discovery is limited to this machine: nodes of other machines are not seen',
        'export ROS_AUTOMATIC_DISCOVERY_RANGE=SUBNET and unset ROS_LOCALHOST_ONLY',
    ),
    'discovery_server': Advice(
        INFO,
        'a discovery server or static peers are set: nodes are found through those only',
        'unset ROS_DISCOVERY_SERVER ROS_STATIC_PEERS where they are not meant',
    ),
    'power_mode': Advice(
        WARN,
        'the Jetson is not in its fastest power mode',
        'sudo nvpmodel -p --verbose, then sudo nvpmodel -m ID with that of MAXN, '
        'then sudo jetson_clocks',
    ),
    'power_unknown': Advice(
        INFO,
        'this is a Jetson, but its power mode could not be read',
        'sudo nvpmodel -q',
    ),
    'cpu_governor': Advice(
        INFO,
        'the CPU is held at a low clock by its governor',
        'sudo cpupower frequency-set -g performance',
    ),
}  # fmt: skip

RIG = {
    'camera_missing': Advice(
        BLOCK,
        'no camera topic: a planner needs pictures',
        'record or start the camera of the model that comes first, raw or compressed',
    ),
    'odometry_missing': Advice(
        BLOCK, 'no odometry topic', 'record or start one: nav_msgs/Odometry at 20 Hz or more'
    ),
    'odometry_several': Advice(
        INFO, 'more than one odometry topic', 'name the one meant: odometry:={topic}'
    ),
    'route_missing': Advice(
        INFO,
        'no route topic: plans are DEGRADED and the path check is off',
        'publish nav_msgs/Path, latched: route:=TOPIC',
    ),
    'topic_silent': Advice(
        WARN, 'a topic is announced, but nothing comes', 'see whether its driver runs, and its QoS'
    ),
    'message_refused': Advice(
        BLOCK, 'messages contradict themselves and are refused', 'mend the publisher as it says'
    ),
    'stamps_zero': Advice(
        BLOCK, 'stamps are zero', 'let the driver stamp with the time of exposure or measurement'
    ),
    'stamps_order': Advice(
        WARN,
        'stamps run backwards; older messages are dropped',
        'use one publisher and one clock a topic; stamp at the source, not in two threads',
    ),
    'stamps_repeat': Advice(
        WARN, 'stamps repeat', 'stamp each message anew, publish each measurement once'
    ),
    'rate_low': Advice(
        WARN, 'messages come rarely', 'raise the rate of the driver to {hz} Hz or more'
    ),
    'messages_lost': Advice(
        WARN,
        'messages are missing between the others',
        'larger shared memory (config/fastdds_shm.xml), compressed pictures, or a lower rate',
    ),
    'clock_skew': Advice(
        WARN,
        'the clock of a camera and that of the odometry disagree',
        'synchronize the machines (chrony or PTP), or stamp in the driver with the ROS clock',
    ),
    'clock_far': Advice(
        WARN,
        'stamps lie far from the clock of this machine',
        'synchronize the machines (chrony or PTP); for a bag: ros2 bag play --clock '
        'and use_sim_time:=true',
    ),
    'sim_time': Advice(
        INFO,
        'the bag was recorded with simulated time',
        'ros2 bag play --clock, and use_sim_time:=true for all nodes',
    ),
    'qos_route': Advice(
        BLOCK,
        'the route is offered best effort: the nodes, which ask for reliable, never get it',
        'publish the route reliable and transient local',
    ),
    'route_not_latched': Advice(
        WARN,
        'the route comes once and is not latched: a node that starts later never gets it',
        'publish the route transient local, or repeat it each second',
    ),
    'qos_mismatch': Advice(
        BLOCK,
        'a subscription asks for more than any publisher offers, so nothing arrives',
        'change the QoS of the publisher, or qos_overrides of the subscriber',
    ),
    'picture_size_shm': Advice(
        WARN,
        'raw pictures are larger than what shared memory carries: most are lost without a word',
        'export FASTDDS_DEFAULT_PROFILES_FILE={profile} for the nodes and the camera drivers',
    ),
    'output_frame': Advice(
        INFO, 'the odometry is in another frame than the default odom', 'output_frame:={frame}'
    ),
    'child_frame': Advice(
        INFO,
        'the odometry is not named as that of base_link',
        'see that its origin is the rear axle on the ground; CARLA uses the middle of the vehicle',
    ),
    'route_frame': Advice(
        WARN,
        'route and odometry are in different frames (info where a static transform joins them)',
        'publish the route in {frame}',
    ),
    'camera_info_missing': Advice(
        INFO,
        "a camera has no camera_info: the field of view of the model's camera is assumed",
        'publish camera_info beside the image topic',
    ),
    'camera_unnamed': Advice(
        INFO,
        'an image topic that no camera of the model is named like is not used',
        "planner.camera_topics: ['{name}={topic}'], or spanvla replay --camera {name}={topic}",
    ),
    'camera_size': Advice(
        BLOCK,
        'pictures have another size than their camera_info says, and are refused',
        'calibrate at the size that is published, or scale camera_info with image_proc',
    ),
    'camera_scale': Advice(
        BLOCK,
        'the ground moves too fast or too slowly: wrong focal length in camera_info, '
        'or wrong height of the mount',
        'calibrate the camera again, and measure its height above the ground',
    ),
    'camera_mirrored': Advice(
        BLOCK, 'the picture is mirrored', 'turn off mirroring (hflip) in the camera driver'
    ),
    'camera_upside_down': Advice(
        BLOCK, 'the picture is upside down', 'rotate by 180 degrees in the camera driver'
    ),
    'camera_mount': Advice(
        BLOCK,
        'the picture fits another mount than the one given',
        'correct the transform of the camera, or its line in planner.camera_topics',
    ),
    'cameras_swapped': Advice(
        BLOCK,
        'two cameras are swapped',
        'exchange {a} and {b} in the launch arguments (or their plugs)',
    ),
    'picture_black': Advice(
        BLOCK, 'all pictures are black', 'take off the cap, see exposure and encoding'
    ),
    'picture_frozen': Advice(
        BLOCK, 'the picture stands still while the car moves', 'restart the camera driver'
    ),
    'frame_left_handed': Advice(
        BLOCK,
        'the odometry frame is left-handed (y to the right, yaw clockwise), as in Unreal',
        'negate y, yaw and yaw rate: REP-103 has y to the left, yaw counter-clockwise',
    ),
    'frame_ned': Advice(
        BLOCK,
        'the odometry is north, east, down',
        'convert to REP-103: x = east, y = north, yaw = pi/2 - yaw, yaw rate negated',
    ),
    'frame_z_down': Advice(
        BLOCK,
        'the body frame points down (forward, right, down)',
        'rotate the body frame by 180 degrees about x: forward, left, up',
    ),
    'route_mirrored': Advice(
        BLOCK,
        'the route is a mirror image of the driven path, while the cameras confirm the odometry',
        'negate y of the route (or swap x and y where it is north, east)',
    ),
    'route_far': Advice(
        WARN, 'the driven path is far from the route', 'publish route and odometry in one frame'
    ),
    'no_motion': Advice(
        INFO,
        'the vehicle hardly moved: odometry and cameras could not be checked',
        'record ten seconds with a bend, faster than 2 m/s',
    ),
    'odometry_jumps': Advice(
        WARN,
        'the position leaps; a leap drops the plan in use',
        'use a continuous odometry (odom frame) and not one that a map corrects',
    ),
    'odometry_degrees': Advice(
        BLOCK, 'yaw or yaw rate is in degrees', 'convert to radians before the quaternion is made'
    ),
    'yaw_sign': Advice(BLOCK, 'the yaw turns against the path', 'negate the yaw'),
    'yaw_rate_sign': Advice(
        BLOCK, 'the yaw rate turns against the path', 'negate twist.angular.z'
    ),
    'yaw_offset': Advice(
        BLOCK,
        'yaw and path differ by a constant angle, such as a yaw counted from north',
        'yaw is counted from the x axis, counter-clockwise: add the angle',
    ),
    'yaw_unrelated': Advice(
        BLOCK, 'yaw and path do not turn together', 'see how the quaternion is made'
    ),
    'twist_frame': Advice(
        BLOCK,
        'the twist is in the odometry frame; REP-105 has it in the body frame',
        'rotate the twist by the inverse of the pose before publishing',
    ),
    'twist_disagrees': Advice(
        BLOCK,
        'twist and poses disagree',
        'publish the twist in m/s and rad/s, forward positive, of the same motion as the poses',
    ),
}  # fmt: skip

GRAPH = {
    'graph_empty': Advice(
        INFO,
        'no other node is seen on this domain, so no running graph was checked',
        'start the drivers and nodes, with the same ROS_DOMAIN_ID, or give --bag',
    ),
    'type_mismatch': Advice(
        BLOCK,
        'a topic is announced with two types',
        'rename one of them; ros2 topic info -v TOPIC tells who announces which',
    ),
    'clock_missing': Advice(
        BLOCK,
        'nodes use simulated time, but nobody publishes /clock: their time stands at zero',
        'use_sim_time:=false, or ros2 bag play --clock',
    ),
    'sim_time_mismatch': Advice(
        BLOCK,
        'some nodes live by /clock, others by the wall clock',
        'one value of use_sim_time for all: use_sim_time:=true with a simulator or a bag',
    ),
    'nodes_twice': Advice(
        WARN,
        'two of our nodes of one kind are in this domain',
        'stop one, or give each drive its own ROS_DOMAIN_ID',
    ),
}  # fmt: skip

CATALOG: dict[str, Advice] = {**MACHINE, **RIG, **GRAPH}
