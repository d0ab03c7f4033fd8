"""A model of the kernels from their machine code: what the compiler made, what binds, the predicted time."""
