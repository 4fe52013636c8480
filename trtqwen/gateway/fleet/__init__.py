"""Several models behind one gateway: the table of models, engines that come and go, canaries and shadows."""
