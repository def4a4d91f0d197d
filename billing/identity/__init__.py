"""Who calls: keys, their rules and secrets, people who sign in, failed attempts."""
