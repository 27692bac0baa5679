"""Answers of the tuned model and its base: predictions, scores, forgetting, the report page."""
