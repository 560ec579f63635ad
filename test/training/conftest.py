"""Rows for training tests are made by a module beside this one."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
# Folders of every backbone family are made by a module of the model's tests.
sys.path.insert(0, str(Path(__file__).parents[1] / 'model'))
