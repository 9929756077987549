"""fxmem: train PyTorch models under a memory budget that holds."""
