"""Fine-tuning suite: tasks as rows of one table, features, metrics, and the runner that compares initialisations."""
