"""What the process of an experiment is told about its memory, and that nothing of it outlives its use."""

import gc
import platform
import subprocess
import sys

import pytest

from dpg.upkeep import collector_paused, forget_what_stays

HELD = """
import re, sys
from pathlib import Path
from dpg.upkeep import keep_freed_memory

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) / 1000

if sys.argv[1] == "kept":
    keep_freed_memory()
before = resident()
block = bytearray(b"x") * 64_000_000
del block
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is told")
def test_freed_memory_is_kept():
    held = {
        how: float(subprocess.run([sys.executable, "-c", HELD, how], capture_output=True, check=True).stdout)
        for how in ("given back", "kept")
    }
    assert held["given back"] < 10 and held["kept"] > 50


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was(enabled):
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(ValueError), collector_paused():
            assert not gc.isenabled()
            raise ValueError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_what_stays_is_not_looked_at_again():
    kept = {"a": []}
    try:
        forget_what_stays()
        assert not any(each is kept for each in gc.get_objects()) and gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
    assert any(each is kept for each in gc.get_objects())
