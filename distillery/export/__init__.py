"""The student, ready to leave: python -m distillery.export."""
