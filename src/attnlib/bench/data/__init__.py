"""What mechanisms are measured on: real data from packages, tasks on it, and generated worlds whose truth is known."""
