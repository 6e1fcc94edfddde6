"""Looking at attention: what is recorded through the hook protocol, in bounded memory, and drawn."""
