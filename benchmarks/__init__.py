"""What fxmem is measured with: `python -m benchmarks.step`."""
