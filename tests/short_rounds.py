"""`listener.py` with a round of upkeep in every turn."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

sys.path.insert(0, str(ROOT))
import upkeep  # noqa: E402

upkeep.REAP_INTERVAL = 0.1
runpy.run_path(str(ROOT / "listener.py"), run_name="__main__")
