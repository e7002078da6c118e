"""The generated shapes are the same every time, so a test session draws them once."""
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import vit  # noqa: E402

vit.shapes = functools.cache(vit.shapes)
