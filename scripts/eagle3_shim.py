"""eagle3_shim.py: the EAGLE-3 head with switches, until eagle.py has it. Then delete this file.

    from eagle3_shim import Eagle3, Eagle3Head      # becomes: from eagle import Eagle3, Eagle3Head

The one idea: train_head.py is written for the interface to come, and this is all that it takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import eagle
from model import Linear, ModelConfig

if hasattr(eagle, "Eagle3"):
    from eagle import Eagle3, Eagle3Head
else:

    @dataclass(frozen=True)
    class Eagle3:
        """What makes an EAGLE-3 head beyond its layers, as far as train_head.py uses it."""

        taps: tuple[int, ...]
        target_hidden_size: int
        drafted: int

    class Eagle3Head(eagle.Eagle3Head):
        def __init__(self, config: ModelConfig, switches: Eagle3):
            super().__init__(config, switches.target_hidden_size, switches.drafted, own_embedding=False)
            self.fc = Linear(len(switches.taps) * switches.target_hidden_size, config.hidden_size)


__all__ = ["Eagle3", "Eagle3Head"]
