"""`listener.py` whose retries wait as long as they may, not for a random part of that."""

import random
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

random.uniform = lambda low, high: high
sys.path.insert(0, str(ROOT))
runpy.run_path(str(ROOT / "listener.py"), run_name="__main__")
