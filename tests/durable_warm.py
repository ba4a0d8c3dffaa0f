"""Imported by the server that `durable.forked` forks from: what torch sets up at its first run is set up once."""

import threading

from durable import SETUPS, call
from tqdm import tqdm

# tqdm's own lock is one for all processes forked from here, and one that is killed while it holds it never lets go; its
# monitor is a thread, and a process with threads is not to be forked.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0

call(SETUPS["binomial"], 2)
