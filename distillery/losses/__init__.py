"""What pulls the student: the table of losses, their formulas, their sum, the standardised targets."""
