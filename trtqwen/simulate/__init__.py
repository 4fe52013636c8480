"""A recipe under load without a GPU: the executor's own scheduler, driven by a cost model of the card."""
