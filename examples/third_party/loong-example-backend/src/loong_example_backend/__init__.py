"""An example of a hardware backend from outside."""
