"""One thread for a process, or tests and the programs that they start would wait for each other. The generated shapes are
the same every time, so a test session draws them once."""
import functools
import os
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["OMP_NUM_THREADS"] = "1"

if find_spec("torch"):  # most rules of the house (test_house.py) can be checked without
    import vit

    vit.shapes = functools.cache(vit.shapes)
