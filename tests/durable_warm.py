"""Imported by the server that `durable.forked` forks from: what torch sets up at its first run is set up once."""

from durable import SETUPS, call

call(SETUPS["binomial"], 2)
