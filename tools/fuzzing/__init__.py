"""Hostile and broken input, counted: what `tools/fuzz` runs.

A family (`Checkpoints`, `Pictures`, `Kills`, ...) draws numbered cases from a seed. `command` runs many of
them in a child process (`child`), which it watches (`watch`): a case ends right, in an error of ours, or it
is a fault.
"""
