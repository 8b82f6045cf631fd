"""The operations of fewbits in plain torch: for every device that native code does not know.

Right before fast. Functions take dense tensors that have been checked and write into tensors that the caller made;
`_launch`, `_panel`, `_int8` and `optim` choose between them and native code by the device, see `_backend`. The formulas
are those of ``tests/oracle*.py``: float32, an operation at a time, so that the bytes are native code's wherever a
device's float32 arithmetic is IEEE's. Nothing needs float64 on the device, which some do not have; what the definition
wants in float64 (the mean of block maxima, norms) is computed there or, failing that, on the CPU.

Pieces of bounded size are worked on one after another, so that temporary memory does not grow with the tensor.
"""
