"""Commands on a bank that exists: encode again what is damaged, or what failed."""
