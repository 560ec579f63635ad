"""The test rigs stand beside the tests, a folder that pytest does not put on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
