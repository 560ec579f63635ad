"""Memory of pictures stays with the process; a process of its own, as the setting is for good."""

import subprocess
import sys

FAULTS = """
import ctypes, resource
from spanvla_ros.ros.process import keep_freed_memory
if {kept}:
    keep_freed_memory()
c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
size = 1600 * 900 * 3

def pass_on():
    # Three buffers at a time, each written to from end to end.
    buffers = [c.malloc(size) for _ in range(3)]
    for buffer in buffers:
        ctypes.memset(buffer, 1, size)
    for buffer in buffers:
        c.free(buffer)

pass_on()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    pass_on()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*, kept: bool) -> int:
    code = FAULTS.format(kept=kept)
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_pages_of_pictures_are_faulted_in_once():
    pages = 10 * 3 * 1600 * 900 * 3 // 4096
    assert faults(kept=False) > 0.5 * pages
    assert faults(kept=True) < 0.01 * pages
