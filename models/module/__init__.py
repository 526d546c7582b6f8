"""The caller's live module: inspecting it, borrowing it and restoring it."""
