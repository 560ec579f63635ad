import sys
from pathlib import Path

# Modules beside the tests, such as `tiny_folders`.
sys.path.insert(0, str(Path(__file__).parent))
