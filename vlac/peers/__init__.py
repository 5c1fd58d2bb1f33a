"""Artifacts beside other ways to run the same checkpoint on this machine: interleaved, same inputs and noise.

`contenders` says who takes part, `rounds` lets them take turns, `figures` makes the table and the plot, `compare` does
all of it. Used by `vlac bench --peers` and benchmarks/smolvla_cpu.py.
"""
