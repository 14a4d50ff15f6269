"""What this machine's CPU is good at."""
