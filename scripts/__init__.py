"""What keeps the project: its environment, its tables, its pictures."""
