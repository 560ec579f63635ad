"""Rows for training tests are made by a module beside this one."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
