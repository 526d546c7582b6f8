"""The numbers of running work, and the trackers that they are sent to."""
