"""How heads share the work: routing and mapping of heads."""
