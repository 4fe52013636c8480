"""Several models behind one gateway: the table of models, their engines, canaries and shadows."""
