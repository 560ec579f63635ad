"""The recorder over real DDS: everything arrives in the file, also after a kill."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rosbags.highlevel import AnyReader
from std_msgs.msg import String
from std_srvs.srv import Trigger

from spanvla_ros.ros.bag_file import BagFile, part_folder, recover
from spanvla_ros.types import SpanvlaError


def counted(path: Path) -> dict[str, int]:
    with AnyReader([path]) as reader:
        found: dict[str, int] = {}
        for connection, _, _ in reader.messages():
            found[connection.topic] = found.get(connection.topic, 0) + 1
    return found


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGKILL])
def test_what_was_sent_is_in_the_file(bus, launch, tmp_path, number):
    out = tmp_path / 'drive.mcap'
    node = launch('recorder', out=str(out), flush_s=0.1, incident_dir=str(tmp_path / 'incidents'))
    client = bus.node.create_client(Trigger, 'recorder/save_incident')
    sent = {'plan': 0}

    def send():
        bus.publish('plan', String(data=f'{sent["plan"]}'), 10)
        bus.publish('input/front/image', bus.image(), 5)
        sent['plan'] += 1

    bus.wait(client.service_is_ready, lambda: None)
    bus.wait(lambda: bus._publishers.get('plan') and sent['plan'] > 20, send)
    future = client.call_async(Trigger.Request())
    bus.wait(future.done, send)
    incident = Path(future.result().message)
    bus.wait(incident.is_file, send)
    bus.spin(0.5)
    node.process.send_signal(number)
    node.wait(8.0)
    assert (recover(out) == out) == (number == signal.SIGKILL)
    found = counted(out)
    # The first ones go before the publisher has met the recorder.
    assert found['/spanvla/plan'] > sent['plan'] - 10
    assert found['/spanvla/input/front/image'] > 10
    assert 10 < counted(incident)['/spanvla/plan'] <= found['/spanvla/plan']
    assert not part_folder(out).exists()


def test_an_existing_file_is_not_touched(tmp_path):
    path = tmp_path / 'drive.mcap'
    path.write_bytes(b'precious')
    with pytest.raises(SpanvlaError, match='exists already'):
        BagFile(path)
    assert path.read_bytes() == b'precious'


def test_there_is_nothing_to_recover(tmp_path):
    assert recover(tmp_path / 'drive.mcap') is None


def test_the_recorder_loads_no_model_code():
    code = (
        'import sys; import spanvla_ros.ros.recorder_node; '
        "bad = {'torch', 'onnxruntime', 'cv2'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, '-c', code], check=True)
