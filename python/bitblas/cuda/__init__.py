"""From TVM's CUDA module to files that run: its text, the compilers that take it, what they report, and the driver."""
