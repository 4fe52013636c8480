"""trtqwen in NVIDIA's images: `docker run` lines for its commands, and images with trtqwen installed."""
