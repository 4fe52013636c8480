"""`trtqwen doctor`: checks of a host, a model, a recipe or a running server."""
