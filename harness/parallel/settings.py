"""The section `parallel` of a config: which form of training, and how ranks share its work. Read by `groups.py`."""

from __future__ import annotations

from harness.section import Positive, Section


class Parallel(Section):
    """How ranks share the work; unset: every rank has the whole model and its own samples."""

    model: Positive = 1
    """Ranks that share one copy of the model, each with a part of its layers (tensor parallel)."""
