"""How good features are, during a run and afterwards: python -m distillery.evaluate."""
