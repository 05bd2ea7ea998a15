"""Architecture search: candidates within limits, scored, and the best one as `arch.json`."""
