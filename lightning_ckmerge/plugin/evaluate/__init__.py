"""How a candidate is scored: put into the module, run through the user's own validation, and differentiated."""
