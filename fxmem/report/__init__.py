"""What people read of a plan."""
