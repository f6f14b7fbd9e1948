"""How the run is put back after a search: what is kept of it, and the proof that nothing differs."""
