"""Measurements on the user's own machine: ranks' part of `harness ckpt bench` and `harness bench`.

What is measured takes turns in rounds, beside the limit that the same ranks reach with plain means in the same round
(`rounds`), so that a ratio holds on a machine that others use too.
"""
