"""What stands behind the two commands: cache images once, train a student from a teacher's features."""
