"""The classes of one rule."""

from fewbits.optim.adam import Adam, Adam8bit, Adam32bit, PagedAdam, PagedAdam8bit, PagedAdam32bit
from fewbits.optim.optimizer import Optimizer2State
