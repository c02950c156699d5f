"""Export the student for use elsewhere: python -m distillery.export."""
