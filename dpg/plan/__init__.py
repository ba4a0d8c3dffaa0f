"""What a run will take before it starts: bytes in each phase, operations, seconds, and what to change if that is much.

One model of memory: `dpg plan` prints it, and `dpg run` refuses by it.
"""
