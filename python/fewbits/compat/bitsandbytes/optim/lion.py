"""The classes of one rule."""

from fewbits.optim.lion import Lion, Lion8bit, Lion32bit, PagedLion, PagedLion8bit, PagedLion32bit
from fewbits.optim.optimizer import Optimizer1State
