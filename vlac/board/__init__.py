"""What a board tells about itself to any user while it works: clocks, heat, throttling, memory, power.

`reading` finds files and commands, `readers` and `energy` know what they mean, `sampler` looks every half second from a
process of its own, `summary` reduces what was seen, `verdict` says whether a measurement may be quoted.
"""
