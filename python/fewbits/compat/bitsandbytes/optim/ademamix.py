"""The classes of one rule."""

from fewbits.optim._reference import _ReferenceAdEMAMix
from fewbits.optim.ademamix import (
    AdEMAMix,
    AdEMAMix8bit,
    AdEMAMix32bit,
    PagedAdEMAMix,
    PagedAdEMAMix8bit,
    PagedAdEMAMix32bit,
)
from fewbits.optim.optimizer import Optimizer2State
