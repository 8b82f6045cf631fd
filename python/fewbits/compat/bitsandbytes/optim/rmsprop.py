"""The classes of one rule."""

from fewbits.optim.optimizer import Optimizer1State
from fewbits.optim.rmsprop import RMSprop, RMSprop8bit, RMSprop32bit
