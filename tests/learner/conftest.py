"""One thread for torch: the models here are too small to share, and idle OpenMP threads spin."""

import torch

torch.set_num_threads(1)
