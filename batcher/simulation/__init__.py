"""Policies on simulated machines."""
