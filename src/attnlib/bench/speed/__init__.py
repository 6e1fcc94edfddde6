"""What things cost: time and memory of operators, mechanisms, caches and hooks."""
