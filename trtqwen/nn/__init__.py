"""Small torch operators that the checkpoint's readers and the executor share."""
