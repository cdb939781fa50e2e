"""Teachers and students, and how their weights are read and written."""
