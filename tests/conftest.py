"""Set-up for every test: tiny models run on one thread, because two threads that spin cost more than they bring."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
