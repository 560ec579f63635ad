"""What only a running graph shows: nodes, types, clocks; the rest is judged as a bag is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from spanvla_ros.doctor.findings import Finding, found
from spanvla_ros.doctor.rig import CLOCK
from spanvla_ros.replay.observed import SeenTopic

OURS = ('planner', 'guardian', 'follower', 'recorder')
NAMESPACE = '/spanvla'


def check_graph(
    nodes: Sequence[str],
    topics: Sequence[SeenTopic],
    sim_time: Mapping[str, bool],
    several_types: Mapping[str, Sequence[str]],
) -> list[Finding]:
    """Nodes, types and clocks of a running graph.

    Args:
        nodes: full names.
        topics: those with a publisher.
        sim_time: by node, whether it takes the time of /clock.
        several_types: topics announced with more than one type.
    """
    return [
        *_types(several_types),
        *_time(sim_time, has_clock=any(topic.kind == CLOCK for topic in topics)),
        *_twins(nodes),
    ]


def _types(several_types: Mapping[str, Sequence[str]]) -> Iterator[Finding]:
    for name, types in several_types.items():
        yield found('type_mismatch', f'{name} is announced as {" and as ".join(types)}')


def _time(sim_time: Mapping[str, bool], *, has_clock: bool) -> Iterator[Finding]:
    simulated = sorted(name for name, value in sim_time.items() if value)
    real = sorted(name for name, value in sim_time.items() if not value)
    if simulated and not has_clock:
        yield found(
            'clock_missing', f'{", ".join(simulated)} wait for /clock, nobody publishes it'
        )
    elif simulated and real:
        ours = [name for name in real if name.rpartition('/')[2] in OURS]
        if ours:
            yield found('sim_time_mismatch', f'{", ".join(simulated)} live by /clock, '
                        f'{", ".join(ours)} by the wall clock')  # fmt: skip
    elif has_clock and any(name.rpartition('/')[2] in OURS for name in real):
        yield found('sim_time_mismatch', 'somebody publishes /clock, the nodes live by the wall '
                    'clock')  # fmt: skip


def _twins(nodes: Sequence[str]) -> Iterator[Finding]:
    """Two planners or guardians in one domain drive against one another."""
    for ours in OURS[:3]:
        named = [name for name in nodes if name.rpartition('/')[2] == ours]
        if len(named) > 1:
            yield found('nodes_twice', f'{len(named)} nodes are a {ours}: {", ".join(named)}')
