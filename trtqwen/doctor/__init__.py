"""`trtqwen doctor`: what is wrong with a host, a model, a recipe or a running server, and the hint."""
