"""Small worlds for generators: pictures whose truth is known, who judges them, and small models trained on them."""
