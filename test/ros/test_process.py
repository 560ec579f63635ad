"""The begin and the end of a node's process, without a node."""

import sys

import pytest

from spanvla_ros.ros import process
from spanvla_ros.ros.process import run_node


@pytest.mark.parametrize(
    'words', [('--params-file', '/nowhere.yaml'), ('-p', 'no_value'), ('-r', 'a:=b:=c')]
)
def test_ros_arguments_that_are_none_are_a_sentence_and_status_2(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['/x/guardian_node.py', '--ros-args', *words])
    assert run_node(lambda: pytest.fail('no node is made')) == 2
    said = capsys.readouterr().err
    assert said.startswith('guardian_node: ')
    assert words[1] in said
    assert said.count('\n') == 1


def test_a_node_that_cannot_close_is_destroyed_all_the_same(monkeypatch, capsys):
    done = []

    class Stuck:
        def close(self):
            raise RuntimeError('disk full')

        def destroy_node(self):
            done.append('destroyed')

    monkeypatch.setattr(process.rclpy, 'try_shutdown', lambda: done.append('shut down'))
    process._close(Stuck())
    assert done == ['destroyed', 'shut down']
    assert capsys.readouterr().err == 'shutdown: RuntimeError: disk full\n'
