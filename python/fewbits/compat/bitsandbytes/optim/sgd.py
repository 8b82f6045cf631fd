"""The classes of one rule."""

from fewbits.optim.optimizer import Optimizer1State
from fewbits.optim.sgd import SGD, SGD8bit, SGD32bit
