"""The classes of one rule."""

from fewbits.optim.lamb import LAMB, LAMB8bit, LAMB32bit
from fewbits.optim.optimizer import Optimizer2State
