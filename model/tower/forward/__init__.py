"""The forwards of vision towers: how each kind takes pixels, and where it ends."""
