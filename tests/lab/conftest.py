"""Workers are started afresh and import the test claims by name: they find them through the parent's ``sys.path``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
