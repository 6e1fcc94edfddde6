"""Dense attention: every query reads every key."""
