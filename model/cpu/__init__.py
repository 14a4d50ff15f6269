"""How to make the most of a CPU: its matrix units, its threads, packed rows."""
