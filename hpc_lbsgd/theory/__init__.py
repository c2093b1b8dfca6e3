"""The papers' mathematics. Pure functions; numpy and the standard library only."""
