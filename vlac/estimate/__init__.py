"""What a chunk would cost on a device that is not here: counts of a program against a table of devices.

`devices` is the table, `roofline` the estimate, `probe` measures the machine at hand and `calibrate` compares.
"""
