"""What is said: the texts of users and the right reply to each. There is one task, the short-answer task."""
