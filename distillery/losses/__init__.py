"""The losses: their table, their formulas, their weighted sum, and the standardised targets."""
