"""Checkpoints: global tensors in one ordinary HDF5 file, written by all ranks, readable without any of them."""

from __future__ import annotations
