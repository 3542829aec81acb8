"""What a multirun adds to trainings: its points and their record, a fresh process for each, the verdict."""
