"""The classes of one rule."""

from fewbits.optim.adagrad import Adagrad, Adagrad8bit, Adagrad32bit
from fewbits.optim.optimizer import Optimizer1State
