"""Nothing asserts how long something takes: hypothesis has no deadline, and draws the same examples every time."""

import os

import torch
from hypothesis import settings

settings.register_profile("dramatis", deadline=None, derandomize=True)
settings.load_profile("dramatis")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: its kernels run on the CPU, slowly
