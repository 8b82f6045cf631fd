"""The classes of one rule."""

from fewbits.optim.lars import LARS, LARS8bit, LARS32bit, PytorchLARS
from fewbits.optim.optimizer import Optimizer1State
