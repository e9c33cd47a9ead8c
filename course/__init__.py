"""The course: assignments cut out of the project's files, a grader, and an audit of the grader."""
