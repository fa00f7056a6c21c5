"""The references of all ops in plain torch: short enough to check by eye, good enough to train with on any device."""
