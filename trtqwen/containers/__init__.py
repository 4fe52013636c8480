"""Containers: `docker run` commands for trtqwen in NVIDIA's images, and images with trtqwen installed."""
