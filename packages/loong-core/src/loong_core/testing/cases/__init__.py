"""What every op is tried on, and its definition in float64: written from the formula, not from any implementation."""
