"""What this machine's CPU computes fast, measured."""
