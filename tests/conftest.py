"""Set-up for every test, before anything else is imported."""

from __future__ import annotations

import torch

from tests.support.triton_interpreter import interpret_triton

interpret_triton()
torch.set_num_threads(1)  # tiny models: two threads that spin cost more than they bring
