"""Code generation: a scheduled joint graph becomes a chain of regions and a PlannedModule."""
