"""Prompts as token ids: chat templates, special tokens, and the tokens that end an assistant's turn."""
