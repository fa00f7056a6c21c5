"""Seed-OSS for loong."""
