"""Offline batch generation for RL rollouts and bulk inference."""
