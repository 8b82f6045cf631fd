"""The classes of one rule."""

from fewbits.optim.adamw import AdamW, AdamW8bit, AdamW32bit, PagedAdamW, PagedAdamW8bit, PagedAdamW32bit
from fewbits.optim.optimizer import Optimizer2State
