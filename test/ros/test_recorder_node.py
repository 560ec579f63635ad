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
from spanvla_ros.ros.recorder_node import Recent
from spanvla_ros.safety.clock import ClockWatch
from spanvla_ros.types import SpanvlaError

SECOND = 1_000_000_000


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
    bus.spin(1.5)
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


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / 'file').write_text('not a folder')
    with pytest.raises(SpanvlaError, match=r'file/drive\.mcap: Not a directory; name a file'):
        BagFile(tmp_path / 'file' / 'drive.mcap')


def test_a_damaged_rest_of_a_killed_recorder_is_one_sentence_and_stays(tmp_path):
    file = BagFile(tmp_path / 'drive.mcap')
    for k in range(50):
        file.write('/plan', 'std_msgs/msg/String', k, b'\0\1\0\0\5\0\0\0plan\0' + bytes([k]))
    file.flush()
    rest = file.part / f'{file.part.name}.mcap'
    # As a kill leaves it, with a disk that lost some of it.
    data = bytearray(rest.read_bytes())
    begin = data.index(b'\x28\xb5\x2f\xfd')
    data[begin + 20 : begin + 40] = bytes(20)
    file.close().unlink()
    rest.parent.mkdir()
    rest.write_bytes(data)
    with pytest.raises(SpanvlaError, match=r'drive\.part\.mcap: damaged .*; mend it with'):
        recover(tmp_path / 'drive.mcap')
    assert rest.is_file()
    assert not (tmp_path / 'drive.mcap').exists()


def kept(recent: Recent) -> list[int]:
    return [stamp_ns // SECOND for _, _, stamp_ns, _ in recent.items]


def test_an_incident_keeps_the_last_seconds_and_no_more_than_fits():
    recent = Recent(3.0, 250, ClockWatch())
    for second in range(10):
        assert recent.watch(second * SECOND) is None
        recent.add(('plan', 'std_msgs/msg/String', second * SECOND, b'x' * 50))
    assert kept(recent) == [6, 7, 8, 9]
    recent.add(('plan', 'std_msgs/msg/String', 10 * SECOND, b'x' * 160))
    assert kept(recent) == [9, 10]


def test_an_incident_holds_one_time_only():
    recent = Recent(3.0, 250, ClockWatch())
    for second in (100, 101, 50, 51, 52, 53, 54):
        jump = recent.watch(second * SECOND)
        assert jump == ('clock_backwards' if second == 50 else None)
        recent.add(('plan', 'std_msgs/msg/String', second * SECOND, b'x' * 50))
        assert second >= 100 or max(kept(recent)) < 100
    assert kept(recent) == [51, 52, 53, 54]
    assert recent.watch(60 * SECOND) == 'clock_gap'
    assert kept(recent) == [51, 52, 53, 54]


def test_what_a_kill_left_out_of_order_is_read_in_order(tmp_path):
    file = BagFile(tmp_path / 'drive.mcap')
    stamps = [5, 3, 9, 7]
    for stamp in stamps:
        # The smallest string there is: CDR header, length, the closing zero.
        data = bytes([0, 1, 0, 0, 1, 0, 0, 0, 0])
        file.write('/plan', 'std_msgs/msg/String', stamp * SECOND, data)
        file.flush()
    file._writer.storage.bio.close()
    path = recover(tmp_path / 'drive.mcap')
    with AnyReader([path]) as reader:
        assert [stamp for _, stamp, _ in reader.messages()] == [s * SECOND for s in sorted(stamps)]
    assert not part_folder(path).exists()


def test_there_is_nothing_to_recover(tmp_path):
    assert recover(tmp_path / 'drive.mcap') is None


def test_the_recorder_loads_no_model_code():
    code = (
        'import sys; import spanvla_ros.ros.recorder_node; '
        "bad = {'torch', 'onnxruntime', 'cv2'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, '-c', code], check=True)
