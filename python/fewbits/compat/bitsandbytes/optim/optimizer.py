"""The base classes."""

from fewbits.optim.optimizer import GlobalOptimManager, MockArgs, Optimizer1State, Optimizer2State, Optimizer8bit
from fewbits.utils import sync_gpu
