"""`docs/doctor.md`, written from the catalog of findings.

Run `python -m spanvla_ros.doctor.page` in the repository after a finding was changed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from spanvla_ros.doctor.findings import GRAPH, MACHINE, RIG, Advice
from spanvla_ros.model.checkpoint import write_text

PAGE_FILE = Path('docs') / 'doctor.md'
HEAD = """\
# Doctor

```
spanvla doctor                  # this machine, and five seconds of the running graph
spanvla doctor --bag my_bag     # this machine, and a recorded drive
spanvla doctor --json           # {"findings": [{"id", "severity", "what", "fix"}]}
```

Says what would keep the nodes from driving, or drive them wrong, each with the one line that mends it.
`block` is what will not work, `warn` what will work badly, `info` what is good to know.
It exits 1 where anything blocks, else 0; without a GPU nothing blocks.
`--seconds 0` looks at the machine alone.
Record ten seconds with a bend, faster than 2 m/s: odometry and cameras are then held against one another.

How a camera is found to be swapped, mirrored, upside down or of another focal length: corners are tracked through its pictures and must move as the odometry says, seen from its mount; what explains them better is named.
A picture with little ground or little to track is left in peace.

This page is written by `python -m spanvla_ros.doctor.page` from `spanvla_ros/doctor/findings.py`; a test holds it to be current.
Words in capitals stand for what the doctor fills in.
"""  # noqa: E501
PARTS: tuple[tuple[str, str, Mapping[str, Advice]], ...] = (
    ('This machine', 'Python, libraries, ROS, model, GPU, middleware.', MACHINE),
    ('Topics, odometry and cameras', 'Of a bag or of a running graph.', RIG),
    ('A running graph', 'What only a running graph shows.', GRAPH),
)


def finding_page() -> str:
    """The page: a table for each part of the catalog."""
    lines = [HEAD]
    for title, about, part in PARTS:
        lines += [f'## {title}', '', about, '']
        lines += ['| finding | severity | means | fix |', '|---|---|---|---|']
        lines += [_row(name, advice) for name, advice in part.items()]
        lines.append('')
    return '\n'.join(lines)


def _row(name: str, advice: Advice) -> str:
    fix = re.sub(r'\{(\w+)\}', lambda found: found[1].upper(), advice.fix).replace('|', '\\|')
    return f'| `{name}` | {advice.severity} | {advice.meaning} | {fix} |'


def main() -> int:
    """Write the page below the present directory."""
    write_text(PAGE_FILE, finding_page())
    return 0


if __name__ == '__main__':
    sys.exit(main())
