"""Memory profiles, and tables of what they need."""
