"""Keeps the suite light: one thread, and PyTorch's structured trace out of what pytest records."""

import logging

import torch

torch.set_num_threads(1)
logging.getLogger("torch.__trace").addFilter(lambda record: False)
